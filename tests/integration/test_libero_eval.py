"""The evaluation on the real simulator: same results however it is organized, killed runs continue, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.libero.results.run_folder import load_episodes
from experiments.robot.libero.run_libero_eval import EXIT_ERRORS, GenerateConfig, eval_libero, main
from prismatic.util.errors import UsageError
from tests.helpers.episode_results import small_run
from tests.helpers.eval_helpers import NoisePolicy
from tests.helpers.programs import run_program

pytest.importorskip("libero", reason="LIBERO is not installed")
pytestmark = pytest.mark.sim

SCRIPT = Path(__file__).parents[2] / "experiments" / "robot" / "libero" / "run_libero_eval.py"


class Recording(NoisePolicy):
    def __init__(self) -> None:
        self.seen: dict[int, tuple[bytes, bytes, bytes]] = {}

    def act(self, queries: Any) -> np.ndarray:
        for query in queries:
            self.seen[query.seed] = (query.image.tobytes(), query.wrist_image.tobytes(), query.state.tobytes())
        return super().act(queries)


def test_processes_see_what_one_process_sees(tmp_path: Path) -> None:
    """Images and states of every query agree to the byte, though episodes run in other processes and orders."""
    alone, side_by_side = Recording(), Recording()
    summary = eval_libero(small_run(tmp_path / "alone"), alone)
    assert summary["total"]["failures"] == 2 and summary["episodes_missing"] == 0
    eval_libero(small_run(tmp_path / "both", num_workers=2, save_videos="failures"), side_by_side)
    assert len(alone.seen) == 4 and alone.seen == side_by_side.seen
    videos = sorted(file.name for file in (tmp_path / "both" / "run" / "videos").iterdir())
    assert videos == [f"libero_object--task02--init0{number}--failure.mp4" for number in range(2)]
    one, other = (load_episodes(tmp_path / name / "run") for name in ("alone", "both"))
    assert [(result.key, result.status, result.steps) for result in one] == [
        (result.key, result.status, result.steps) for result in other
    ]


def test_a_killed_run_goes_on_where_it_was(l1_checkpoint: Path, tmp_path: Path) -> None:
    policy = {"pretrained_checkpoint": str(l1_checkpoint), "unnorm_key": "libero_tiny", "device": "cpu"}
    config = small_run(tmp_path, num_trials_per_task=6, **policy)
    flags = [word for name, value in vars(config).items() if value is not None for word in (f"--{name}", str(value))]
    run = subprocess.Popen([sys.executable, str(SCRIPT), *flags], stderr=subprocess.PIPE, text=True)
    lines = tmp_path / "run" / "episodes.jsonl"
    deadline = time.monotonic() + 600
    while not (lines.is_file() and lines.read_bytes().count(b"\n") >= 1):
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.kill()
    run.communicate()
    before = lines.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert 1 <= kept.count(b"\n") < 6
    with lines.open("ab") as stream:
        stream.write(b'{"suite": "libero_ob')  # As if the kill had come in the middle of a line.

    assert main(config) == 0
    assert lines.read_bytes().startswith(kept) and lines.read_bytes().count(b"\n") == 6
    assert [result.init_state for result in load_episodes(tmp_path / "run")] == list(range(6))
    record = json.loads(lines.read_text().splitlines()[-1])
    assert record["identity"]["checkpoint_hash"] and record["identity"]["unnorm_key"] == "libero_tiny"
    assert record["environment"]["checkpoint"] == str(l1_checkpoint)
    assert "standard_protocol" in record["identity"] and not record["identity"]["standard_protocol"]
    with pytest.raises(UsageError, match=r"another configuration \(seed: 7 there, 8 now\)"):
        main(GenerateConfig(**{**vars(config), "seed": 8}))
    with pytest.raises(UsageError, match="--resume"):
        main(GenerateConfig(**{**vars(config), "resume": False}))


def test_errors_have_their_own_exit_code_and_are_repeated(
    l1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics with NaN make every answer unusable; with them mended, the same command repeats the episodes."""
    from experiments.robot import openvla_utils

    config = small_run(tmp_path, pretrained_checkpoint=str(l1_checkpoint), unnorm_key="libero_tiny", device="cpu")
    act = openvla_utils.OpenVLAPolicy.act
    monkeypatch.setattr(openvla_utils.OpenVLAPolicy, "act", lambda self, queries: act(self, queries) * np.nan)
    assert main(config) == EXIT_ERRORS
    results = load_episodes(tmp_path / "run")
    assert [result.status for result in results] == ["error"] * 2
    assert all(result.error == "policy answered values that are not finite numbers" for result in results)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["total"]["success_rate"] is None

    monkeypatch.setattr(openvla_utils.OpenVLAPolicy, "act", act)
    assert main(config) == 0
    assert [result.status for result in load_episodes(tmp_path / "run")] == ["failure"] * 2


def test_two_processes_of_a_launcher_share_the_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        summary = eval_libero(small_run(tmp_path, num_trials_per_task=3), NoisePolicy())
    assert summary["total"]["failures"] == 3 and summary["episodes_missing"] == 0
    files = sorted(file.name for file in (tmp_path / "run").glob("episodes*"))
    assert files == ["episodes.rank0-of-2.jsonl", "episodes.rank1-of-2.jsonl"]


def test_a_mistake_ends_the_process_with_one_line() -> None:
    command = [sys.executable, str(SCRIPT), "--pretrained_checkpoint", "/nowhere"]
    run = run_program(command)
    assert run.returncode == 2 and not run.stdout and "Traceback" not in run.stderr
    assert run.stderr.strip().splitlines()[-1].startswith("error: --pretrained_checkpoint: no such folder: '/nowhere'")
