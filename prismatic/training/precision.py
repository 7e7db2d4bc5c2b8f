"""Which precision a device is fast at."""

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
