"""Tiny pi0 and pi0.5 checkpoints with random weights and a real tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from prismatic.models.pi.config import pi_config
from prismatic.models.pi.model import PiPolicy

ROOT = Path(__file__).resolve().parents[2]
_TOKENIZER = ROOT / "experiments" / "mini" / "weights" / "student"


def write_tiny_pi(folder: Path, kind: str, *, chunk: int = 4, seed: int = 0, width: int = 8) -> Path:
    """Write a policy of four blocks, 9 tokens an image, `width` action numbers, to `folder`; no weight is zero."""
    gemma = {"model_type": "gemma", "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    gemma |= {"head_dim": 8, "vocab_size": 32064}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 42, "patch_size": 14, "vision_use_head": False}
    config = pi_config(
        kind,
        vlm_config={
            "model_type": "paligemma",
            "text_config": gemma | {"hidden_size": 32, "intermediate_size": 48},
            "vision_config": vision,
            "projection_dim": 32,
            "image_token_index": 32064,
        },
        dit_config=gemma | {"hidden_size": 24, "intermediate_size": 32},
        chunk_size=chunk,
        max_action_dim=width,
        max_state_dim=width,
        num_inference_steps=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = PiPolicy(config)
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    policy.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_TOKENIZER / name, folder)
    return folder
