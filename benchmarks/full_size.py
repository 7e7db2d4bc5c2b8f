"""OpenVLA-7B and VGGT-1B at their real sizes, for benchmarks: configurations, a batch, and the module a step trains.

Shared by `full_size_step.py`, which runs a step for real, and `budget.py`, which computes what a step needs. Depths can
be cut (`Sizes`) to try a benchmark in a minute; the widths stay those of the real models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.training.config import TrainConfig
from prismatic.training.module import TrainableVLA
from prismatic.training.objectives import L1Objective, PolicyParts
from prismatic.vla.constants import IGNORE_INDEX, STOP_INDEX
from prismatic.vla.platforms import LIBERO
from rocket_align import AlignConfig, MultiLayerAlignment
from rocket_align.config import RECIPES
from rocket_align.teacher.preprocess import unnormalize_views
from rocket_align.teacher.vggt.config import VGGTConfig

# Llama-2-7B's sizes are transformers' defaults; its vocabulary is padded to 32,064, as in openvla/openvla-7b.
LLAMA_2_7B: dict[str, Any] = {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000}
CHANNELS_PER_VIEW = 6
_FIRST_ACTION_TOKEN = 31744


@dataclass(frozen=True)
class Sizes:
    """Depths of the models; None is the real one. `teacher_blocks` counts VGGT's ViT blocks and its layers alike."""

    llm_blocks: int = 32
    vision_blocks: int | None = None
    teacher_blocks: int = 24
    narrow: bool = False  # Widths of a few dozens, to try a script

    def student(self) -> OpenVLAConfig:
        """OpenVLA-7B's configuration."""
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4} if self.narrow else {}
        cut: dict[str, Any] = {} if self.vision_blocks is None else {"depth": self.vision_blocks}
        return OpenVLAConfig(
            vision_backbone_id="dinosiglip-vit-so-224px",
            llm_backbone_id="llama2-7b-pure",
            arch_specifier="no-align+fused-gelu-mlp",
            image_resize_strategy="resize-naive",
            text_config={**LLAMA_2_7B, **narrow, "num_hidden_layers": self.llm_blocks},
            timm_override_kwargs=[dict(cut), dict(cut)],
        )

    def teacher(self) -> VGGTConfig:
        """VGGT-1B's configuration."""
        narrow: dict[str, Any] = {"embed_dim": 32, "num_heads": 2, "vit_num_heads": 2, "image_size": 84}
        return VGGTConfig(depth=self.teacher_blocks, vit_depth=self.teacher_blocks, **(narrow if self.narrow else {}))

    def alignment(self, recipe: str = "rocket") -> AlignConfig:
        """The recipe's alignment: for the real depths ten pairs, 2, 4, ..., 18, -1 of both models."""
        return RECIPES[recipe](self.llm_blocks, self.teacher_blocks)


def make_batch(batch_size: int, views: int = 2, prompt_tokens: int = 40, image_size: int = 224) -> dict[str, Any]:
    """Random inputs of a LIBERO batch, see `prismatic.vla.batch`: prompts of `prompt_tokens`, no padding.

    `prompt_tokens` counts BOS and the empty token; LIBERO's instructions come to 25 to 45.
    """
    actions = LIBERO.num_action_tokens
    length = prompt_tokens + actions + 1
    input_ids = torch.full((batch_size, length), 500)
    input_ids[:, 0] = 1
    input_ids[:, prompt_tokens:-1] = _FIRST_ACTION_TOKEN + 100
    input_ids[:, -1] = STOP_INDEX
    labels = input_ids.clone()
    labels[:, :prompt_tokens] = IGNORE_INDEX
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids, dtype=torch.bool),
        "labels": labels,
        "pixel_values": torch.randn(batch_size, CHANNELS_PER_VIEW * views, image_size, image_size).clamp(-2, 2),
        "proprio": torch.rand(batch_size, LIBERO.proprio_dim) * 2 - 1,
        "actions": torch.rand(batch_size, LIBERO.chunk, LIBERO.action_dim) * 2 - 1,
    }


def build_module(parts: PolicyParts, align: AlignConfig, teacher_dim: int) -> TrainableVLA:
    """Build what training wraps: policy, heads and alignment, with the L1 objective."""
    alignment = MultiLayerAlignment(align, parts.vla.llm_dim, teacher_dim)
    return TrainableVLA(parts, L1Objective(LIBERO), alignment, auxiliary_coeff=align.coeff)


def teacher_targets(teacher: nn.Module) -> Callable[[dict[str, Any]], Any]:
    """From a batch to the teacher's features of its images, as `finetune.py` computes them."""
    return lambda batch: teacher(unnormalize_views(batch["pixel_values"], channels_per_view=CHANNELS_PER_VIEW))


def training_config(batch_size: int, *, gradient_checkpointing: bool, lora_rank: int = 32) -> TrainConfig:
    """The flags of the ROCKET run in the README that a step depends on."""
    return TrainConfig(
        num_images_in_input=2,
        use_proprio=True,
        use_l1_regression=True,
        batch_size=batch_size,
        lora_rank=lora_rank,
        gradient_checkpointing=gradient_checkpointing,
        mixed_precision="bf16",
    )
