"""Stored features of letterboxed views: bars stay where they are, whatever the augmentation crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prismatic.policies.pi_data import LetterboxTransform
from prismatic.vla.datasets.image_transforms import FULL_IMAGE, AugmentDraw, AugmentRanges, CropBox, crop_of_view
from rocket_align.pooling import pool_teacher
from rocket_align.teacher.base import TeacherFeatures
from rocket_align.teacher.store.codec import BasisFit, StoredTeacher, StoreGeometry, encode, pool_to_grid

SIDE, PATCH = 224, 14
GRID = SIDE // PATCH
WIDE, TALL, SQUARE = (240, 320), (320, 200), (256, 256)


def teacher(view_HW3: np.ndarray) -> TeacherFeatures:
    """Mean colors of patches, and a channel of ones."""
    means = F.avg_pool2d(torch.from_numpy(view_HW3).float().permute(2, 0, 1)[None], PATCH).flatten(2).transpose(1, 2)
    return TeacherFeatures(
        (torch.cat((means, torch.ones_like(means[..., :1])), -1)[:, None],), (GRID, GRID), (SIDE, SIDE)
    )


def stored_targets(whole: TeacherFeatures, crop: CropBox) -> torch.Tensor:
    pooled = pool_to_grid(whole, (GRID, GRID))
    fit = BasisFit()
    fit.add(pooled)
    basis = fit.result(components=4)
    geometry = StoreGeometry((GRID, GRID), (GRID, GRID), (GRID, GRID), (SIDE, SIDE), SIDE)
    codes = encode(pooled, basis, torch.float16)
    stored = StoredTeacher(basis, geometry, position_embedding=False)
    return stored(codes.values_BKVPR, torch.tensor(crop)[None, None]).pooled_KBNC[0, 0]


@pytest.mark.parametrize("image_hw", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("seed", range(4))
def test_targets_of_an_augmented_view_are_those_of_the_running_teacher(image_hw: tuple[int, int], seed: int) -> None:
    """On ramps, whose patches are told by their colors, at every token that no bar touches."""
    rows, columns = (np.linspace(20, 240, n) for n in image_hw)
    ramp = (
        np.stack([*np.broadcast_arrays(rows[:, None], columns), np.full(image_hw, 90.0)], -1).round().astype(np.uint8)
    )
    transform = LetterboxTransform((SIDE, SIDE), AugmentRanges(crop_area=0.5))
    corner = CropBox((0.02, 0.27)[seed % 2], (0.27, 0.02)[seed // 2], 0.7, 0.7)
    crop = AugmentDraw(corner, 0.0, 1.0, 1.0, 0.0)  # Stored features are of the un-augmented colors.
    content = transform.content(image_hw)
    views = teacher(transform.train(ramp, crop)), teacher(transform.train(ramp, None))
    expected = pool_teacher(
        views[0].layers[0], (GRID, GRID), (SIDE, SIDE), GRID**2, mode="bilinear", position_embedding=False
    )[0]
    stored = stored_targets(views[1], crop_of_view(crop.crop, content, transform.size))
    top, left, bottom, right = content
    corners = torch.arange(GRID) * PATCH
    inside = [
        (corners >= first + PATCH) & (corners + 2 * PATCH <= last) for first, last in ((top, bottom), (left, right))
    ]
    inner = (inside[0][:, None] & inside[1]).flatten()
    assert inner.sum() > 80
    torch.testing.assert_close(stored[inner], expected[inner], atol=1.2, rtol=0)
    if image_hw != SQUARE:  # A crop of the whole view, bars included, would be another place.
        assert (stored_targets(views[1], crop.crop) - expected)[inner].abs().max() > 4


def test_what_fills_the_view_is_cropped_as_it_is() -> None:
    crop = CropBox(0.0123, 0.045, 0.95, 0.9)
    assert crop_of_view(crop, (0, 0, SIDE, SIDE), (SIDE, SIDE)) == crop
    assert crop_of_view(FULL_IMAGE, (28, 0, 196, SIDE), (SIDE, SIDE)) == FULL_IMAGE
