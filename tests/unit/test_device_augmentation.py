"""Batches augmented on the device are those of the per-image path within one gray level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.loader import open_dataset, write_data
from prismatic.training.module import move_batch
from prismatic.util.errors import UsageError
from prismatic.vla.datasets import FrameDraw, RLDSDataset
from prismatic.vla.datasets.device_augmentation import DeferredSample, defer
from prismatic.vla.datasets.image_transforms import PolicyImageTransform

NAME = "libero_spatial_no_noops"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def per_image(tmp_path_factory: pytest.TempPathFactory) -> tuple[RLDSDataset, Any]:
    root = tmp_path_factory.mktemp("data")
    write_data(root, 100, 256)
    return open_dataset(root, NAME)


def deferring(dataset: RLDSDataset) -> RLDSDataset:
    """The same data, augmented on the device."""
    processor = dataset.batch_transform.image_transform.__self__  # type: ignore[attr-defined]
    twin = object.__new__(RLDSDataset)
    twin.__dict__ |= dataset.__dict__
    twin.batch_transform, twin.image_transform = defer(dataset.batch_transform, dataset.image_transform, processor)
    return twin


def gray_levels(pixels: torch.Tensor, processor: Any) -> torch.Tensor:
    means, stds = (torch.tensor(v).flatten().repeat(2)[:, None, None] for v in (processor.means, processor.stds))
    return 255 * (pixels * stds + means)


def test_pixels_are_those_of_the_per_image_path_within_one_gray_level(per_image: tuple[RLDSDataset, Any]) -> None:
    dataset, collate = per_image
    draws = [FrameDraw(frame, epoch) for frame, epoch in ((3, 0), (3, 1), (40, 0), (77, 5))]
    expected = collate([dataset[draw] for draw in draws])
    twin = deferring(dataset)
    batch = move_batch(collate([twin[draw] for draw in draws]), CPU)
    assert batch.keys() == expected.keys()
    assert batch["pixel_values"].shape == expected["pixel_values"].shape
    processor = dataset.batch_transform.image_transform.__self__  # type: ignore[attr-defined]
    levels = [gray_levels(b["pixel_values"], processor) for b in (batch, expected)]
    difference = (levels[0] - levels[1]).abs()
    assert difference.max() < 1.01
    # Rounding puts few values on the other side of a gray level.
    assert (difference > 0.5).float().mean() < 0.01
    # Draws of two epochs differ, so that the comparison is one of augmented images.
    assert (levels[0][0] - levels[0][1]).abs().mean() > 2


def test_images_of_several_sizes_and_a_missing_camera_make_one_batch(per_image: tuple[RLDSDataset, Any]) -> None:
    dataset, _ = per_image
    twin = deferring(dataset)
    sample = twin[5]["deferred"]
    small = sample._replace(images=[image[::2, ::2].contiguous() for image in sample.images])
    together = DeferredSample.collate([sample, small]).render(CPU)
    assert torch.equal(together[:1], DeferredSample.collate([sample]).render(CPU))
    frame = twin.frame(5)
    frame["views"] = {**frame["views"], "wrist": None}
    frame["observation"]["image_wrist"] = np.zeros((1, 224, 224, 3), np.uint8)
    black = DeferredSample.collate([twin.batch_transform(frame)["deferred"]]).render(CPU)
    processor = dataset.batch_transform.image_transform.__self__  # type: ignore[attr-defined]
    assert gray_levels(black, processor)[0, 6:].abs().max() < 1e-3


def test_other_transforms_are_refused(per_image: tuple[RLDSDataset, Any]) -> None:
    transform, images = per_image[0].batch_transform, per_image[0].image_transform
    processor = transform.image_transform.__self__  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="--augment_on_device"):
        defer(lambda frame: frame, images, processor)
    with pytest.raises(UsageError, match="--augment_on_device"):
        defer(transform, PolicyImageTransform((112, 112), images.ranges), processor)
