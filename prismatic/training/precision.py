"""The processes of a launch, the precision that their devices are fast at, and the types that follow from it."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator

from prismatic.util.errors import UsageError


def make_accelerator(mixed_precision: str, **options: Any) -> Accelerator:
    """accelerate's engine for the processes that torchrun or accelerate launch started, on GPUs or (by gloo) CPUs.

    By itself accelerate takes torchrun's processes on a machine without a GPU for so many runs of one process.

    Args:
        mixed_precision: the flag, see :func:`resolve_precision`.
        options: further arguments of accelerate's.

    Raises:
        UsageError: more processes than GPUs, or other processes than the launcher was asked for.
    """
    launched = _check_launch()
    use_cpu = launched > 1 and not torch.accelerator.device_count()
    accelerator = Accelerator(cpu=use_cpu, mixed_precision=resolve_precision(mixed_precision), **options)
    if accelerator.num_processes != launched:
        raise UsageError(
            f"the launcher: WORLD_SIZE={launched} found, but {accelerator.num_processes} of its processes can be "
            "reached; accepted: torchrun or accelerate launch, which also set RANK, LOCAL_RANK and MASTER_ADDR"
        )
    return accelerator


def _check_launch() -> int:
    """Processes of this launch on all machines."""
    environment, devices = os.environ, torch.accelerator.device_count()
    launched, here = (int(environment.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if 0 < devices < here and environment.get("ACCELERATE_USE_CPU", "").lower() not in ("true", "1", "yes"):
        raise UsageError(
            f"the launcher: {here} processes on a machine with {devices} GPUs; accepted: one process a GPU"
        )
    # Asked for several without GPUs or --multi_gpu, accelerate launch says where they would meet and starts one.
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment and "WORLD_SIZE" not in environment
    if by_accelerate and (environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")) == ("127.0.0.1", "29500"):
        raise UsageError(
            "accelerate launch: one process started for --num_processes above 1; accepted: --multi_gpu, which "
            "starts them without a GPU too, or torchrun (for one process: no MASTER_ADDR in the environment)"
        )
    return launched


def resolve_precision(flag: str) -> str:
    """accelerate's `mixed_precision` for the flag: "auto" is bf16 on GPUs that multiply it natively, else none.

    On CPUs bf16 matrix products can be faster, but torch's bf16 attention is slower there; for small models the whole
    step is not faster.
    """
    if flag != "auto":
        return flag
    native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "no"


def base_weights_dtype(arithmetic: torch.dtype, device: torch.device, *, frozen: bool) -> torch.dtype:
    """Type of the base model's weights: the arithmetic's where they are frozen, float32 where they train.

    They must not be narrower than the arithmetic, since the heads, whose weights are float32, take the model's states
    as they come. On CPUs they are float32 also for bf16 arithmetic.
    """
    return arithmetic if frozen and device.type != "cpu" else torch.float32
