"""VGGT's aggregator: patch tokens of several views, mixed by alternating per-view and global attention.

Not obvious: the first view has its own camera and register tokens (index 0 of `camera_token`), all others share
index 1; a layer's feature is the concatenation of its frame-attention and its global-attention output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rocket_align.teacher.preprocess import IMAGENET_MEAN, IMAGENET_STD
from rocket_align.teacher.vggt.blocks import Block, rotary_table
from rocket_align.teacher.vggt.config import VGGTConfig
from rocket_align.teacher.vggt.patch_embed import ConvPatchEmbed, DinoV2PatchEmbed


class VGGTAggregator(nn.Module):
    """Trainable aggregator with the released parameter names.

    Args:
        config: sizes.
        num_layers: build only the first so many of `config.depth` layers (all when None).
    """

    def __init__(self, config: VGGTConfig, num_layers: int | None = None) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.patch_embed: DinoV2PatchEmbed | ConvPatchEmbed
        if config.patch_embed == "dinov2":
            self.patch_embed = DinoV2PatchEmbed(config)
            self.patch_embed.reset_parameters()
        else:
            self.patch_embed = ConvPatchEmbed(dim, config.patch_size)
        depth = config.depth if num_layers is None else num_layers
        self.frame_blocks = nn.ModuleList(self._block() for _ in range(depth))
        self.global_blocks = nn.ModuleList(self._block() for _ in range(depth))
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, dim) * 1e-6)
        self.register_token = nn.Parameter(torch.randn(1, 2, config.num_register_tokens, dim) * 1e-6)

    def _block(self) -> Block:
        config = self.config
        return Block(
            config.embed_dim,
            config.num_heads,
            config.mlp_ratio,
            qk_norm=True,
            layer_scale_init=config.layer_scale_init,
        )

    def _special_tokens(self, batch: int, views: int) -> Tensor:
        """Camera and register tokens of every view: (B, V, 1 + registers, C)."""
        special = torch.cat((self.camera_token, self.register_token), dim=2)
        of_views = torch.cat((special[:, :1], special[:, 1:].expand(-1, views - 1, -1, -1)), dim=1)
        return of_views.expand(batch, -1, -1, -1)

    def embed(self, images_BV3HW: Tensor) -> Tensor:
        """Images in [0, 1] -> special and patch tokens (B, V, 1 + registers + P, C), before any alternating layer."""
        batch, views = images_BV3HW.shape[:2]
        # Plain numbers per channel: a constant tensor would be copied from the host in every step.
        colors = zip(images_BV3HW.unbind(2), IMAGENET_MEAN, IMAGENET_STD)
        normalized = torch.stack([(color - mean) / std for color, mean, std in colors], dim=2)
        pixels = normalized.to(self.camera_token.dtype).flatten(0, 1)
        patches = self.patch_embed(pixels).unflatten(0, (batch, views))
        return torch.cat((self._special_tokens(batch, views), patches), dim=2)

    def forward(
        self, images_BV3HW: Tensor, layers: Sequence[int] | None = None, *, keep_special: bool = False
    ) -> tuple[Tensor, ...]:
        """Features of the requested layers; later layers are not run.

        Args:
            images_BV3HW: values in [0, 1], sides multiples of the patch size.
            layers: 0-based layers, in the order wanted (all when None).
            keep_special: keep the camera and register tokens before the patches.

        Returns:
            One (B, V, P, 2C) tensor per requested layer, P in row-major order.

        Raises:
            ValueError: image sides that are not multiples of the patch size, or a layer that is not built.
        """
        height, width = images_BV3HW.shape[-2:]
        patch, built = self.config.patch_size, len(self.frame_blocks)
        if height % patch or width % patch:
            raise ValueError(f"images: found {height} x {width} pixels; accepted: sides that are multiples of {patch}")
        wanted = tuple(range(built) if layers is None else layers)
        if any(not 0 <= layer < built for layer in wanted):
            raise ValueError(f"layers: found {wanted}; accepted: 0 to {built - 1}")
        tokens = self.embed(images_BV3HW)
        batch, views = tokens.shape[:2]
        special = self.config.num_special_tokens
        head_dim = self.config.embed_dim // self.config.num_heads
        grid = (height // patch, width // patch)
        in_frame = rotary_table(grid, special, head_dim, self.config.rope_frequency, tokens)
        across = in_frame.repeat(views)
        first = 0 if keep_special else special
        kept: dict[int, Tensor] = {}
        for index in range(max(wanted, default=-1) + 1):
            frame = self.frame_blocks[index](tokens.flatten(0, 1), in_frame).unflatten(0, (batch, views))
            tokens = self.global_blocks[index](frame.flatten(1, 2), across).unflatten(1, (views, -1))
            if index in wanted:
                kept[index] = torch.cat((frame[:, :, first:], tokens[:, :, first:]), dim=-1)
        return tuple(kept[index] for index in wanted)
