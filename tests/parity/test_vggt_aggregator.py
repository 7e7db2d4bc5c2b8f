"""The VGGT aggregator against recorded reference features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rocket_align.teacher.vggt.aggregator import VGGTAggregator
from rocket_align.teacher.vggt.config import VGGTConfig
from tests.helpers.student_helpers import beneath


def load_aggregator(golden: Path, name: str, **vit: object) -> tuple[VGGTAggregator, dict[str, torch.Tensor]]:
    """The aggregator described by `name`.json with the weights of `name`.safetensors, and all recorded tensors."""
    description = json.loads((golden / f"{name}.json").read_text())
    sizes = description["config"]["aggregator"]
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_register_tokens")
    given = {name: sizes[name] for name in names} | vit
    config = VGGTConfig(image_size=description["img_size"], rope_frequency=sizes["rope_freq"], **given)
    tensors = load_file(golden / f"{name}.safetensors")
    aggregator = VGGTAggregator(config)
    aggregator.load_state_dict(beneath(tensors, "weights.aggregator."))
    return aggregator.eval(), tensors


def dino_sizes(golden: Path) -> dict[str, object]:
    vit = json.loads((golden / "vggt_aggregator.json").read_text())["config"]["dino_vit"]
    return {"vit_depth": vit["depth"], "vit_num_heads": vit["num_heads"]}


@pytest.mark.parametrize("case", ["b2s2", "b2s1", "b1s3_84x70"])
@torch.no_grad()
def test_dinov2_aggregator(golden_dir: Path, case: str) -> None:
    aggregator, tensors = load_aggregator(golden_dir, "vggt_aggregator", **dino_sizes(golden_dir))
    features = aggregator(tensors[f"in.images_{case}"], keep_special=True)
    recorded = [layer for layer in range(4) if f"{case}.features.{layer}" in tensors]
    assert recorded
    for layer in recorded:
        torch.testing.assert_close(features[layer], tensors[f"{case}.features.{layer}"], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_dinov2_patch_tokens(golden_dir: Path) -> None:
    aggregator, tensors = load_aggregator(golden_dir, "vggt_aggregator", **dino_sizes(golden_dir))
    seen: list[torch.Tensor] = []
    aggregator.patch_embed.register_forward_hook(lambda module, args, output: seen.append(output))
    aggregator(tensors["in.images_b2s2"], layers=[0])
    torch.testing.assert_close(seen[0], tensors["b2s2.dino_patchtokens"], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_conv_aggregator(golden_dir: Path) -> None:
    aggregator, tensors = load_aggregator(golden_dir, "vggt_aggregator_conv", patch_embed="conv")
    features = aggregator(tensors["in.images"], keep_special=True)
    for layer, feature in enumerate(features):
        torch.testing.assert_close(feature, tensors[f"features.{layer}"], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_requested_layers_come_in_order_without_special_tokens(golden_dir: Path) -> None:
    aggregator, tensors = load_aggregator(golden_dir, "vggt_aggregator_conv", patch_embed="conv")
    start = int(tensors["patch_start_idx"])
    for layer, feature in zip((2, 0), aggregator(tensors["in.images"], layers=(2, 0))):
        torch.testing.assert_close(feature, tensors[f"features.{layer}"][:, :, start:], atol=2e-5, rtol=1e-4)
