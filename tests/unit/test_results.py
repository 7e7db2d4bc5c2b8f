from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.robot.libero.results import EpisodeResult, RunFolder, load_episodes
from experiments.robot.libero.results.__main__ import main
from prismatic.util.errors import UsageError
from tests.helpers.episode_results import episode_result

IDENTITY = {"suite": "libero_spatial", "seed": 7, "protocol": {"max_steps": 220}}


def result(init_state: int, status: str = "success", suite: str = "libero_spatial") -> EpisodeResult:
    return episode_result(0, init_state, status, suite=suite)


def write(folder: Path, results: list[EpisodeResult], identity: dict[str, object] | None = None) -> None:
    with RunFolder(folder, identity or IDENTITY, {"torch": "2"}) as run:
        for entry in results:
            run.append(entry)
        run.write_summary()


def test_every_line_tells_where_it_comes_from(tmp_path: Path) -> None:
    write(tmp_path, [result(0), result(1, "error")])
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["success", "error"]
    assert lines[0]["identity"] == IDENTITY and lines[0]["environment"] == {"torch": "2"}
    assert lines[1]["success"] is None and lines[1]["error"] == "boom"
    assert load_episodes(tmp_path) == [result(0), result(1, "error")]


def test_another_configuration_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    write(tmp_path, [result(0)])
    before = (tmp_path / "episodes.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"another configuration \(seed: 7 there, 8 now\).*--overwrite"):
        RunFolder(tmp_path, {**IDENTITY, "seed": 8}, {})
    assert (tmp_path / "episodes.jsonl").read_bytes() == before


def test_a_run_that_stopped_before_its_first_episode_is_in_nobodys_way(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY, {}) as run:
        run.plan([])
    write(tmp_path, [result(0)], {**IDENTITY, "seed": 8})
    assert json.loads((tmp_path / "config.json").read_text())["identity"]["seed"] == 8
    assert load_episodes(tmp_path) == [result(0)]


def test_overwrite_discards_the_old_configuration(tmp_path: Path) -> None:
    write(tmp_path, [result(0), result(1)])
    (tmp_path / "episodes.rank1-of-2.jsonl").write_bytes((tmp_path / "episodes.jsonl").read_bytes())
    with RunFolder(tmp_path, {**IDENTITY, "seed": 8}, {}, overwrite=True) as run:
        assert run.finished() == []
    assert json.loads((tmp_path / "config.json").read_text())["identity"]["seed"] == 8


def test_episodes_without_configuration_are_refused(tmp_path: Path) -> None:
    (tmp_path / "episodes.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"no config\.json"):
        RunFolder(tmp_path, IDENTITY, {})


def test_a_half_written_line_is_dropped_and_the_next_one_readable(tmp_path: Path) -> None:
    write(tmp_path, [result(0)])
    with (tmp_path / "episodes.jsonl").open("a") as stream:
        stream.write('{"suite": "libero_spa')
    assert load_episodes(tmp_path) == [result(0)]
    write(tmp_path, [result(1)])
    assert load_episodes(tmp_path) == [result(0), result(1)]


def test_what_is_not_the_published_protocol_is_said_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = {"max_steps": 220, "render": "fast", "image_size": 256}
    identity = {**IDENTITY, "protocol": protocol, "standard_protocol": False}
    write(tmp_path / "fast", [result(0)], identity)
    write(tmp_path / "usual", [result(0)], {**IDENTITY, "standard_protocol": True})
    said = "Not the protocol of published numbers: render fast."
    assert said in (tmp_path / "fast" / "summary.md").read_text()
    assert "published" not in (tmp_path / "usual" / "summary.md").read_text()
    assert main(["report", str(tmp_path / "fast")]) == 0
    assert said in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "fast"), str(tmp_path / "usual")]) == 0
    assert "differ in their protocol" in capsys.readouterr().out


def test_a_damaged_line_inside_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [result(0)])
    file = tmp_path / "episodes.jsonl"
    file.write_text("garbage\n" + file.read_text())
    with pytest.raises(UsageError, match=r"episodes.jsonl: line 1 is not an episode"):
        load_episodes(tmp_path)


def test_a_repeated_episode_counts_once_with_its_later_line(tmp_path: Path) -> None:
    write(tmp_path, [result(0, "error"), result(0, "failure")])
    assert load_episodes(tmp_path) == [result(0, "failure")]


def test_two_processes_cannot_write_to_one_file(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY, {}), pytest.raises(UsageError, match="another process is writing"):
        RunFolder(tmp_path, IDENTITY, {})


def test_shards_of_a_distributed_run_add_up(tmp_path: Path) -> None:
    for rank in range(2):
        with RunFolder(tmp_path, IDENTITY, {}, shard=f".rank{rank}-of-2") as run:
            run.append(result(rank))
            summary = run.write_summary()
    assert summary["total"]["successes"] == 2
    assert len(load_episodes(tmp_path)) == 2


def test_status_and_success_cannot_contradict() -> None:
    with pytest.raises(ValueError, match="status"):
        EpisodeResult("libero_spatial", 0, "do it", 0, 7, "error", False, 0, None, 1.0)


def test_report_and_compare_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", [result(0), result(1, "failure")])
    write(tmp_path / "b", [result(0), result(1), result(2, "error")])
    write(tmp_path / "c", [result(0, suite="libero_goal")], {**IDENTITY, "suite": "libero_goal"})
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "+50.0 points on 2 shared episodes" in capsys.readouterr().out
    other = {**IDENTITY, "initial_states": "f00d"}
    write(tmp_path / "own", [result(0), result(1)], other)
    write(tmp_path / "default", [result(0), result(1)], {**IDENTITY, "initial_states": "DEFAULT"})
    assert main(["compare", str(tmp_path / "own"), str(tmp_path / "default")]) == 0
    assert "differ in their protocol: initial_states: 'f00d' there, 'DEFAULT' now" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    assert "Mean of the 2 suites: 75.0%" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "use `compare`" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nothing")]) == 2
