"""Fine-tuning with centered targets, weighted pairs and a scheduled coefficient: recorded, logged and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prismatic.training.metrics import read_log
from prismatic.util.errors import UsageError


def _projectors(runs: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(runs / f"run--{step}_chkpt" / f"align_projectors--{step}_checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("center", ["dataset", "task"])
def test_a_resumed_run_keeps_the_means(
    center: str, finetune: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {
        "vggt_path": str(teacher_folder),
        "merge_lora_during_training": False,
        "align_center": center,
        "align_center_samples": 40,
        "align_pair_weights": "1,1,1,1,4",
        "align_schedule": "0:1,3:0.5",
    }
    straight = finetune(run_root_dir=tmp_path / "a", max_steps=3, save_freq=1, **flags)
    halfway = {**flags, "vla_path": str(straight / "run--1_chkpt"), "resume": True}
    resumed = finetune(run_root_dir=tmp_path / "b", max_steps=3, **halfway)
    expected, actual = _projectors(straight, 3), _projectors(resumed, 3)
    assert expected.keys() == actual.keys() and "center_means" in actual
    assert all(torch.equal(value, actual[key]) for key, value in expected.items())
    assert torch.equal(actual["center_means"], _projectors(straight, 1)["center_means"])
    record = json.loads((resumed / "run--3_chkpt" / "run_config.json").read_text())["alignment"]
    assert (record["center"], record["schedule"]) == (center, [[0, 1.0], [3, 0.5]])
    assert record["pair_weights"] == [1, 1, 1, 1, 4]
    for number, row in enumerate(read_log(straight / "run" / "metrics.jsonl")):
        pairs = [row[f"align_loss_pair_{pair}"] for pair in range(5)]
        assert row["align_loss"] == pytest.approx((sum(pairs) + 3 * pairs[-1]) / 8, abs=1e-4)
        factor = 1 - 0.5 * number / 3
        assert row["loss"] == pytest.approx(row["action_loss"] + 0.5 * factor * row["align_loss"], abs=1e-4)
    with pytest.raises(UsageError, match="the alignment's center is none, but"):
        finetune(**{**halfway, "align_center": "none"})


def test_a_coefficient_of_zero_leaves_the_alignment_out(finetune: Callable[..., Path], teacher_folder: Path) -> None:
    runs = finetune(
        vggt_path=str(teacher_folder), merge_lora_during_training=False, align_schedule="0:0,1:0,2:1", max_steps=3
    )
    rows = read_log(runs / "run" / "metrics.jsonl")
    assert ["align_loss" in row for row in rows] == [False, False, True]
    assert rows[0]["loss"] == rows[0]["action_loss"]
