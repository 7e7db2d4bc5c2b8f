"""What sharded runs keep and record of their policy: its moving average, and its answer to the probe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismatic.checkpoint.layout import load_training_state
from prismatic.checkpoint.probe import Probe
from prismatic.training.metrics import read_log
from tests.helpers.launch import FLAGS, policy_tensors
from tests.helpers.tiny_pi import write_tiny_pi

DECAY = 0.75


def trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights that a resume goes on with, by name."""
    state = load_training_state(checkpoint)
    assert state is not None
    return state["unaveraged"]


def validated(runs: Path) -> list[float]:
    return [row["val/loss"] for row in read_log(runs / "run" / "metrics.jsonl") if "val/loss" in row]


def test_a_sharded_run_averages_as_one_process_and_goes_on_from_it(
    launch: Callable[..., None], finetune: Callable[..., Path], tmp_path: Path
) -> None:
    """Validated with and saved at every step, which lets the model have the average for a while; resumed by one and
    by four processes."""
    flags: dict[str, Any] = {"recipe": "baseline", "max_steps": 3, "save_freq": 1, "use_val_set": True}
    flags |= {"val_fraction": 0.5, "val_freq": 1, "ema_decay": DECAY}
    single, sharded, plain = tmp_path / "single", tmp_path / "sharded", tmp_path / "plain"
    finetune(**FLAGS | flags, run_root_dir=single, batch_size=4)
    launch(
        2,
        flags | {"run_root_dir": sharded, "shard": "fsdp"},
        flags | {"run_root_dir": plain, "shard": "fsdp", "ema_decay": 0.0},
    )
    losses = [
        [row["loss"] for row in read_log(runs / "run" / "metrics.jsonl") if "loss" in row] for runs in (sharded, plain)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3  # Training goes on with the weights.
    assert validated(sharded) == pytest.approx(validated(single), rel=1e-6) and validated(sharded) != validated(plain)
    for step in (1, 2, 3):
        folders = [runs / f"run--{step}_chkpt" for runs in (sharded, single)]
        for get in (policy_tensors, trained):
            got, expected = map(get, folders)
            assert got.keys() == expected.keys()
            assert max(float((got[name] - value).abs().max()) for name, value in expected.items()) <= 1e-6, step
        weights, averages = trained(folders[0]), policy_tensors(folders[0])
        head = next(name for name in weights if name.startswith("action_head.") and name.endswith("fc2.weight"))
        kept = next(value for name, value in averages.items() if name.endswith(head.removeprefix("action_head.")))
        assert (weights[head] - kept).abs().max() > (5e-6 if step > 1 else 1e-6)  # They are apart.
    goes_on = flags | {"resume": True, "vla_path": sharded / "run--2_chkpt"}
    finetune(**FLAGS | goes_on, run_root_dir=tmp_path / "one", batch_size=4)
    launch(4, goes_on | {"run_root_dir": tmp_path / "four", "shard": "fsdp", "batch_size": 1})
    expected = policy_tensors(sharded / "run--3_chkpt")
    for runs in (tmp_path / "one", tmp_path / "four"):
        got = policy_tensors(runs / "run--3_chkpt")
        assert max(float((got[name] - value).abs().max()) for name, value in expected.items()) <= 1e-6, runs.name


@pytest.mark.parametrize("kind", ["openvla", "diffusion", "pi05"])
def test_a_sharded_run_records_what_its_policy_answers(kind: str, launch: Callable[..., None], tmp_path: Path) -> None:
    """As a replicated one does; the next step is none the wiser."""
    flags: dict[str, Any] = {"recipe": "baseline", "save_freq": 1, "ema_decay": DECAY, "batch_size": 1}
    if kind == "diffusion":
        flags |= {"use_l1_regression": False, "use_diffusion": True, "num_diffusion_steps_train": 3}
    elif kind == "pi05":
        flags |= {"vla_path": str(write_tiny_pi(tmp_path / "pi05", kind)), "use_lora": False}
    launch(2, *(flags | {"run_root_dir": tmp_path / shard, "shard": shard} for shard in ("none", "fsdp")))
    for step in (1, 2):
        folders = [tmp_path / shard / f"run--{step}_chkpt" for shard in ("fsdp", "none")]
        got, expected = map(Probe.read, folders)
        assert (got.precision, got.dataset) == (expected.precision, expected.dataset)
        np.testing.assert_allclose(got.actions, expected.actions, rtol=1e-4, atol=1e-5)
        tensors, others = map(policy_tensors, folders)
        assert max(float((tensors[name] - value).abs().max()) for name, value in others.items()) <= 1e-6


def test_a_process_that_cannot_answer_ends_the_run_or_leaves_the_probe_out(
    launch: Callable[..., None], tmp_path: Path
) -> None:
    """And never leaves the others waiting."""
    flags: dict[str, Any] = {"recipe": "baseline", "save_freq": 1, "batch_size": 1, "shard": "fsdp", "max_steps": 2}
    with pytest.raises(AssertionError, match="MemoryError: no room in process 1"):
        launch(2, flags | {"run_root_dir": tmp_path}, worker="failing_probe_worker.py")
    assert load_training_state(tmp_path / "run--1_chkpt") is not None
    assert not list(tmp_path.glob("run--1_chkpt/*probe*")) and not (tmp_path / "run--2_chkpt").exists()
