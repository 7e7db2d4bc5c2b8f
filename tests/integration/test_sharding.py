"""Processes over gloo train as one process does, replicated (DDP) or sharded (FSDP2), and go on from each other's
checkpoints."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prismatic.checkpoint.layout import OPTIMIZER_SHARDS, load_training_state
from prismatic.training.engine import moments_by_name, read_shards
from prismatic.training.metrics import PACE, read_log
from tests.helpers.launch import ACCELERATE, FLAGS, policy_tensors
from tests.helpers.tiny_pi import write_tiny_pi


def _moments(checkpoint: Path) -> list[torch.Tensor]:
    """The optimizer's first moments in its order: after one step a tenth of the gradients."""
    saved = load_training_state(checkpoint)
    assert saved is not None
    if saved["optimizer"] is not None:
        return [saved["optimizer"]["state"][index]["exp_avg"] for index in sorted(saved["optimizer"]["state"])]
    folder = checkpoint / OPTIMIZER_SHARDS
    sizes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for key, value in load_file(file).items():
            if key.endswith(".exp_avg"):
                before = sizes.get(key.removesuffix(".exp_avg"), [0, *value.shape[1:]])
                sizes[key.removesuffix(".exp_avg")] = [before[0] + len(value), *value.shape[1:]]
    moments = read_shards(folder, {name: torch.empty(size) for name, size in sizes.items()})
    return [moments[name]["exp_avg"] for name in saved["trained"] if name in moments]


def _assert_equal(actual: Path, expected: Path, steps: int) -> None:
    """Losses and parameters of every step, gradients of the first: within 1e-6."""
    rows, wanted = (read_log(folder / "run" / "metrics.jsonl") for folder in (actual, expected))
    assert [row["step"] for row in rows] == [row["step"] for row in wanted] and len(rows) >= steps
    for row, other in zip(rows, wanted):
        for name in other.keys() - set(PACE):
            assert row[name] == pytest.approx(other[name], rel=1e-6, abs=1e-6), name
    for step in (1, steps):
        got, want = (policy_tensors(folder / f"run--{step}_chkpt") for folder in (actual, expected))
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert (got[name] - value).abs().max() <= 1e-6, (step, name)
    gradients, others = (_moments(folder / "run--1_chkpt") for folder in (actual, expected))
    assert len(gradients) == len(others) > 50
    for gradient, other in zip(gradients, others):
        assert gradient.shape == other.shape and (gradient - other).abs().max() <= 1e-6


def test_two_processes_train_as_one(
    launch: Callable[..., None], finetune: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    """Replicated and sharded, with LoRA and without, in accumulated batches or a whole one."""
    lora = {"recipe": "rocket", "max_steps": 3, "save_freq": 1}
    full = {"recipe": "naive", "use_lora": False, "use_l1_regression": False, "max_steps": 2, "save_freq": 1}
    halves = {"batch_size": 1, "grad_accumulation_steps": 2}
    teacher = {"vggt_path": str(teacher_folder)}
    finetune(**FLAGS, **lora, **teacher, run_root_dir=tmp_path / "one", batch_size=4)
    finetune(**FLAGS, **full, **teacher, run_root_dir=tmp_path / "one_full", batch_size=2)
    launch(
        2,
        lora | halves | {"run_root_dir": tmp_path / "ddp", "shard": "none"},
        lora | halves | {"run_root_dir": tmp_path / "fsdp", "shard": "fsdp", "gradient_checkpointing": True},
        full | {"run_root_dir": tmp_path / "fsdp_full", "shard": "fsdp", "batch_size": 1, "shard_teacher": True},
    )
    _assert_equal(tmp_path / "ddp", tmp_path / "one", 3)
    _assert_equal(tmp_path / "fsdp", tmp_path / "one", 3)
    _assert_equal(tmp_path / "fsdp_full", tmp_path / "one_full", 2)


def test_pi05_trains_in_two_processes_as_in_one(
    launch: Callable[..., None], finetune: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    """Adapters and what trains beside them, replicated or sharded; all of the policy, sharded."""
    base = {"vla_path": str(write_tiny_pi(tmp_path / "pi05", "pi05")), "recipe": "rocket", "save_freq": 1}
    lora, full = base | {"max_steps": 2}, base | {"max_steps": 2, "use_lora": False, "repeated_diffusion_steps": 2}
    teacher = {"vggt_path": str(teacher_folder)}
    for name, flags in (("one", lora), ("one_full", full)):
        finetune(**FLAGS, **flags, **teacher, run_root_dir=tmp_path / name, batch_size=2)
    halves = {"batch_size": 1}
    launch(
        2,
        lora | halves | {"run_root_dir": tmp_path / "ddp", "shard": "none"},
        lora | halves | {"run_root_dir": tmp_path / "fsdp", "shard": "fsdp", "gradient_checkpointing": True},
        full | halves | {"run_root_dir": tmp_path / "fsdp_full", "shard": "fsdp"},
    )
    for name in ("ddp", "fsdp"):
        _assert_equal(tmp_path / name, tmp_path / "one", 2)
    _assert_equal(tmp_path / "fsdp_full", tmp_path / "one_full", 2)


def test_a_sharded_run_goes_on_with_another_number_of_processes(
    launch: Callable[..., None], finetune: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    """Two processes exactly, one and four (started by accelerate) within rounding."""
    flags = {"recipe": "shared", "max_steps": 2, "save_freq": 1, "batch_size": 2}
    straight, halfway = tmp_path / "straight", tmp_path / "straight" / "run--1_chkpt"
    goes_on = {"resume": True, "vla_path": halfway}
    launch(
        2,
        flags | {"run_root_dir": straight, "shard": "fsdp"},
        flags | goes_on | {"run_root_dir": tmp_path / "two", "shard": "fsdp"},
    )
    four = {"run_root_dir": tmp_path / "four", "batch_size": 1}
    launch(4, flags | goes_on | four, launcher=ACCELERATE)
    one: dict[str, Any] = {"run_root_dir": tmp_path / "one", "vggt_path": str(teacher_folder)}
    finetune(**FLAGS, **flags | goes_on | one | {"batch_size": 4})
    expected = policy_tensors(straight / "run--2_chkpt")
    for folder, tolerance in (("two", 0.0), ("four", 1e-6), ("one", 1e-6)):
        actual = policy_tensors(tmp_path / folder / "run--2_chkpt")
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert (actual[name] - value).abs().max() <= tolerance, (folder, name)
    assert (tmp_path / "four" / "run--2_chkpt" / OPTIMIZER_SHARDS).is_dir()


def test_sharding_changes_no_random_number(launch: Callable[..., None], tmp_path: Path) -> None:
    """FiLM, diffusion, dropout and validation, begun with shards or gone on with them."""
    flags = {"recipe": "baseline", "use_l1_regression": False, "use_diffusion": True, "lora_dropout": 0.5}
    flags |= {"use_film": True, "num_diffusion_steps_train": 3, "diffusion_sample_freq": 1, "max_steps": 2}
    flags |= {"use_val_set": True, "val_fraction": 0.7, "val_freq": 2, "save_freq": 1, "batch_size": 2}
    replicated = tmp_path / "replicated"
    launch(
        2,
        flags | {"run_root_dir": replicated, "shard": "none"},
        flags | {"run_root_dir": tmp_path / "sharded", "shard": "fsdp"},
        flags
        | {"run_root_dir": tmp_path / "resumed", "shard": "fsdp", "resume": True}
        | {"vla_path": replicated / "run--1_chkpt"},
    )
    other, want = read_log(replicated / "run" / "metrics.jsonl")[-1], policy_tensors(replicated / "run--2_chkpt")
    assert other["val/num_samples"] > 0
    for folder in ("sharded", "resumed"):
        last = read_log(tmp_path / folder / "run" / "metrics.jsonl")[-1]
        assert last["val/num_samples"] == other["val/num_samples"]
        assert last["val/action_loss"] == pytest.approx(other["val/action_loss"], rel=1e-6)
        got = policy_tensors(tmp_path / folder / "run--2_chkpt")
        assert all((got[name] - value).abs().max() <= 1e-6 for name, value in want.items())


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")
def test_zero_trains_as_ddp_and_goes_on_from_other_engines(launch: Callable[..., None], tmp_path: Path) -> None:
    """Stage 2; stage 3 begun by stage 2; FSDP begun by stage 3. What takes no part in the loss decays a little."""
    flags = {"recipe": "rocket", "max_steps": 2, "save_freq": 1, "batch_size": 1, "grad_accumulation_steps": 2}
    flags |= {"merge_lora_during_training": True}
    zero2, zero3 = tmp_path / "zero2", tmp_path / "zero3"
    launch(
        2,
        flags | {"run_root_dir": tmp_path / "ddp", "shard": "none"},
        flags | {"run_root_dir": zero2, "shard": "zero2"},
        flags | {"run_root_dir": zero3, "shard": "zero3"},
        *(
            flags | {"run_root_dir": tmp_path / f"{shard} goes on", "shard": shard, "resume": True, "vla_path": begun}
            for shard, begun in (("zero3", zero2 / "run--1_chkpt"), ("fsdp", zero3 / "run--1_chkpt"))
        ),
    )
    rows, want = read_log(tmp_path / "ddp" / "run" / "metrics.jsonl"), policy_tensors(tmp_path / "ddp" / "run--2_chkpt")
    for folder in (zero2, zero3, tmp_path / "zero3 goes on", tmp_path / "fsdp goes on"):
        actual = read_log(folder / "run" / "metrics.jsonl")
        for row, other in zip(actual, rows[-len(actual) :]):
            assert all(row[name] == pytest.approx(other[name], rel=1e-5) for name in other.keys() - {"seconds"})
        got = policy_tensors(folder / "run--2_chkpt")
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert (got[name] - value).abs().max() <= 1e-5, (folder.name, name)


def test_a_state_of_other_parameters_is_refused() -> None:
    parameters = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(value.clone()) for value in parameters.values()])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = moments_by_name(optimizer.state_dict(), parameters)
    assert list(moments) == ["a", "b"] and moments["b"]["exp_avg"].shape == (4,)
    for others in ({"a": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2), "b": torch.zeros(4)}):
        with pytest.raises(ValueError, match=r"parameters, but|of another shape"):
            moments_by_name(optimizer.state_dict(), others)
