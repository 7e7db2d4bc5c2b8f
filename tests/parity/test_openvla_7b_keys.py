"""The full-size OpenVLA-7B, built on the meta device: names, shapes and counts of the real checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.action_heads import DiffusionActionHead, L1RegressionActionHead
from prismatic.models.film_vit_wrapper import FiLMedPrismaticVisionBackbone
from prismatic.models.lora import add_lora
from prismatic.models.projectors import NoisyActionProjector, ProprioProjector


@pytest.fixture(scope="module")
def real(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "openvla7b_real_keys.json").read_text())


@pytest.fixture
def vla(real: dict[str, Any]) -> OpenVLAForActionPrediction:
    names = {"vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "llama2-7b-pure"}
    names |= {"arch_specifier": "no-align+fused-gelu-mlp", "image_resize_strategy": "resize-naive"}
    config = OpenVLAConfig(**names, text_config=dict(real["text_config"]))
    with torch.device("meta"):
        return OpenVLAForActionPrediction(config)


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def test_weights(vla: OpenVLAForActionPrediction, real: dict[str, Any]) -> None:
    assert shapes(vla) == {name: shape for name, (shape, _) in real["keys"].items()}
    assert len(vla.state_dict()) == 982
    assert vla.num_parameters() == real["total_params"] == 7_541_237_184
    assert vla.vision_backbone.get_num_patches() == real["num_patches"]
    assert vla.vision_backbone.embed_dim == real["vision_embed_dim"]


def test_lora(vla: OpenVLAForActionPrediction, real: dict[str, Any]) -> None:
    expected = real["lora"]
    with torch.device("meta"):
        peft_model = add_lora(vla, rank=expected["rank"])
    trainable = {n: list(p.shape) for n, p in peft_model.named_parameters() if p.requires_grad}
    assert trainable == expected["trainable_param_shapes"]
    names = sorted(n for n, m in vla.named_modules() if hasattr(m, "lora_A"))
    assert names == sorted(expected["modules"])
    scalings = {m.scaling["default"] for m in vla.modules() if hasattr(m, "lora_A")}
    assert scalings == {expected["scaling"]}
    assert len(names) == 439
    assert sum(p.numel() for p in peft_model.parameters() if p.requires_grad) == expected["trainable"] == 110_828_288


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("action_head_l1", L1RegressionActionHead),
        ("action_head_diffusion", DiffusionActionHead),
        ("proprio_projector", lambda: ProprioProjector(4096, 8)),
        ("noisy_action_projector", lambda: NoisyActionProjector(4096)),
    ],
)
def test_heads(name: str, build: Any, real: dict[str, Any]) -> None:
    expected = real["aux"][name]
    with torch.device("meta"):
        module = build()
    assert shapes(module) == {key: shape for key, (shape, _) in expected["keys"].items()}
    assert sum(p.numel() for p in module.parameters()) == expected["params"]


def test_film(vla: OpenVLAForActionPrediction, real: dict[str, Any]) -> None:
    with torch.device("meta"):
        film = FiLMedPrismaticVisionBackbone(vla.vision_backbone, llm_dim=4096)
    # The record holds the first names only.
    assert list(film.state_dict())[: len(real["film"]["keys"])] == real["film"]["keys"]
    assert sum(p.numel() for p in film.parameters()) == real["film"]["after"]
