"""What several tests of the student share: the reference model, its heads and its batch, and a model without files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.action_heads import DiffusionActionHead, L1RegressionActionHead
from prismatic.models.projectors import NoisyActionProjector, ProprioProjector

WIDTH = 64


def load_student(golden_dir: Path, num_images: int = 2) -> OpenVLAForActionPrediction:
    """The reference checkpoint in float32."""
    weights = golden_dir / "openvla_tiny" / "model.safetensors"
    vla = OpenVLAForActionPrediction.from_pretrained(weights.parent, dtype=torch.float32)
    vla.vision_backbone.set_num_images_in_input(num_images)
    return vla.eval()


def beneath(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with `prefix`, named without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def load_heads(golden_dir: Path) -> dict[str, Any]:
    """L1 head, diffusion head, proprio projector and noisy-action projector with the reference weights."""
    heads = {
        "action_head_l1": L1RegressionActionHead(WIDTH, WIDTH, 7),
        "action_head_diffusion": DiffusionActionHead(WIDTH, WIDTH, 7, num_diffusion_steps_train=10),
        "proprio_projector": ProprioProjector(WIDTH, 8),
        "noisy_action_projector": NoisyActionProjector(WIDTH),
    }
    weights = load_file(golden_dir / "heads.safetensors")
    for name, module in heads.items():
        module.load_state_dict(beneath(weights, f"{name}."))
    return heads


def forward_inputs(golden: dict[str, torch.Tensor], heads: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments of the model's forward for the reference batch; with `heads`, proprio is among them."""
    inputs: dict[str, Any] = {k: golden[k] for k in ("input_ids", "attention_mask", "pixel_values", "labels")}
    if heads is not None:
        inputs |= {"proprio": golden["proprio"], "proprio_projector": heads["proprio_projector"]}
    return inputs


def assert_gradients_close(actual: torch.Tensor | None, expected: torch.Tensor) -> None:
    """Equal within 1e-3 of the largest entry; no gradient counts as zero."""
    actual = torch.zeros_like(expected) if actual is None else actual
    scale = expected.abs().max().clamp_min(1e-12)
    assert ((actual - expected).abs().max() / scale) < 1e-3


def tiny_config(**changes: Any) -> OpenVLAConfig:
    """A configuration of the real classes at the smallest useful size; fused backbone, 28-pixel images, 4 patches."""
    fields: dict[str, Any] = {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "image_sizes": [28, 28],
        "timm_override_kwargs": [
            {"embed_dim": 16, "depth": 3, "num_heads": 2},
            {"embed_dim": 8, "depth": 3, "num_heads": 2},
        ],
        "image_resize_strategy": "resize-naive",
        "text_config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 32064,
            "pad_token_id": 32000,
        },
        "norm_stats": {"some_data": {"action": {name: [value] * 7 for name, value in (("q01", -2.0), ("q99", 3.0))}}},
    }
    return OpenVLAConfig(**{**fields, **changes})


def tiny_student(seed: int = 0, num_images: int = 1, **changes: Any) -> OpenVLAForActionPrediction:
    """A randomly initialized model of :func:`tiny_config`; LayerScale is set to 1 so that vision matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vla = OpenVLAForActionPrediction(tiny_config(**changes))
    for name, parameter in vla.named_parameters():
        if name.endswith("scale_factor"):
            torch.nn.init.ones_(parameter)
    vla.vision_backbone.set_num_images_in_input(num_images)
    return vla.eval()


def tiny_batch(
    vla: OpenVLAForActionPrediction, prompt_lengths: tuple[int, ...], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random right-padded prompts of those lengths, without action tokens, and images and proprio to go with them."""
    generator = torch.Generator().manual_seed(seed)
    batch, width = len(prompt_lengths), max(prompt_lengths)
    input_ids = torch.full((batch, width), vla.pad_token_id)
    for row, length in zip(input_ids, prompt_lengths):
        row[:length] = torch.randint(3, 1000, (length,), generator=generator)
        row[0] = 1
    backbone, size = vla.vision_backbone, vla.config.image_sizes[0]
    channels = 3 * len(vla.config.timm_model_ids) * backbone.get_num_images_in_input()
    return {
        "input_ids": input_ids,
        "attention_mask": input_ids != vla.pad_token_id,
        "pixel_values": torch.randn(batch, channels, size, size, generator=generator),
        "proprio": torch.rand(batch, 8, generator=generator) * 2 - 1,
    }
