"""Launchers: the script trains on two gloo processes, or says in one line what to change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prismatic.training.metrics import read_log
from prismatic.training.precision import make_accelerator
from prismatic.util.errors import UsageError
from prismatic.vla.datasets import RLDSDataset
from tests.helpers.programs import run_program

LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc_per_node 2",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2",
    "accelerate without --multi_gpu": "accelerate.commands.launch --num_processes 2",
}


def _launch(repo_root: Path, arguments: list[str], launcher: str = "torchrun") -> subprocess.CompletedProcess[str]:
    """Run a Python file in two processes on the CPU, which no variable asks for."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split(), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")} | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(repo_root),
    }
    return run_program(command, cwd=repo_root, env=environment)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_script_trains_on_two_processes(
    launcher: str, repo_root: Path, student_folder: Path, teacher_folder: Path, rlds_root: Path, tmp_path: Path
) -> None:
    """Or says in one line that the launcher started one."""
    flags = f"""--vla_path {student_folder} --vggt_path {teacher_folder} --data_root_dir {rlds_root}
        --run_root_dir {tmp_path} --run_id_override run --num_images_in_input 2 --use_proprio True --batch_size 2
        --max_steps 2 --num_workers 0
        --lora_rank 4 --trackers none --merge_lora_during_training False --wandb_log_freq 1
        --use_val_set True --val_fraction 0.7 --val_freq 2"""
    done = _launch(repo_root, ["vla-scripts/finetune.py", *flags.split()], launcher)
    if "without" in launcher:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode and len(errors) == 1 and "accepted: --multi_gpu" in errors[0]
        return
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 2]
    name, size = "libero_spatial_no_noops", (8, 8)
    held_out = RLDSDataset(rlds_root, name, lambda frame: frame, size, seed=42, holdout=0.7, train=False)
    assert rows[2]["val/num_samples"] == len(held_out) and rows[2]["val/action_loss"] > 0
    assert (tmp_path / "run--2_chkpt" / "align_projectors--2_checkpoint.pt").is_file()
    first, second = torch.load(tmp_path / "run--2_chkpt" / "training_state" / "state.pt")["random"]
    assert not torch.equal(first["torch"], second["torch"])  # else noise and dropout would be the same on both


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 processes on a machine with 1 GPUs; accepted: one process a GPU"):
        make_accelerator("no")
