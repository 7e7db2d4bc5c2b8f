"""Bring a student's images to a teacher's input: undo the student's normalization, resize to the teacher's size.

Differs from the released code in one place: an image wider than high keeps its full height in "crop" mode, where the
released code cut with a negative start and kept a strip of 63 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

FitMode = Literal["crop", "pad"]

# ImageNet statistics: what OpenVLA's primary (DINOv2) featurizer and VGGT's patch embedding normalize with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def unnormalize_views(
    pixels_BCHW: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    channels_per_view: int = 6,
) -> Tensor:
    """Student pixels (B, V * channels_per_view, H, W) -> images (B, V, 3, H, W), [0, 1] where the input was an image.

    The first three channels of every view are the primary featurizer's; a fused backbone's further channels show the
    same picture and are dropped. Raises ValueError: a channel count that is no multiple of `channels_per_view`.
    """
    channels = pixels_BCHW.shape[1]
    if channels % channels_per_view:
        raise ValueError(f"pixel_values: found {channels} channels; accepted: a multiple of {channels_per_view}")
    views = pixels_BCHW.unflatten(1, (-1, channels_per_view)).float()
    colors = [views[:, :, color] * std[color] + mean[color] for color in range(3)]
    return torch.stack(colors, dim=2)


def _fitted_size(height: int, width: int, size: int, patch_size: int, mode: FitMode) -> tuple[int, int]:
    """Height and width after the resize: the side that `mode` fixes is `size`, the other a multiple of the patch."""
    by_width = mode == "crop" or width >= height
    fixed, other = (width, height) if by_width else (height, width)
    scaled = max(1, round(other * (size / fixed) / patch_size)) * patch_size
    return (scaled, size) if by_width else (size, scaled)


def fit_images(images_BV3HW: Tensor, size: int, *, patch_size: int = 14, mode: FitMode = "crop") -> Tensor:
    """Resize (bicubic, no antialiasing, align_corners False), then crop or pad as VGGT's loader does.

    "crop": the width becomes `size`, rows beyond `size` are cut off equally above and below.
    "pad": the longer side becomes `size`, the rest is filled with white to a square.

    Returns:
        (B, V, 3, H', W') with sides that are multiples of `patch_size`; values may overshoot as bicubic ones do.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in get_args(FitMode):
        raise ValueError(f"mode: found {mode!r}; accepted: {', '.join(get_args(FitMode))}")
    batch, views, _, height, width = images_BV3HW.shape
    fitted = _fitted_size(height, width, size, patch_size, mode)
    images = images_BV3HW.flatten(0, 1)
    if fitted != (height, width):
        images = F.interpolate(images, size=fitted, mode="bicubic", align_corners=False)
    if mode == "crop" and fitted[0] > size:
        top = (fitted[0] - size) // 2
        images = images[:, :, top : top + size]
    if mode == "pad":
        below, right = size - fitted[0], size - fitted[1]
        images = F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2), value=1.0)
    return images.unflatten(0, (batch, views))


def resize_views(images_BV3HW: Tensor, size: int) -> Tensor:
    """Resize whole views to `size` x `size` (bicubic, no antialiasing, align_corners False)."""
    if images_BV3HW.shape[-2:] == (size, size):
        return images_BV3HW
    views = F.interpolate(images_BV3HW.flatten(0, 1), size=(size, size), mode="bicubic", align_corners=False)
    return views.unflatten(0, images_BV3HW.shape[:2])


def normalize_views(images_BV3HW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixel - mean) / std of every color."""
    # Plain numbers: a constant tensor would be copied from the host in every step.
    colors = [(color - m) / s for color, m, s in zip(images_BV3HW.unbind(2), mean, std)]
    return torch.stack(colors, dim=2)


def preprocess_normed_images(
    pixels_BCHW: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    size: int = 518,
    patch_size: int = 14,
    mode: FitMode = "crop",
) -> Tensor:
    """Student pixels (B, V * 6, H, W) -> teacher images (B, V, 3, H', W'), as the released training step prepares them.

    Raises ValueError: see :func:`unnormalize_views` and :func:`fit_images`.
    """
    return fit_images(unnormalize_views(pixels_BCHW, mean, std), size, patch_size=patch_size, mode=mode)
