"""An evaluation spread over processes that may die: nothing runs twice, nothing is missing unnoticed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from experiments.robot.libero.results import merge as merge_results
from experiments.robot.libero.results.run_folder import load_episodes
from experiments.robot.libero.run_libero_eval import eval_libero
from experiments.robot.policy import Query
from tests.helpers.episode_results import small_run
from tests.helpers.eval_helpers import NoisePolicy
from tests.helpers.programs import run_program

pytest.importorskip("libero", reason="LIBERO is not installed")
pytestmark = pytest.mark.sim

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "robot" / "libero" / "run_libero_eval.py"


class Deadly(NoisePolicy):
    """Kills an environment process at its third question, `times` times."""

    def __init__(self, times: int) -> None:
        self.asked, self.times = 0, times
        self.others = {child.pid for child in multiprocessing.active_children()}  # Other tests' loaders.

    def act(self, queries: Sequence[Query]) -> np.ndarray:
        self.asked += 1
        if self.asked >= 3 and self.times:
            self.times -= 1
            worker = min({child.pid for child in multiprocessing.active_children() if child.pid} - self.others)
            os.kill(worker, signal.SIGKILL)
        return super().act(queries)


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    config = small_run(tmp_path, num_trials_per_task=3, max_steps=16, num_workers=2, run_name="killed")
    summary = eval_libero(config, Deadly(times=1))
    assert summary["episodes_missing"] == 0 and summary["total"]["errors"] == 0
    results = load_episodes(tmp_path / "killed")
    assert [result.init_state for result in results] == [0, 1, 2]
    assert sorted(result.attempts for result in results) == [1, 1, 2]
    assert merge_results.main([str(tmp_path / "killed")]) == 0


@pytest.fixture
def command(l1_checkpoint: Path, tmp_path: Path) -> list[str]:
    """A run of four short episodes over two processes of accelerate's launcher."""
    # --multi_gpu is what starts several processes; the script finds no GPU and uses the CPU.
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    flags = f"""--pretrained_checkpoint {l1_checkpoint} --unnorm_key libero_tiny --device cpu
        --task_suite_name libero_object
        --task_ids 2,4 --num_trials_per_task 2 --max_steps 8 --env_img_res 64 --num_workers 1
        --local_log_dir {tmp_path} --run_name run"""
    port = f"--main_process_port {20000 + os.getpid() % 20000}"
    return [sys.executable, *launcher.split(), "--dynamo_backend", "no", *port.split(), str(SCRIPT), *flags.split()]


def wait_for_lines(folder: Path, run: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 500
    while sum(file.read_bytes().count(b"\n") for file in folder.glob("episodes*.jsonl")) < count:
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_launched_run_that_is_killed_goes_on_and_is_checked(
    command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_lines(folder, run, 1)
    psutil.Process(run.pid).children()[0].kill()  # One rank; the launcher ends the other one and says so.
    run.communicate()
    assert run.returncode != 0
    before = {file.name: file.read_bytes() for file in folder.glob("episodes*.jsonl")}
    assert merge_results.main([str(folder)]) == merge_results.EXIT_INCOMPLETE
    assert "episodes missing: libero_object task" in capfd.readouterr().out

    again = run_program(command)
    assert again.returncode == 0, again.stderr
    for rank in range(2):
        file = folder / f"episodes.rank{rank}-of-2.jsonl"
        kept = before.get(file.name, b"")
        assert file.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert [(record["task_id"], record["init_state"]) for record in records] == [
            (2 + 2 * rank, 0),
            (2 + 2 * rank, 1),
        ]
    assert merge_results.main([str(folder)]) == 0
    assert len(load_episodes(folder / "merged")) == 4
