"""How VGGT turns pixels into patch tokens: a DINOv2 vision transformer with registers, or one convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rocket_align.teacher.vggt.blocks import Block
from rocket_align.teacher.vggt.config import VGGTConfig

# DINOv2 differs from VGGT's own blocks in these two.
_VIT_NORM_EPS = 1e-6
_VIT_LAYER_SCALE_INIT = 1.0


class ConvPatchEmbed(nn.Module):
    """One strided convolution: images (B, 3, H, W) -> tokens (B, H/p * W/p, dim)."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.proj(images_B3HW).flatten(2).transpose(1, 2)


class DinoV2PatchEmbed(nn.Module):
    """DINOv2 with registers: images (B, 3, H, W) -> normalized patch tokens (B, H/p * W/p, dim).

    `mask_token` takes no part in the forward pass; checkpoints carry it.
    """

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.patch_size, self.grid_size = config.patch_size, config.grid_size
        self.num_register_tokens = config.vit_num_register_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size**2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, self.num_register_tokens, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = ConvPatchEmbed(dim, config.patch_size)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.vit_num_heads,
                config.vit_mlp_ratio,
                qk_norm=False,
                layer_scale_init=_VIT_LAYER_SCALE_INIT,
                norm_eps=_VIT_NORM_EPS,
            )
            for _ in range(config.vit_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=_VIT_NORM_EPS)

    def reset_parameters(self) -> None:
        """Initialize the free tokens (upstream: nearly zero, positions with deviation 0.02)."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.num_register_tokens:
            nn.init.normal_(self.register_tokens, std=1e-6)

    def _positions(self, grid_hw: tuple[int, int]) -> Tensor:
        """Position embedding of the class token and a grid; another size is resampled (bicubic, antialiased)."""
        if grid_hw == (self.grid_size, self.grid_size):
            return self.pos_embed
        table = self.pos_embed.float()
        native = table[:, 1:].unflatten(1, (self.grid_size, self.grid_size)).permute(0, 3, 1, 2)
        resampled = F.interpolate(native, size=grid_hw, mode="bicubic", antialias=True)
        return torch.cat((table[:, :1], resampled.flatten(2).transpose(1, 2)), dim=1).to(self.pos_embed.dtype)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        batch, _, height, width = images_B3HW.shape
        patches = self.patch_embed(images_B3HW)
        tokens = torch.cat((self.cls_token.expand(batch, -1, -1), patches), dim=1)
        tokens = tokens + self._positions((height // self.patch_size, width // self.patch_size))
        registers = self.register_tokens.expand(batch, -1, -1)
        tokens = torch.cat((tokens[:, :1], registers, tokens[:, 1:]), dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 1 + self.num_register_tokens :])
