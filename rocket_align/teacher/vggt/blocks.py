"""Transformer blocks of VGGT: pre-norm attention with optional query/key norm and 2-D rotary positions, LayerScale.

Parameter names are those of the released checkpoints (`attn.qkv`, `attn.q_norm`, `ls1.gamma`, `mlp.fc1`, ...).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        query, key, value = self.qkv(x_BSD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim if out_dim is None else out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


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
