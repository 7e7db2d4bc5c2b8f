"""Codes of a feature store: what survives, and that the stored crop has the geometry of the augmented view."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prismatic.vla.datasets.image_transforms import AugmentRanges, CropBox, center_crop_box, resize_and_crop
from rocket_align.pooling import pool_teacher
from rocket_align.teacher.base import TeacherFeatures
from rocket_align.teacher.store import codec
from rocket_align.teacher.store.codec import Basis, BasisFit, dequantize, encode, pool_to_grid, reconstruct
from rocket_align.teacher.store.layout import StoreLayout

WHOLE = (0.0, 0.0, 1.0, 1.0)


def features(batch: int, views: int, grid: tuple[int, int], channels: int, layers: int = 2) -> TeacherFeatures:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, views, grid[0] * grid[1], channels)
    parts = tuple(torch.randn(shape, generator=generator) + 3 * index for index in range(layers))
    return TeacherFeatures(parts, grid, (grid[0] * 14, grid[1] * 14))


def read(seen: TeacherFeatures, store: int, student: int, crop: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    """Targets (K, B, N, C) by way of the store."""
    pooled = pool_to_grid(seen, (store, store))
    fit = BasisFit()
    fit.add(pooled)
    basis = fit.result(components=pooled.shape[-1])
    codes = encode(pooled, basis, dtype)
    geometry = codec.StoreGeometry((store, store), seen.grid_hw, (student, student), seen.image_hw, seen.image_hw[0])
    teacher = codec.StoredTeacher(basis, geometry, position_embedding=True)
    crops = torch.tensor(crop).expand(*pooled.shape[:1], pooled.shape[2], 4)
    return teacher(codes.values_BKVPR, crops, codes.scales_BKVP).pooled_KBNC


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize(("store", "student"), [(5, 5), (9, 5), (9, 9)])
def test_without_a_crop_the_targets_are_the_online_ones(dtype: torch.dtype, store: int, student: int) -> None:
    # Pooling 9 -> 5 reads every second token, so that a store of 5 or of all 9 loses nothing.
    seen = features(2, 2, (9, 9), 8)
    sizes = seen.grid_hw, seen.image_hw, 2 * student**2
    pooled = (pool_teacher(layer, *sizes, mode="bilinear", position_embedding=True) for layer in seen.layers)
    online = torch.stack(list(pooled))
    stored = read(seen, store, student, WHOLE, dtype)
    torch.testing.assert_close(stored, online, atol=0.02 if dtype == torch.int8 else 0.003, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_the_crop_is_that_of_the_augmentation(seed: int) -> None:
    """A teacher whose features are the mean color of a patch, on pictures that are ramps: both ways must agree."""
    side, patch = 224, 14
    grid = side // patch
    crop = AugmentRanges().draw(np.random.default_rng(seed)).crop if seed else center_crop_box()
    rows, columns = np.mgrid[0:side, 0:side].astype(np.uint8)
    ramp = np.stack([rows, columns, np.full_like(rows, 100)], axis=-1)

    def teacher(box: CropBox) -> TeacherFeatures:
        planar = torch.from_numpy(resize_and_crop(ramp, (side, side), box))
        means = F.avg_pool2d(planar[None], patch).flatten(2).transpose(1, 2)[:, None]
        channels = torch.cat((means, means[..., :1]), dim=-1)
        return TeacherFeatures((channels,), (grid, grid), (side, side))

    whole, cropped = teacher(CropBox(*WHOLE)), teacher(crop)
    expected = pool_teacher(cropped.layers[0], (grid, grid), (side, side), 64, mode="bilinear", position_embedding=True)
    stored = read(whole, 10, 8, tuple(crop), torch.float16)[0]
    # Tokens at the border may look at most half a patch's shrinking past the outermost stored one.
    torch.testing.assert_close(stored, expected, atol=0.6, rtol=0)
    inner = torch.arange(64).unflatten(0, (8, 8))[1:-1, 1:-1].flatten()
    torch.testing.assert_close(stored[:, inner], expected[:, inner], atol=0.1, rtol=0)
    assert (expected - read(whole, 10, 8, WHOLE, torch.float16)[0]).abs().max() > 3


def test_directions_keep_what_has_few_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(4, 1, 2, 9, 3, generator=generator) @ torch.randn(3, 32, generator=generator) + 5
    fit = BasisFit()
    for part in low.split(2):
        fit.add(part)
    basis = fit.result(components=3)
    assert basis.directions_KCR is not None and basis.directions_KCR.shape == (1, 32, 3)
    codes = encode(low, basis, torch.int8)
    assert codes.values_BKVPR.shape == (4, 1, 2, 9, 3)
    restored = reconstruct(dequantize(codes), basis)
    assert F.cosine_similarity(restored, low, dim=-1).min() > 0.9999
    fewer = fit.result(components=1)
    lost = reconstruct(dequantize(encode(low, fewer, torch.int8)), fewer)
    assert F.cosine_similarity(lost, low, dim=-1).mean() < F.cosine_similarity(restored, low, dim=-1).mean()


def test_values_that_cannot_be_stored_are_refused() -> None:
    basis = Basis(torch.zeros(1, 4), None)
    with pytest.raises(ValueError, match="too large; accepted: int8"):
        encode(torch.full((1, 1, 1, 1, 4), 1e6), basis, torch.float16)
    with pytest.raises(ValueError, match="not finite"):
        encode(torch.full((1, 1, 1, 1, 4), float("nan")), basis, torch.int8)
    with pytest.raises(ValueError, match="at least one frame"):
        BasisFit().result(4)


def test_bytes_of_a_frame_at_the_real_size() -> None:
    layout = StoreLayout(
        teacher_kind="vggt", teacher_hash="", teacher_depth=24, layers=tuple(range(10)), channels=2048, components=384,
        dtype="int8", views=("primary", "wrist"), view_pixels=224,
        teacher_image_hw=(518, 518), teacher_grid_hw=(37, 37), grid_hw=(20, 20),
    )  # fmt: skip
    assert layout.frame_bytes == 10 * 800 * (384 + 4) + 80
    assert layout.frame_bytes < 4_000_000
