#!/usr/bin/env bash
# Package: transformers 5.24.0 (PI0ForConditionalGeneration).
# Expected: gradient_checkpointing_enable() (activation_checkpointing_enable() by its new name) trades time for memory, or
#   the model says that it does not support it: supports_gradient_checkpointing is True.
# What happens: the first training step ends in AttributeError: 'NoneType' object has no attribute 'get_seq_length'.
#   Checkpointing turns the cache off, and the action expert reads the vision-language model through that cache. On
#   the vision tower alone it works.
# Why it matters here: full fine-tuning of pi0 with alignment does not fit one GPU without it.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import PI0Config, PI0ForConditionalGeneration

text = {
    "model_type": "gemma",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 100,
}
vision = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}
vlm = {"model_type": "paligemma", "text_config": text, "vision_config": vision, "projection_dim": 64}
config = PI0Config(
    vlm_config={**vlm, "image_token_index": 100},
    dit_config={**text, "hidden_size": 32, "intermediate_size": 64},
    chunk_size=5,
    max_state_dim=6,
    max_action_dim=6,
)
torch.manual_seed(0)
model = PI0ForConditionalGeneration(config).train()
ids = torch.tensor([[100] * 16 + [5, 6, 7]])  # 16 image tokens, then words
batch = {
    "state": torch.randn(1, 6),
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "pixel_values": torch.randn(1, 1, 3, 56, 56),
    "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    "actions": torch.randn(1, 5, 6),
    "noise": torch.randn(1, 5, 6),
    "timestep": torch.tensor([0.5]),
}
supported = model.supports_gradient_checkpointing
plain = float(model(**batch).loss)
model.model.vlm.vision_tower.activation_checkpointing_enable()
tower = float(model(**batch).loss)
print(f"loss {plain:.6f}, with checkpointing of the vision tower {tower:.6f}")
model.activation_checkpointing_enable()
try:
    model(**batch).loss.backward()
    ending = "a loss and gradients"
except AttributeError as error:
    ending = f"AttributeError: {error}"
print(f"seen: supports_gradient_checkpointing {supported}; in training: {ending}")
as_recorded = ending == "AttributeError: 'NoneType' object has no attribute 'get_seq_length'"
sys.exit(0 if supported and as_recorded and abs(plain - tower) < 1e-6 else 1)
PY
