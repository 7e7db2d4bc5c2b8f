"""Bring teacher patches to the student's token grid.

Differs from the released code in one place: the size of the pooled grid is the student's real grid. The released code
truncates `int(side * scale)`, which is one short for, say, 37 -> 12 patches and then cannot form the loss; wherever its
size fits the token count, both give the same numbers.
"""

from __future__ import annotations

import functools
import math
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rocket_align.config import PoolingMode

# VGGT's dense-prediction head adds its position embedding with this weight.
POSITION_WEIGHT = 0.1
_OMEGA = 100.0
# A grid whose aspect ratio differs from the teacher's by more than this is not a resized version of it.
_LARGEST_ASPECT_CHANGE = 2.0


def student_grid(num_tokens: int, num_views: int, grid_hw: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the student's patches per view: the factors of the token count nearest the teacher's aspect.

    Raises ValueError: tokens that do not divide into views, or into a grid shaped like the teacher's.
    """
    per_view, rest = divmod(num_tokens, num_views)
    if rest or per_view < 1:
        raise ValueError(f"num_tokens: found {num_tokens}; accepted: a multiple of the {num_views} views")
    aspect = grid_hw[0] / grid_hw[1]
    heights = [height for height in range(1, per_view + 1) if per_view % height == 0]

    def change(height: int) -> float:
        return abs(math.log(height * height / per_view / aspect))

    height = min(heights, key=change)
    if change(height) > math.log(_LARGEST_ASPECT_CHANGE) + 1e-9:
        raise ValueError(
            f"num_tokens: found {per_view} per view, which form no grid like the teacher's {grid_hw[0]} x {grid_hw[1]}"
        )
    return height, per_view // height


@functools.lru_cache(maxsize=8)
def sine_position_embedding(
    grid_hw: tuple[int, int], image_hw: tuple[int, int], channels: int, device: torch.device
) -> Tensor:
    """Sine-cosine embedding of the patch grid, as VGGT's dense heads add it, unweighted.

    Coordinates are those of patch centers in an image whose half diagonal has length 1; the first half of the channels
    encodes x, the second y, each as sines followed by cosines.

    Returns:
        (P, channels) float32, P row-major. Shared between calls: do not change it in place.

    Raises:
        ValueError: channels that are not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"teacher channels: found {channels}; accepted: a multiple of 4 for the position embedding")
    diagonal = math.hypot(*image_hw)
    frequencies = torch.arange(channels // 4, dtype=torch.float64, device=device) / (channels // 4)
    waves = []
    for patches, pixels in zip(grid_hw, image_hw):
        edge = pixels / diagonal * (patches - 1) / patches
        centers = torch.linspace(-edge, edge, patches, dtype=torch.float64, device=device)
        angles = centers[:, None] * _OMEGA**-frequencies
        waves.append(torch.cat((angles.sin(), angles.cos()), dim=-1))
    rows, columns = waves
    height, width = grid_hw
    by_row = rows[:, None].expand(height, width, -1)
    by_column = columns[None].expand(height, width, -1)
    return torch.cat((by_column, by_row), dim=-1).flatten(0, 1).float()


def resize_patches(features_NPC: Tensor, grid_hw: tuple[int, int], target_hw: tuple[int, int]) -> Tensor:
    """Bilinear resize (corners aligned) of patches, row-major over `grid_hw`, to another grid: (N, P', C)."""
    maps = features_NPC.unflatten(1, grid_hw).permute(0, 3, 1, 2)
    return F.interpolate(maps, size=target_hw, mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)


def _resample(features_BVPC: Tensor, grid_hw: tuple[int, int], num_tokens: int) -> Tensor:
    """Every view on the student's grid."""
    batch, views = features_BVPC.shape[:2]
    target = student_grid(num_tokens, views, grid_hw)
    return resize_patches(features_BVPC.flatten(0, 1), grid_hw, target).reshape(batch, num_tokens, -1)


def _sample(features_BVPC: Tensor, num_tokens: int) -> Tensor:
    """A sorted random subset of all views' patches, another for every sample; with repeats if there are too few."""
    flat = features_BVPC.flatten(1, 2)
    batch, available, channels = flat.shape
    if num_tokens <= available:
        noise = torch.rand(batch, available, device=flat.device)
        chosen = noise.argsort(dim=1)[:, :num_tokens]
    else:
        chosen = torch.randint(0, available, (batch, num_tokens), device=flat.device)
    chosen = chosen.sort(dim=1).values
    return flat.gather(1, chosen[..., None].expand(-1, -1, channels))


def pool_teacher(
    features_BVPC: Tensor,
    grid_hw: tuple[int, int],
    image_hw: tuple[int, int],
    num_tokens: int,
    *,
    mode: PoolingMode,
    position_embedding: bool,
) -> Tensor:
    """Teacher patches -> one target per student token.

    Args:
        features_BVPC: one teacher layer, P row-major over `grid_hw`.
        grid_hw: teacher patches along height and width of a view.
        image_hw: pixels the teacher saw; decides the aspect ratio of the position embedding.
        num_tokens: the student's vision tokens over all views.
        mode: "bilinear" resizes every view to the student's grid; "random" picks patches (torch's global generator).
        position_embedding: add VGGT's sine embedding, weighted 0.1, first.

    Returns:
        (B, num_tokens, C) float32.

    Raises:
        ValueError: an unknown mode, patches that do not match `grid_hw`, tokens that form no grid.
    """
    if mode not in get_args(PoolingMode):
        raise ValueError(f"pooling: found {mode!r}; accepted: {', '.join(get_args(PoolingMode))}")
    patches, channels = features_BVPC.shape[2:]
    if patches != grid_hw[0] * grid_hw[1]:
        raise ValueError(f"teacher features: found {patches} patches; accepted: {grid_hw[0]} x {grid_hw[1]}")
    features = features_BVPC.float()
    if position_embedding:
        embedding = sine_position_embedding(tuple(grid_hw), tuple(image_hw), channels, features.device)
        features = features + POSITION_WEIGHT * embedding
    return _resample(features, grid_hw, num_tokens) if mode == "bilinear" else _sample(features, num_tokens)


def token_mask(view_mask_BV: Tensor, num_tokens: int, content_BVHW: Tensor | None = None) -> Tensor:
    """Tell which of the student's image tokens count in the loss: those of cameras that are there, and of no padding.

    Args:
        view_mask_BV: bool, False for a missing camera.
        num_tokens: the student's image tokens over all V views, view after view.
        content_BVHW: bool, False for the pixels that a letterbox added; a token counts by the pixel nearest to it, as
            in the released code.

    Returns:
        (B, num_tokens) bool, for :meth:`rocket_align.MultiLayerAlignment.align`.

    Raises:
        ValueError: tokens that do not divide into views, or into a grid like the image's.
    """
    batch, views = view_mask_BV.shape
    if num_tokens % views:
        raise ValueError(f"num_tokens: found {num_tokens}; accepted: a multiple of the {views} views")
    mask = view_mask_BV[..., None].expand(batch, views, num_tokens // views)
    if content_BVHW is not None:
        height, width = content_BVHW.shape[-2:]
        grid = student_grid(num_tokens, views, (height, width))
        mask = mask & F.interpolate(content_BVHW.float(), size=grid, mode="nearest").flatten(2).bool()
    return mask.flatten(1)


def spread_views(tokens_KBND: Tensor, view_mask_BV: Tensor) -> Tensor:
    """Tokens of the cameras that are there, one behind the other -> tokens (K, B, V * n, D) of every camera.

    For models whose sequence has no place for a missing camera (transformers' PI0). A missing camera's tokens are
    another's: leave them out by :func:`token_mask`.

    Args:
        tokens_KBND: N is n times the most cameras that any sample has.
        view_mask_BV: bool, False for a missing camera.

    Raises:
        ValueError: tokens that do not divide into the cameras.
    """
    count, most = tokens_KBND.shape[2], max(1, int(view_mask_BV.sum(dim=1).max()))
    if count % most:
        raise ValueError(f"tokens: found {count}; accepted: a multiple of the {most} cameras of the fullest sample")
    first = (view_mask_BV.cumsum(dim=1) - 1).clamp(min=0) * (count // most)
    index = first[..., None] + torch.arange(count // most, device=first.device)
    index = index.flatten(1)[None, ..., None].to(tokens_KBND.device)
    return tokens_KBND.gather(2, index.expand(len(tokens_KBND), -1, -1, tokens_KBND.shape[-1]))
