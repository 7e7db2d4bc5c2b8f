"""What goes wrong in weeks of training ends in one line, with the last checkpoint as it was."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from prismatic.checkpoint.newest import damage, newest_checkpoint
from prismatic.training.config import TrainConfig
from prismatic.training.metrics import read_log
from prismatic.training.run import TrainingRun
from prismatic.util.errors import UsageError
from tests.helpers.full_disk import no_file_above
from tests.helpers.training import training_flags

FLAGS: dict[str, Any] = {"recipe": "baseline", "merge_lora_during_training": False, "save_freq": 1}


# The optimizer's archive, a head's, the adapter, a file of Python's.
@pytest.mark.parametrize("size", [1_500_000, 300_000, 60_000, 2_000])
def test_a_full_disk_ends_the_run_in_one_line(size: int, finetune: Callable[..., Path], tmp_path: Path) -> None:
    runs = finetune(**FLAGS, max_steps=1)
    last = runs / "run--1_chkpt"
    with no_file_above(size), pytest.raises(UsageError, match=r"cannot be written to .* GB is left") as refusal:
        finetune(**FLAGS, max_steps=2, resume=True)
    assert "accepted: a folder with room" in str(refusal.value)
    assert damage(last) is None and not (runs / "run--2_chkpt").exists()
    assert not [path for path in runs.iterdir() if path.name.endswith(".tmp")]
    finetune(**FLAGS, max_steps=2, resume=True)
    assert damage(runs / "run--2_chkpt") is None


def test_lost_data_name_step_file_and_the_checkpoint_stays(finetune: Callable[..., Path], rlds_root: Path) -> None:
    runs = finetune(**FLAGS, max_steps=1)
    for file in rlds_root.rglob("*.tfrecord*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 50])
    with pytest.raises(UsageError) as refusal:
        finetune(**FLAGS, max_steps=40, resume=True)
    assert "tfrecord" in str(refusal.value)
    assert damage(runs / "run--1_chkpt") is None


@pytest.mark.parametrize("workers", [0, 1])
def test_data_lost_while_training_name_step_and_file_and_the_checkpoint_stays(
    workers: int, student_folder: Path, rlds_root: Path, tmp_path: Path
) -> None:
    flags = training_flags(student_folder, rlds_root, tmp_path) | {"max_steps": 500, "save_freq": 1}
    config = TrainConfig(**flags | {"num_workers": workers, "lora_rank": 2})
    config.validate()
    AcceleratorState._reset_state(reset_partial_state=True)

    def lose(_: Any) -> float:
        if (tmp_path / "run--1_chkpt").is_dir():
            for file in rlds_root.rglob("*.tfrecord*"):
                os.truncate(file, 1000)
        return 1.0

    with pytest.raises(UsageError, match=r"^step \d+: .*tfrecord.*; the last checkpoint is kept$"):
        TrainingRun(config, asdict(config)).fit(GivenLoss(), 1.0, lose)
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None and damage(newest) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_at_the_start(finetune: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o555)
    with pytest.raises(UsageError, match=r"--run_root_dir: .* is not writable"):
        finetune(**FLAGS)


def test_a_folder_that_takes_no_file_is_refused_at_the_start(finetune: Callable[..., Path]) -> None:
    """Whatever permissions say, as of a network's disk where root is nobody."""
    with pytest.raises(UsageError, match=r"--run_root_dir: /proc is not writable \(.*\); accepted: a folder that is"):
        finetune(**FLAGS, run_root_dir=Path("/proc"))


def test_a_folder_that_turns_read_only_ends_the_run_in_one_line(
    finetune: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk with errors is mounted anew: the second checkpoint's folder cannot be made."""
    make = Path.mkdir

    def refuse(folder: Path, *arguments: Any, **options: Any) -> None:
        if ".run--2_chkpt." in str(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))
        make(folder, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match=r"^checkpoint of step 2: cannot be written to .*Read-only file system"):
        finetune(**FLAGS, max_steps=2)
    monkeypatch.undo()
    runs = finetune(**FLAGS, max_steps=2, resume=True)
    assert damage(runs / "run--1_chkpt") is None and damage(runs / "run--2_chkpt") is None


class GivenLoss(torch.nn.Module):
    """An auxiliary loss that is what its target says."""

    def forward(self, hidden_states: tuple[torch.Tensor, ...], teacher: float, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(loss=0 * hidden_states[0].mean() + teacher, per_pair=[])


def test_spikes_are_left_out_also_after_a_resume(
    student_folder: Path, rlds_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usual loss is the median of the steps before, which a checkpoint keeps."""
    flags: dict[str, Any] = {"vla_path": str(student_folder), "data_root_dir": rlds_root, "run_root_dir": tmp_path}
    flags |= {"run_id_override": "run", "trackers": "none", "lora_rank": 2, "batch_size": 1, "num_workers": 0}
    flags |= {"merge_lora_during_training": False, "mixed_precision": "no", "wandb_log_freq": 1, "skip_spikes": 5.0}

    def train(losses: list[float], **more: Any) -> None:
        config = TrainConfig(**flags, max_steps=22, save_freq=20, **more)
        config.validate()
        AcceleratorState._reset_state(reset_partial_state=True)
        targets = iter(losses)
        TrainingRun(config, asdict(config)).fit(GivenLoss(), 1.0, lambda batch: next(targets))

    train([50.0] * 2 + [1.0] * 18 + [60.0, 1.0])
    said = capsys.readouterr().err
    assert said.count("left out") == 1 and "step 21: loss 6" in said and "above 5 times the median" in said
    rows = {row["step"]: row for row in read_log(tmp_path / "run" / "metrics.jsonl")}
    assert "loss" in rows[2] and "loss" not in rows[21] and "loss" in rows[22]
    shutil.rmtree(tmp_path / "run--22_chkpt")
    train([60.0, 1.0], resume=True)
    assert capsys.readouterr().err.count("step 21: loss 6") == 1
