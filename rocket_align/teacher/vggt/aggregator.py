"""VGGT's aggregator: patch tokens of several views, mixed by alternating per-view and global attention.

Blocks (pre-norm attention with optional query/key norm and 2-D rotary positions, LayerScale), the patch embedding (a
DINOv2 vision transformer with registers, or one convolution), then the aggregator built of both. Parameter names are
those of the released checkpoints (`attn.qkv`, `attn.q_norm`, `ls1.gamma`, `mlp.fc1`, ...).

Not obvious: the first view has its own camera and register tokens (index 0 of `camera_token`), all others share
index 1; a layer's feature is the concatenation of its frame-attention and its global-attention output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rocket_align.matmul import attention, linear
from rocket_align.teacher.preprocess import IMAGENET_MEAN, IMAGENET_STD
from rocket_align.teacher.vggt.config import VGGTConfig

# DINOv2 differs from VGGT's own blocks in these two.
_VIT_NORM_EPS = 1e-6
_VIT_LAYER_SCALE_INIT = 1.0


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and signed sines for a sequence, each (sequence, head_dim).

    The first half of the channels turns with the row, the second with the column; within a half, channel i and channel
    i + quarter form a plane, and the sine of the first of them is negative.
    """

    cos: Tensor
    sin: Tensor

    def repeat(self, times: int) -> RotaryTable:
        """The table for the same sequence `times` in a row."""
        return RotaryTable(self.cos.repeat(times, 1), self.sin.repeat(times, 1))


def rotary_table(
    grid_hw: tuple[int, int], num_special: int, head_dim: int, frequency: float, like: Tensor
) -> RotaryTable:
    """Angles of `num_special` position-less tokens followed by a grid of patches in row-major order.

    Special tokens stand at position 0, patches start at 1 (upstream VGGT), so that (0, 0) is nobody else's place.
    The table has the device and dtype of `like`; angles are computed in float32.
    """
    rows, columns = (torch.arange(1, size + 1, device=like.device) for size in grid_hw)
    patches = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    positions = F.pad(patches, (0, 0, num_special, 0)).float()
    exponents = torch.arange(0, head_dim // 2, 2, device=like.device).float() / (head_dim // 2)
    angles = positions[..., None] * frequency**-exponents
    cos, sin = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
    return RotaryTable(torch.stack((cos, cos), dim=2).flatten(1), torch.stack((-sin, sin), dim=2).flatten(1))


def rotate(x_BHSD: Tensor, table: RotaryTable) -> Tensor:
    """Rotate queries or keys: the first half of the channels by the row, the second by the column."""
    # Full-width products and one roll: narrow slices of the channels would be slow on CPUs.
    partners = x_BHSD.unflatten(-1, (2, -1)).roll(x_BHSD.shape[-1] // 4, dims=-1).flatten(-2)
    return torch.addcmul(x_BHSD * table.cos, partners, table.sin)


class Attention(nn.Module):
    """Multi-head self-attention over (batch, sequence, dim)."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm: nn.Module = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, table: RotaryTable | None) -> Tensor:
        qkv = linear(x_BSD, self.qkv.weight, self.qkv.bias)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        mixed = attention(query, key, value)
        return linear(mixed.transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)


class Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim if out_dim is None else out_dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(linear(x, self.fc1.weight, self.fc1.bias))
        return linear(hidden, self.fc2.weight, self.fc2.bias)


class LayerScale(nn.Module):
    """Holds the learned gain per channel of a residual branch; the block applies it."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: bool,
        layer_scale_init: float,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qk_norm=qk_norm)
        self.ls1 = LayerScale(dim, layer_scale_init)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, layer_scale_init)

    def forward(self, x_BSD: Tensor, table: RotaryTable | None = None) -> Tensor:
        # Gain and residual in one pass over the tokens.
        x_BSD = torch.addcmul(x_BSD, self.attn(self.norm1(x_BSD), table), self.ls1.gamma)
        return torch.addcmul(x_BSD, self.mlp(self.norm2(x_BSD)), self.ls2.gamma)


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
        per_view = torch.cat((special[:, :1], special[:, 1:].expand(-1, views - 1, -1, -1)), dim=1)
        return per_view.expand(batch, -1, -1, -1)

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
