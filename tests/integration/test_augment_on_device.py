"""Training with images augmented on the device sees what training with the loader's augmentation sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prismatic.checkpoint.layout import read_record
from prismatic.training.metrics import read_log


def test_losses_are_those_of_the_loaders_augmentation(finetune: Callable[..., Path], tmp_path: Path) -> None:
    losses = []
    for on_device in (False, True):
        flags = {"augment_on_device": on_device, "max_steps": 2, "save_freq": 2, "wandb_log_freq": 1}
        runs = finetune(recipe="baseline", run_root_dir=tmp_path / str(on_device), **flags)
        losses.append([row["loss"] for row in read_log(runs / "run" / "metrics.jsonl")])
        assert read_record(runs / "run--2_chkpt")["augment_on_device"] is on_device
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
