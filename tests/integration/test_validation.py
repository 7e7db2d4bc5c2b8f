"""Validation in real runs: what is written, and that it disturbs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prismatic.training.metrics import read_log
from prismatic.util.errors import UsageError
from prismatic.vla.datasets import RLDSDataset

HELD_OUT = {"use_val_set": True, "val_fraction": 0.4, "merge_lora_during_training": False}
DIFFUSION = {"use_l1_regression": False, "use_diffusion": True, "num_diffusion_steps_train": 3}


def _rows(runs: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, validation rows) of metrics.jsonl."""
    rows = read_log(runs / "run" / "metrics.jsonl")
    return [row for row in rows if "loss" in row], [row for row in rows if "val/loss" in row]


def test_validation_and_sampling_leave_training_as_it_is(
    finetune: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    flags = {**HELD_OUT, **DIFFUSION, "vggt_path": str(teacher_folder), "num_images_in_input": 1}
    measured, validated = _rows(finetune(run_root_dir=tmp_path / "a", val_freq=1, diffusion_sample_freq=2, **flags))
    plain, none = _rows(finetune(run_root_dir=tmp_path / "b", val_freq=100, diffusion_sample_freq=0, **flags))
    assert [row["step"] for row in validated] == [1, 2] and not none
    assert [row["loss"] for row in measured] == [row["loss"] for row in plain]
    assert "curr_action_l1_loss" in measured[0] and "curr_action_l1_loss" not in measured[1]
    assert not any("curr_action_l1_loss" in row for row in plain)
    for row in validated:
        assert row["val/num_samples"] > 0 and row["val/align_loss"] > 0 and "val/align_loss_pair_0" in row
        assert 0 < row["val/curr_action_l1_loss"] < 4 and 0 < row["val/next_actions_l1_loss"] < 4
        assert row["val/loss"] == pytest.approx(row["val/action_loss"] + 0.5 * row["val/align_loss"], rel=1e-4)


def test_any_batch_size_gives_the_same_means(finetune: Callable[..., Path], tmp_path: Path) -> None:
    flags = {**HELD_OUT, "use_l1_regression": False, "max_steps": 1, "val_freq": 1, "learning_rate": 1e-12}
    found = []
    for size in (2, 3):
        (_,), (row,) = _rows(finetune(run_root_dir=tmp_path / str(size), batch_size=size, **flags))
        found.append(row)
    assert found[0].keys() == found[1].keys() >= {"val/curr_action_accuracy", "val/next_actions_l1_loss", "val/loss"}
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-4), name


def test_held_out_episodes_are_in_no_training_sample(rlds_root: Path) -> None:
    def numbers(**options: Any) -> tuple[set[int], int]:
        name = "libero_spatial_no_noops"
        dataset = RLDSDataset(rlds_root, name, lambda frame: frame, (8, 8), seed=3, **options)
        return set(dataset.frame_numbers(name).tolist()), dataset.dataset_statistics[name]["num_transitions"]

    everything, transitions = numbers()
    (kept, of_kept), (held, of_held) = numbers(holdout=0.4), numbers(holdout=0.4, train=False)
    assert kept | held == everything and not kept & held and kept and held
    assert of_kept == of_held == transitions
    with pytest.raises(UsageError, match=r"no split 'val' \(--use_val_set needs one; --val_fraction 0.05 holds"):
        numbers(train=False)
