#!/usr/bin/env bash
# Packages: peft 0.21.2 (target_modules="all-linear") on transformers 5.24.0 (PI0ForConditionalGeneration).
# Expected: adapters on the attention and MLP layers of both transformers, each of which learns.
# What happens: (1) the projections of state, actions and time, which are new and should be trained in full, get low-rank
#   adapters and are frozen otherwise. (2) The adapters on q, o and MLP of the vision-language model's last block never get a
#   gradient: its output is thrown away, since the action expert reads keys and values alone; DistributedDataParallel
#   needs find_unused_parameters for them.
# Why it matters here: "all-linear" is the recipe of OpenVLA-OFT, and the natural flag to carry over to pi0. Whether the
#   last block learns depends on the alignment: a pair on its output gives it gradients, so arms would train other
#   parameters.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0 peft==0.21.2
"$work/venv/bin/python" - <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
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
adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
adapted(**batch).loss.backward()
tensors = {name.removeprefix("base_model.model."): value for name, value in adapted.named_parameters()}
layers = sorted({name.split(".lora_A")[0] for name in tensors if ".lora_A" in name})
heads = [name.rpartition(".")[2] for name in layers if "layers" not in name and "multi_modal" not in name]
idle = sorted({name.split(".lora_")[0] for name, value in tensors.items() if value.requires_grad and value.grad is None})
print(f"{len(layers)} adapted layers; projections of state, action and time among them: {', '.join(heads)}")
in_last_block = all(name.startswith("model.vlm.language_model.layers.2.") for name in idle)
names = ", ".join(name.rpartition(".")[2] for name in idle)
print(f"seen: {len(heads)} projections adapted; no gradient in the last of 3 blocks: {names}")
expected = {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
sys.exit(0 if len(heads) == 5 and in_last_block and {name.rpartition(".")[2] for name in idle} == expected else 1)
PY
