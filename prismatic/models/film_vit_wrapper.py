"""FiLM: the instruction scales and shifts the features inside every vision block (OpenVLA-OFT+).

Parameter names are those of the released `vision_backbone--*_checkpoint.pt` files: `vision_backbone.` before the
backbone's own names, `blocks.N.block.` before those of a timm block, `blocks.N.scale` and `blocks.N.shift` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prismatic.models.lora import merge_lora_state_dict, strip_module_prefix

if TYPE_CHECKING:
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction, PrismaticVisionBackbone


class FiLMedVisionTransformerBlock(nn.Module):
    """A timm block with x * (1 + gamma) + beta between attention and MLP; gamma, beta come from the instruction.

    Zero initialization of gamma's and beta's layers would make a fresh wrapper the plain block; upstream leaves torch's
    default, so a fresh wrapper changes the features.
    """

    def __init__(self, block: nn.Module, vision_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.block = block
        self.scale = nn.Linear(llm_dim, vision_dim)
        self.shift = nn.Linear(llm_dim, vision_dim)

    def forward(self, x: torch.Tensor, language_BD: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, vision_dim) and mean language embedding (B, llm_dim) -> tokens (B, N, vision_dim)."""
        block: Any = self.block
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        x = x * (1 + self.scale(language_BD).unsqueeze(1)) + self.shift(language_BD).unsqueeze(1)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class FiLMedPrismaticVisionBackbone(nn.Module):
    """A Prismatic vision backbone whose blocks are FiLM-conditioned on the mean language embedding.

    It changes the blocks of `vision_backbone` in place and takes its place in the model.
    """

    def __init__(self, vision_backbone: PrismaticVisionBackbone, llm_dim: int = 4096) -> None:
        super().__init__()
        self.vision_backbone = vision_backbone
        self.llm_dim = llm_dim
        for featurizer in vision_backbone.featurizers:
            width = featurizer.embed_dim
            film_blocks = [FiLMedVisionTransformerBlock(block, width, llm_dim) for block in featurizer.blocks]
            featurizer.blocks = nn.Sequential(*film_blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the backbone's weights."""
        return self.vision_backbone.dtype

    def set_num_images_in_input(self, num_images_in_input: int) -> None:
        """Say how many images one sample has."""
        self.vision_backbone.set_num_images_in_input(num_images_in_input)

    def get_num_images_in_input(self) -> int:
        """Images (camera views) of one sample."""
        return self.vision_backbone.get_num_images_in_input()

    def get_num_patches(self) -> int:
        """Patches of one image."""
        return self.vision_backbone.get_num_patches()

    def forward(self, pixel_values: torch.Tensor, language_embeddings: torch.Tensor) -> torch.Tensor:
        """Images (B, c*V, H, W) and mean language embedding (B, llm_dim) -> patch features (B, V*P, C).

        A (B, S, llm_dim) tensor of language embeddings is averaged over its tokens first, as upstream does.
        """
        if language_embeddings.ndim == 3:
            language_embeddings = language_embeddings.mean(dim=1)
        return self.vision_backbone(pixel_values, language_embeddings)


def load_film_backbone(
    model: OpenVLAForActionPrediction,
    state_dict: Mapping[str, torch.Tensor],
    alpha: float | None = None,
    *,
    rank_stabilized: bool = False,
) -> None:
    """Put the FiLM vision backbone of a `vision_backbone--*_checkpoint.pt` file into `model`, in place.

    The file of a LoRA run holds base weights and adapters side by side; they are merged here with
    `alpha / rank` (upstream's alpha is min(rank, 16), the default) or as `merge_lora_state_dict` says. Raises
    ValueError when names do not fit.
    """
    if not isinstance(model.vision_backbone, FiLMedPrismaticVisionBackbone):
        old = model.vision_backbone
        film = FiLMedPrismaticVisionBackbone(old, llm_dim=model.llm_dim)
        model.vision_backbone = film.to(device=next(old.parameters()).device, dtype=old.dtype)
    weights = merge_lora_state_dict(strip_module_prefix(state_dict), alpha, rank_stabilized=rank_stabilized)
    missing, unexpected = model.vision_backbone.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"FiLM vision backbone: {len(missing)} weights missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])}); accepted: the weights of "
            f"{model.config.vision_backbone_id} with FiLM for width {model.llm_dim}"
        )
