"""The demo end to end at its smallest: simulator, training, tokens, rollouts, report, no noise; then nothing anew."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.noise import noise
from tests.helpers.programs import run_program


def _demo(repo_root: Path, out: Path) -> str:
    flags = f"--out {out} --tasks 9 --episodes 2 --max_steps 2 --batch_size 4 --trials 1 --seeds 0 --parallel 2"
    flags += " --moved_episodes 2 --moved_steps 2"
    command = [sys.executable, "-m", "experiments.reproduce.demo", *flags.split()]
    done = run_program(command, cwd=repo_root)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr == "" and noise(done.stdout) == []
    return done.stdout


@pytest.mark.sim
def test_the_demo_runs_and_does_nothing_twice(repo_root: Path, tmp_path: Path) -> None:
    printed = _demo(repo_root, tmp_path)
    report = (tmp_path / "report.md").read_text()
    said = report.splitlines()[2]
    assert said.startswith(("Alignment changed", "No difference is shown")) and said in printed.splitlines()
    assert len(json.loads((tmp_path / "readout" / "readout.json").read_text())["subjects"]) == 2
    for label in ("before fine-tuning", "without alignment", "ROCKET"):
        assert label in printed and f"| {label} |" in report
    assert (tmp_path / "report.png").stat().st_size > 20_000
    for method in ("baseline", "rocket"):
        assert (tmp_path / "runs" / f"{method}-seed0--2_chkpt" / "model.safetensors").is_file()
        (episode,) = (tmp_path / "eval" / f"{method}-seed0" / "episodes.jsonl").read_text().splitlines()
        assert json.loads(episode)["status"] in ("success", "failure")
    logs = {log.stem: noise(log.read_text()) for log in (tmp_path / "logs").glob("*.log")}
    assert len(logs) == 12 and not any(logs.values()), logs
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    again = _demo(repo_root, tmp_path)
    assert again.count("already done") == 12
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
