#!/usr/bin/env bash
# Package: transformers 5.24.0 (PI0ForConditionalGeneration).
# Expected: output_hidden_states=True returns the hidden states of the whole model, or at least those of the
#   vision-language model, which sees the pictures.
# What happens: the states are those of the action expert alone (state token and actions, the expert's width). Nothing of
#   the tokens of pictures and words is in them, and no field of the output says so.
# Why it matters here: aligning pi0's image tokens with a 3D teacher needs their states. Code that takes hidden_states[i]
#   as for other vision-language-action models runs, and aligns action tokens. Forward hooks on
#   model.vlm.language_model.layers reach the image tokens.
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
hooked = []
for layer in model.model.vlm.language_model.layers:
    layer.register_forward_hook(lambda module, args, output: hooked.append(tuple(output.shape)))
states = [tuple(state.shape) for state in model(**batch, output_hidden_states=True).hidden_states]
print(f"hooks on the vision-language model's layers: {hooked}")
print(f"seen: hidden_states: {states}")
as_recorded = states == [(1, 6, 32)] * 4 and hooked == [(1, 19, 64)] * 3
sys.exit(0 if as_recorded else 1)
PY
