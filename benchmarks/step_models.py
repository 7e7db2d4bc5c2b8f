"""Models and a batch for step.py, the same in every process: sizes here, numbers drawn from the tensors' names.

Only what the present build and an earlier one both have is imported, so that both can be measured.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parents[1] / "experiments" / "mini" / "weights"
_PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """A step to measure: samples, and whether the teacher runs or its stored features are read."""

    models: str
    batch_size: int
    stored: bool = False
    aligned: bool = True


CASES = {
    "mini": Case("mini", 32),
    "mini, stored features": Case("mini", 32, stored=True),
    "mini, no alignment": Case("mini", 32, aligned=False),
    "mid": Case("mid", 2),
    "mid, stored features": Case("mid", 2, stored=True),
    "mid, no alignment": Case("mid", 2, aligned=False),
}


def fill(module: nn.Module, scale: float = 1.0) -> None:
    """Set every parameter to numbers that depend on its name and shape alone."""
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.copy_(scale * noise / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.02 * noise)
            else:
                parameter.copy_(1 + 0.05 * noise)


def fill_adapters(vla: nn.Module) -> None:
    """Fill the trainable tensors alone, so that both halves of every adapter matter."""
    for name, parameter in vla.named_parameters():
        if parameter.requires_grad:
            holder = nn.Module()
            holder.register_parameter(name.replace(".", "_"), parameter)
            fill(holder, scale=0.3)


def mid_student_config() -> Any:
    """An OpenVLA at a sixteenth of the widths and a quarter of the depth, with its real 224-pixel images."""
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig

    return OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px",
        image_sizes=[224, 224],
        timm_override_kwargs=[
            {"embed_dim": 128, "depth": 6, "num_heads": 2},
            {"embed_dim": 96, "depth": 6, "num_heads": 2},
        ],
        image_resize_strategy="resize-naive",
        text_config={
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 32064,
            "pad_token_id": 32000,
        },
    )


def make_student(models: str) -> Any:
    """The base model without adapters, in float32, two views."""
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction

    if models == "mini":
        config = OpenVLAConfig.from_pretrained(WEIGHTS / "student")
        vla = OpenVLAForActionPrediction.from_pretrained(WEIGHTS / "student", config=config, dtype=torch.float32)
    else:
        vla = OpenVLAForActionPrediction(mid_student_config())
        fill(vla)
    vla.vision_backbone.set_num_images_in_input(2)
    return vla


def make_heads(width: int) -> tuple[nn.Module, nn.Module]:
    """An L1 action head and a proprio projector for a language model of that width."""
    from prismatic.models.action_heads import L1RegressionActionHead
    from prismatic.models.projectors import ProprioProjector

    heads = L1RegressionActionHead(width, width, 7), ProprioProjector(width, 8)
    for head in heads:
        fill(head)
    return heads


def teacher_depth(models: str) -> int:
    """Blocks of the teacher."""
    return 6 if models == "mini" else 8


def make_teacher(models: str, layers: Any) -> Any:
    """The frozen VGGT, cut after the last of `layers`: the mini's 84-pixel one, or one of 518 pixels."""
    from rocket_align.teacher.vggt.config import VGGTConfig
    from rocket_align.teacher.vggt.teacher import VGGTTeacher

    if models == "mini":
        return VGGTTeacher.from_pretrained(WEIGHTS / "teacher", layers)
    config = VGGTConfig(embed_dim=256, depth=8, num_heads=4, vit_depth=6, vit_num_heads=4)
    teacher = VGGTTeacher(config, layers)
    fill(teacher)
    return teacher


def make_batch(vla: Any, batch_size: int) -> dict[str, Tensor]:
    """Images, prompts of the mini data's length, 56 action tokens and stop; the same for every build."""
    generator = torch.Generator().manual_seed(7)
    side = vla.config.image_sizes[0]
    coarse = torch.randn(batch_size, 12, side // 7, side // 7, generator=generator)
    pixels = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    prompt = torch.randint(3, 1000, (batch_size, _PROMPT_TOKENS), generator=generator)
    prompt[:, 0] = 1
    actions = 2 * torch.rand(batch_size, 8, 7, generator=generator) - 1
    ids = (31743 + 128 * (1 - actions)).round().long().clamp(31744, 31999).flatten(1)
    input_ids = torch.cat([prompt, ids, torch.full((batch_size, 1), 2)], dim=1)
    attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
    labels = input_ids.masked_fill(torch.arange(input_ids.shape[1]) < _PROMPT_TOKENS, -100)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "pixel_values": pixels,
        "proprio": torch.rand(batch_size, 8, generator=generator) * 2 - 1,
        "actions": actions,
    }
