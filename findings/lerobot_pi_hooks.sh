#!/usr/bin/env bash
# Package: lerobot 0.6.1 (PI0Pytorch and PI05Pytorch, the models of the policies pi0 and pi05).
# Expected: a forward hook on a layer of the vision-language model is called at every forward pass, in training as well.
# What happens: in training it is never called, in acting it is. Training runs a function that takes a layer's parts (norm,
#   projections, MLP) and leaves the layer itself out, to let the action expert attend to the same keys; acting fills a
#   cache and calls the layers. Nothing is raised: the hook has simply seen nothing.
# Why it matters here: hooks on the layers are how one aligns hidden states without changing a model. A loss that is
#   summed over what they saw is zero for the whole training, and a check of the hooks while acting passes. What works is a
#   hook before each layer's input_layernorm.
# Seen on 2026-11-29. Both models have their full size, on torch's meta device: shapes without memory. LeRobot 0.6 needs
#   Python 3.12 or newer; PYTHON names one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "lerobot[dataset,pi]==0.6.1" torch==2.11.0 transformers==5.5.4
cat > "$work/hooks.py" <<'PY'
import sys

import torch
from lerobot.policies.pi0 import PI0Config
from lerobot.policies.pi0.modeling_pi0 import PI0Pytorch
from lerobot.policies.pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch

seen = {}
for kind, config in ((PI0Pytorch, PI0Config), (PI05Pytorch, PI05Config)):
    with torch.device("meta"):
        model = kind(config(device="cpu"))
        layers = model.paligemma_with_expert.paligemma.model.language_model.layers
        calls = {"layer": 0, "input_layernorm": 0}

        def count(part):
            def hook(*arguments):
                calls[part] += 1

            return hook

        for layer in layers:
            layer.register_forward_hook(count("layer"))
            layer.input_layernorm.register_forward_pre_hook(count("input_layernorm"))
        images, image_masks = [torch.zeros(1, 3, 224, 224)], [torch.ones(1, dtype=torch.bool)]
        tokens, token_masks = torch.zeros(1, 48, dtype=torch.long), torch.ones(1, 48, dtype=torch.bool)
        state = [torch.zeros(1, 32)] if kind is PI0Pytorch else []  # pi0.5 reads it in the prompt
        actions, noise = torch.zeros(1, 50, 32), torch.zeros(1, 50, 32)
        model.train()
        model(images, image_masks, tokens, token_masks, *state, actions, noise, torch.zeros(1))
        training = dict(calls)
        calls.update(layer=0, input_layernorm=0)
        model.eval()
        with torch.no_grad():
            model.sample_actions(images, image_masks, tokens, token_masks, *state, noise=noise)
        acting = dict(calls)
    print(f"{kind.__name__}, {len(layers)} layers: calls of hooks in training {training}, in acting {acting}")
    seen[kind.__name__] = (training["layer"], training["input_layernorm"], acting["layer"])
summary = ", ".join(f"{name} {training} in training and {acting} in acting" for name, (training, _, acting) in seen.items())
print(f"seen: calls of the hooks on 18 layers: {summary}")
sys.exit(0 if set(seen.values()) == {(0, 18, 18)} else 1)
PY
HF_HUB_OFFLINE=1 HOME=$work "$work/venv/bin/python" "$work/hooks.py" 2> "$work/errors" || { tail -20 "$work/errors"; exit 1; }
