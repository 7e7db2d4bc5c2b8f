"""A moving average of the weights: kept as the formula says, saved for acting, resumed exactly, validated with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prismatic.training.metrics import read_log
from tests.helpers.tiny_pi import write_tiny_pi

DECAY = 0.75


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Adapters and heads of a checkpoint."""
    state = load_file(folder / "lora_adapter" / "adapter_model.safetensors")
    for file in folder.glob("*--*_checkpoint.pt"):
        state |= {f"{file.name.split('--')[0]}.{k}": v for k, v in torch.load(file, weights_only=True).items()}
    return state


@pytest.mark.parametrize("kind", ["openvla", "pi05"])
def test_checkpoints_hold_the_average_and_resume_the_weights(
    kind: str, finetune: Callable[..., Path], student_folder: Path, tmp_path: Path
) -> None:
    base = student_folder if kind == "openvla" else write_tiny_pi(tmp_path / "pi05", "pi05")
    flags: dict[str, Any] = {"vla_path": str(base), "recipe": "baseline", "merge_lora_during_training": False}
    flags |= {"save_freq": 1, "max_steps": 3, "use_val_set": True, "val_fraction": 0.5, "val_freq": 1}
    plain = finetune(run_root_dir=tmp_path / "plain", **flags)
    averaged = finetune(run_root_dir=tmp_path / "averaged", ema_decay=DECAY, **flags)
    weights = [saved(plain / f"run--{step}_chkpt") for step in (1, 2, 3)]
    averages = [saved(averaged / f"run--{step}_chkpt") for step in (1, 2, 3)]
    for name, value in averages[2].items():
        expected = torch.lerp(averages[1][name], weights[2][name], 1 - DECAY)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(value, weights[2][name]) for name, value in averages[2].items())
    # Training itself goes on with the weights: its losses are the plain run's; validation sees the average.
    logs = [read_log(folder / "run" / "metrics.jsonl") for folder in (plain, averaged)]
    assert [row["loss"] for row in logs[0] if "loss" in row] == [row["loss"] for row in logs[1] if "loss" in row]
    validated = [[row["val/loss"] for row in log if "val/loss" in row] for log in logs]
    assert validated[0] != validated[1]
    resumed = finetune(
        run_root_dir=tmp_path / "resumed", ema_decay=DECAY, resume=True,
        **{**flags, "vla_path": str(averaged / "run--2_chkpt"), "base_checkpoint": str(base)},
    )  # fmt: skip
    again = saved(resumed / "run--3_chkpt")
    assert not [name for name, value in averages[2].items() if not torch.equal(value, again[name])]
