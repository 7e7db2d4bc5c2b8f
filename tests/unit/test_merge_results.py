from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.robot.libero.results import EpisodeResult, RunFolder, load_episodes
from experiments.robot.libero.results.merge import check, describe, main, planned_episodes
from experiments.robot.libero.rollouts.protocol import Episode
from tests.helpers.episode_results import episode_result as result

IDENTITY = {"suite": "libero_goal", "seed": 7}


def write(
    folder: Path,
    results: list[EpisodeResult],
    shard: str = "",
    trials: int = 2,
    identity: dict[str, object] | None = None,
) -> None:
    """A process's part of a run of two tasks."""
    with RunFolder(folder, identity or IDENTITY, {}, shard=shard) as run:
        run.plan(Episode("libero_goal", task, "do it", number, 7) for task in (0, 3) for number in range(trials))
        for entry in results:
            run.append(entry)
        run.write_summary()


def two_ranks(folder: Path) -> None:
    write(folder, [result(0, 0), result(0, 1, "failure")], ".rank0-of-2")
    write(folder, [result(3, 0, "error"), result(3, 0), result(3, 1)], ".rank1-of-2")


def test_a_complete_run_becomes_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_ranks(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert "each of 4 episodes is there once" in capsys.readouterr().out
    merged = tmp_path / "merged"
    assert load_episodes(merged) == load_episodes(tmp_path)
    assert len((merged / "episodes.jsonl").read_text().splitlines()) == 4
    assert planned_episodes(merged) == planned_episodes(tmp_path)
    summary = json.loads((merged / "summary.json").read_text())
    assert (summary["planned"], summary["missing"], summary["total"]["successes"]) == (4, 0, 3)
    assert main([str(merged), "--out", str(tmp_path / "again")]) == 0


def test_missing_episodes_are_listed_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [result(0, 1)], ".rank0-of-2")
    assert main([str(tmp_path)]) == 1
    assert "3 of 4 episodes missing: libero_goal task 0: 0; task 3: 0-1" in capsys.readouterr().out
    assert not (tmp_path / "merged").exists()
    assert "3 of 4 episodes have not run" in (tmp_path / "summary.md").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["missing"] == 3


def test_double_episodes_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_ranks(tmp_path)
    other = tmp_path / "episodes.rank0-of-3.jsonl"
    other.write_bytes((tmp_path / "episodes.rank1-of-2.jsonl").read_bytes())
    assert main([str(tmp_path)]) == 1
    assert "2 of 4 episodes double: libero_goal task 3: 0-1" in capsys.readouterr().out


def test_errors_have_their_own_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [result(0, 0), result(0, 1), result(3, 0), result(3, 1, "error")])
    assert main([str(tmp_path)]) == 3
    assert "1 of 4 episodes ended in an error: libero_goal task 3: 1" in capsys.readouterr().out


def test_folders_of_two_machines_are_one_run(tmp_path: Path) -> None:
    write(tmp_path / "a", [result(0, 0), result(0, 1)])
    write(tmp_path / "b", [result(3, 0), result(3, 1)])
    assert main([str(tmp_path / "a")]) == 1
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "both")]) == 0
    assert len(load_episodes(tmp_path / "both")) == 4


def test_wrong_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", [result(0, 0)])
    write(tmp_path / "b", [result(3, 0)], identity={**IDENTITY, "seed": 8})
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "not the same evaluation" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    (tmp_path / "a" / "plan.json").unlink()
    assert main([str(tmp_path / "a")]) == 2
    assert "no plan*.json" in capsys.readouterr().err


def test_a_run_is_not_overwritten_with_its_merger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_ranks(tmp_path)
    assert main([str(tmp_path), "--out", str(tmp_path / "x" / "..")]) == 2
    assert "--out: " in capsys.readouterr().err and not (tmp_path / "episodes.jsonl").exists()


def test_the_plan_of_an_extended_run_is_the_union_and_overwriting_forgets_it(tmp_path: Path) -> None:
    write(tmp_path, [result(0, 0)], trials=1)
    write(tmp_path, [], trials=3)
    assert len(planned_episodes(tmp_path)) == 6
    with RunFolder(tmp_path, IDENTITY, {}, overwrite=True) as run:
        run.plan([Episode("libero_goal", 0, "do it", 0, 7)])
    assert planned_episodes(tmp_path) == {("libero_goal", 0, 0)}


def test_an_unplanned_episode_is_told_apart() -> None:
    found = check({("s", 0, 0)}, [(("s", 0, 0), "failure"), (("s", 0, 9), "success")])
    assert found.ok and found.unplanned == [("s", 0, 9)] and not found.errors


def test_episodes_in_words() -> None:
    keys = [("a", 0, 0), ("a", 0, 1), ("a", 0, 2), ("a", 0, 5), ("a", 1, 3), ("b", 1, 0)]
    assert describe(keys) == "a task 0: 0-2, 5; task 1: 3; b task 1: 0"
    assert describe(keys, most=1) == "a task 0: 0-2, 5; and 2 more tasks"
