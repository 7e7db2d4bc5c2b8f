"""Which precision a device is fast at, and the types that follow from it."""

from __future__ import annotations

import torch


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
