#!/usr/bin/env bash
# Package: transformers 5.24.0 (Dinov2Model; others whose layers were renamed).
# Expected: the tensors that save_pretrained writes are the model's state dict, so that load_state_dict takes them back.
# What happens: they have other names (attention.attention.query instead of attention.q_proj). load_state_dict with
#   strict=False, as trainers and checkpoint tools call it, leaves every attention weight random and raises nothing.
#   from_pretrained renames while it loads.
# Why it matters here: a teacher is cut after its last aligned block, so its tensors are read one by one. Names taken
#   from model.state_dict() find only a part of them in the file.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0
"$work/venv/bin/python" - "$work/model" <<'PY'
import sys

import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
torch.manual_seed(0)
model = Dinov2Model(Dinov2Config(**sizes)).eval()
model.save_pretrained(sys.argv[1])
saved = load_file(f"{sys.argv[1]}/model.safetensors")
other = Dinov2Model(Dinov2Config(**sizes)).eval()
result = other.load_state_dict(saved, strict=False)
pixels = torch.rand(1, 3, 28, 28)
with torch.no_grad():
    difference = (model(pixels).last_hidden_state - other(pixels).last_hidden_state).abs().max().item()
    reloaded = Dinov2Model.from_pretrained(sys.argv[1]).eval()
    by_library = (model(pixels).last_hidden_state - reloaded(pixels).last_hidden_state).abs().max().item()
print(f"saved as: {[name for name in saved if 'layer.0' in name and 'query' in name]}")
print(f"wanted:   {[name for name in result.missing_keys if 'layer.0' in name and 'q_proj' in name]}")
print(f"largest difference of outputs: load_state_dict {difference:.2g}, from_pretrained {by_library:.2g}")
print(f"seen: {len(result.missing_keys)} of {len(saved)} tensors not loaded")
sys.exit(0 if len(result.missing_keys) == 16 and by_library == 0 else 1)
PY
