"""Which precision a device is fast at."""

from __future__ import annotations

import torch


def resolve_precision(flag: str) -> str:
    """accelerate's `mixed_precision` for the flag: "auto" takes bf16 where the hardware multiplies it natively."""
    if flag != "auto":
        return flag
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"
