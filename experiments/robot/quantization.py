"""8-bit and 4-bit weights through bitsandbytes, on NVIDIA GPUs."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from experiments.robot.checkpoint import Checkpoint
from prismatic.util.errors import UsageError


def check_quantization(cfg: Any, device: torch.device) -> str:
    """The flag that asks for 8- or 4-bit weights, or "" without one.

    Raises:
        UsageError: both are given, or this machine cannot do it.
    """
    flags = [flag for flag in ("load_in_8bit", "load_in_4bit") if getattr(cfg, flag, False)]
    if not flags:
        return ""
    if len(flags) > 1:
        raise UsageError("--load_in_8bit, --load_in_4bit: both are True; accepted: one of them")
    if device.type != "cuda":
        raise UsageError(f"--{flags[0]}: needs an NVIDIA GPU, found device {device}; accepted here: False")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"--{flags[0]}: needs the package bitsandbytes: pip install 'rocket-vla[quant]'")
    return flags[0]


def quantization_arguments(cfg: Any, device: torch.device, checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of `from_pretrained` for 8- or 4-bit weights; none without the flags."""
    flag = check_quantization(cfg, device)
    if not flag:
        return {}
    if checkpoint.adapter_path is not None:
        raise UsageError(
            f"--{flag}: {checkpoint.path} holds only an adapter, which cannot be added to quantized weights; "
            "accepted: a merged checkpoint (vla-scripts/merge_lora_weights_and_save.py)"
        )
    from transformers import BitsAndBytesConfig

    # FiLM checkpoints bring their own vision weights, which are loaded over the model's.
    plain = ["lm_head", "vision_backbone"] if cfg.use_film else None
    settings = BitsAndBytesConfig(
        load_in_8bit=flag == "load_in_8bit",
        load_in_4bit=flag == "load_in_4bit",
        llm_int8_skip_modules=plain,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": settings, "device_map": {"": device}}
