"""Tiny teachers: the recorded VGGT, and transformers' and timm's models with random weights, saved as released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rocket_align.teacher.vggt.aggregator import VGGTAggregator
from rocket_align.teacher.vggt.config import VGGTConfig, save_folder
from tests.helpers.student_helpers import beneath

DEPTH, WIDTH, REGISTERS = 4, 32, 3
_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
VIT_TEACHERS = ("dinov2", "dinov2_with_registers", "depth_anything")
VGGT = VGGTConfig(image_size=28, embed_dim=16, depth=3, num_heads=2, vit_depth=1, vit_num_heads=2)


def recorded_vggt(golden_dir: Path) -> tuple[VGGTConfig, dict[str, torch.Tensor]]:
    """Sizes and weights of the teacher that the reference was recorded with."""
    weights = beneath(load_file(golden_dir / "vggt_teacher_518.safetensors"), "weights.")
    return VGGTConfig(embed_dim=64, depth=4, num_heads=4, vit_depth=3, vit_num_heads=4), weights


def save_teacher(kind: str, folder: Path) -> Path:
    """VGGT with random weights and a tensor of a head, or one of VIT_TEACHERS."""
    if kind != "vggt":
        return save_vit(kind, folder)
    torch.manual_seed(0)
    weights = {f"aggregator.{key}": value for key, value in VGGTAggregator(VGGT).state_dict().items()}
    save_folder(folder, VGGT, {**weights, "depth_head.norm.weight": torch.ones(3)})
    return folder


def build_vit(model_type: str) -> Any:
    """A model of the released architecture, in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    model: Any
    if model_type == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**_SIZES))
    elif model_type == "dinov2_with_registers":
        config = transformers.Dinov2WithRegistersConfig(**_SIZES, num_register_tokens=REGISTERS)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        stages = [f"stage{number}" for number in range(1, DEPTH + 1)]
        backbone = transformers.Dinov2Config(**_SIZES, out_features=stages, reshape_hidden_states=False)
        config = transformers.DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=WIDTH,
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=8,
            head_hidden_size=4,
        )
        model = transformers.DepthAnythingForDepthEstimation(config)
    for name, parameter in model.named_parameters():
        # Fresh models scale every residual branch by nearly nothing or ignore their tokens.
        if "token" in name or "position" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def save_vit(model_type: str, folder: Path) -> Path:
    """The model, and the preprocessor's file of the release: DINOv2 crops, Depth Anything resizes."""
    build_vit(model_type).save_pretrained(folder)
    sizes = (
        {"size": {"height": 70, "width": 70}, "do_resize": True, "ensure_multiple_of": 14}
        if model_type == "depth_anything"
        else {"size": {"shortest_edge": 64}, "crop_size": {"height": 60, "width": 60}, "do_center_crop": True}
    )
    values = {"image_mean": list(MEAN), "image_std": list(STD), **sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def save_timm(folder: Path, architecture: str, size: int, **options: Any) -> Any:
    """A model of timm with random weights, saved as timm publishes its own."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, **options)
    images = {"input_size": (3, size, size), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    model_config = {**model.pretrained_cfg, **images}
    timm.models.save_for_hf(model.eval(), folder, model_config, options, safe_serialization=True)
    return model
