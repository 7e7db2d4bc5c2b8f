"""OpenVLA with the heads of OpenVLA-OFT: discrete tokens, L1 regression or diffusion."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prismatic.checkpoint.folder import StartingPoint
from prismatic.checkpoint.load import PolicyParts, build_parts, load_for_training, load_processor, readable, skeleton
from prismatic.models.lora import ALL_LINEAR, openvla_targets
from prismatic.training.module import Coefficient, TrainableVLA
from prismatic.training.objectives import make_objective
from prismatic.util.data_utils import PaddedCollatorForActionPrediction
from prismatic.util.errors import UsageError
from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.datasets import RLDSBatchTransform
from prismatic.vla.datasets.image_transforms import AugmentRanges, PolicyImageTransform
from prismatic.vla.platforms import NormalizationType, Platform, get_platform

if TYPE_CHECKING:
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
    from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
    from prismatic.training.config import TrainConfig


class OpenVLA:
    """See :class:`prismatic.policies.base.PolicyFamily`."""

    name = "openvla"
    indexing = "openvla"
    unused_parameters = True  # The last vision block and, without logits, the LM head take no part in the loss.

    def check(self, config: TrainConfig, start: StartingPoint) -> None:
        """Refuse adapters of layers that the model does not have; :meth:`TrainConfig.validate` checks the rest."""
        if not config.image_crop:
            raise UsageError("--image_crop: False found; accepted for openvla, which rollouts crop: True")
        if config.lora_expert_rank:
            raise UsageError(f"--lora_expert_rank: {config.lora_expert_rank} found; accepted for openvla: 0")
        if config.repeated_diffusion_steps > 1:
            raise UsageError(
                f"--repeated_diffusion_steps: {config.repeated_diffusion_steps} found; accepted for openvla: 1"
            )
        if config.use_lora and config.lora_targets != ALL_LINEAR:
            openvla_targets(skeleton(start.base), config.lora_targets)

    def platform(self, config: TrainConfig, base: str) -> Platform:
        """The robot of `--platform`."""
        robot = get_platform(config.platform)
        if not isinstance(robot.normalization, NormalizationType):
            kinds = ", ".join(kind.value for kind in NormalizationType)
            raise UsageError(
                f"--platform: {robot.name} has normalization {robot.normalization.value}; accepted: {kinds}"
            )
        return robot

    def depth(self, base: str) -> int:
        """Blocks of the LLM."""
        return int(_config(base).text_config.num_hidden_layers)

    def patch_pixels(self, base: str) -> int:
        """Side of a patch of the primary featurizer."""
        backbone = str((_config(base).timm_model_ids or [""])[0])
        patch = re.search(r"patch(\d+)", backbone)
        if patch is None:
            raise UsageError(
                f"--vla_path: backbone {backbone} does not tell its patch size; accepted: timm's ..._patchN_..."
            )
        return int(patch[1])

    def load_processor(self, folder: str | Path, flag: str = "--vla_path") -> PrismaticProcessor:
        """The checkpoint's own tokenizer and image processor."""
        return load_processor(folder, flag)

    def batch_transform(self, config: TrainConfig, processor: Any, platform: Platform) -> RLDSBatchTransform:
        """Prompt and action tokens; pixels normalized for each featurizer."""
        return RLDSBatchTransform(
            ActionTokenizer(processor.tokenizer),
            processor.tokenizer,
            image_transform=processor.image_processor.apply_transform,
            use_wrist_image=config.num_images_in_input > 1,
            use_proprio=config.use_proprio,
            num_images=config.num_images_in_input,
        )

    def image_transform(self, processor: Any, *, image_aug: bool, image_crop: bool = True) -> PolicyImageTransform:
        """Lanczos resize; random crop and colors with `image_aug`."""
        height, width = processor.image_processor.input_sizes[0][-2:]
        return PolicyImageTransform((int(height), int(width)), AugmentRanges() if image_aug else None)

    def collator(self, processor: Any) -> PaddedCollatorForActionPrediction:
        """Right-padded token sequences."""
        tokenizer = processor.tokenizer
        return PaddedCollatorForActionPrediction(tokenizer.model_max_length, tokenizer.pad_token_id)

    def build(
        self,
        config: TrainConfig,
        start: StartingPoint,
        platform: Platform,
        dtype: torch.dtype,
        *,
        states: Sequence[int],
        report: Callable[[str], None],
    ) -> PolicyParts:
        """The base model with LoRA and FiLM as the flags say, and its heads."""
        return build_parts(config, start, load_for_training(config, start, platform, dtype), platform, report)

    def trainable(
        self,
        config: TrainConfig,
        parts: PolicyParts,
        platform: Platform,
        processor: Any,
        auxiliary: nn.Module,
        coeff: Coefficient,
    ) -> TrainableVLA:
        """Policy and the objective of the flags."""
        objective = make_objective(config, platform, processor.tokenizer)
        return TrainableVLA(parts, objective, auxiliary, auxiliary_coeff=coeff, use_film=config.use_film)

    def student_dim(self, parts: PolicyParts) -> int:
        """Width of the LLM."""
        return int(parts.vla.llm_dim)

    def blocks(self, parts: PolicyParts) -> nn.ModuleList:
        """Blocks of the LLM."""
        layers: nn.ModuleList = parts.vla.language_model.model.layers
        return layers

    def image_tokens(self, parts: PolicyParts) -> int:
        """Patches of a view."""
        return int(parts.vla.vision_backbone.get_num_patches())


def _config(base: str) -> OpenVLAConfig:
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig

    with readable(base, "--vla_path"):
        return OpenVLAConfig.from_pretrained(base)
