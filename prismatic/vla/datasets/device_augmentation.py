"""Augmentation of a whole batch on the device that trains, instead of image by image in the loader's processes.

The processes only decode; a batch carries the stored images and each one's draw, which is the one that the per-image
path makes (a function of seed, epoch and frame). Pixels are those of that path within one gray level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prismatic.util.errors import UsageError
from prismatic.vla.datasets.batch_transform import RLDSBatchTransform
from prismatic.vla.datasets.image_transforms import FULL_IMAGE, AugmentDraw, PolicyImageTransform
from prismatic.vla.datasets.resampling import crop_filters

_UNCHANGED = AugmentDraw(FULL_IMAGE, brightness=0.0, contrast=1.0, saturation=1.0, hue=0.0)


class StoredImages(PolicyImageTransform):
    """Leaves training images as they are stored."""

    def train(self, image_HW3: np.ndarray, draw: AugmentDraw | None) -> np.ndarray:
        """The image itself."""
        return image_HW3


class DeferredSample(NamedTuple):
    """Stored images of one sample, a draw for each (8 numbers), and what is to be made of them."""

    images: list[Tensor]
    draws_V8: Tensor
    size: tuple[int, int]
    means: Sequence[Sequence[float]]
    stds: Sequence[Sequence[float]]

    @staticmethod
    def collate(samples: Sequence[DeferredSample]) -> DeferredImages:
        """Put the samples of a batch together; images of one size become one tensor."""
        images = [image for sample in samples for image in sample.images]
        groups: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(images):
            groups.setdefault((image.shape[0], image.shape[1]), []).append(number)
        by_size = {
            size: (torch.tensor(group), torch.stack([images[n] for n in group])) for size, group in groups.items()
        }
        draws_N8 = torch.cat([sample.draws_V8 for sample in samples])
        return DeferredImages(by_size, draws_N8, len(samples), *samples[0][2:])


@dataclass
class DeferringTransform(RLDSBatchTransform):
    """Makes samples with "deferred" in place of pixels."""

    augmentation: PolicyImageTransform | None = None
    means: Sequence[Sequence[float]] = ()
    stds: Sequence[Sequence[float]] = ()

    def _images(self, rlds_batch: Any) -> dict[str, Any]:
        assert self.augmentation is not None
        images, numbers = [], []
        order = list(rlds_batch["views"])
        for view in self._views(order, "primary"):
            draw = self.augmentation.draw(np.random.default_rng((*rlds_batch["draw"], order.index(view))), view)
            # A camera that the dataset lacks is black.
            crop, *colors = draw if draw and rlds_batch["views"][view] else _UNCHANGED
            numbers.append([*crop, *colors])
            images.append(torch.from_numpy(rlds_batch["observation"][f"image_{view}"][0]))
        draws_V8 = torch.tensor(numbers, dtype=torch.float64)
        return {"deferred": DeferredSample(images, draws_V8, self.augmentation.size, self.means, self.stds)}


def defer(
    transform: object, image_transform: PolicyImageTransform, image_processor: Any
) -> tuple[DeferringTransform, StoredImages]:
    """The transforms of a training dataset whose images are augmented on the device, from those of the per-image path.

    Raises:
        UsageError: a policy with image transforms of another kind, or vision models of different image sizes.
    """
    sizes = {tuple(size) for size in getattr(image_processor, "input_sizes", ())}
    if type(transform) is not RLDSBatchTransform or type(image_transform) is not PolicyImageTransform:
        raise UsageError("--augment_on_device: True found; accepted with this policy: False")
    if sizes != {(3, *image_transform.size)}:
        raise UsageError(f"--augment_on_device: True found, but the model's images are {sizes}; accepted: False")
    options = {field.name: getattr(transform, field.name) for field in fields(transform) if field.init}
    means, stds = image_processor.means, image_processor.stds
    deferring = DeferringTransform(**options, augmentation=image_transform, means=means, stds=stds)
    return deferring, StoredImages(*(getattr(image_transform, field.name) for field in fields(image_transform)))


@dataclass(frozen=True)
class DeferredImages:
    """Stored images of a batch, sample by sample and within it view by view, and how to make pixels of them.

    Attributes:
        by_size: (height, width) -> numbers of the images of this size and the images, uint8 (n, height, width, 3).
        draws_N8: crop (top, left, height, width), brightness, contrast, saturation, hue of every image.
        samples: how many.
        size: height and width of the pixels.
        means, stds: normalization for each vision model, (3,) each.
    """

    by_size: Mapping[tuple[int, int], tuple[Tensor, Tensor]]
    draws_N8: Tensor
    samples: int
    size: tuple[int, int]
    means: Sequence[Sequence[float]]
    stds: Sequence[Sequence[float]]

    def render(self, device: torch.device) -> Tensor:
        """Augmented and normalized `pixel_values` (B, 3 * models * V, H, W) on `device`."""
        rgb_N3HW = torch.empty(len(self.draws_N8), 3, *self.size, device=device)
        for (height, width), (places, images) in self.by_size.items():
            draws = self.draws_N8[places]
            rows, columns = (
                crop_filters(side, self.size[axis], draws[:, axis, None], draws[:, axis + 2, None])[0]
                .contiguous()
                .to(device, non_blocking=True)
                for axis, side in enumerate((height, width))
            )
            planes = images.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
            resized = rows[:, None] @ planes @ columns[:, None].transpose(-1, -2)
            colors = draws[:, 4:].float().to(device, non_blocking=True)
            rgb_N3HW[places.to(device)] = _adjust_colors(resized / 255, colors)
        levels = (rgb_N3HW * 255.5).floor_().div_(255)
        mean, std = (torch.tensor(values, device=device)[:, :, None, None] for values in (self.means, self.stds))
        return ((levels[:, None] - mean) / std).view(self.samples, -1, *self.size)


def _adjust_colors(rgb_N3HW: Tensor, colors_N4: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of every image, as `image_transforms.adjust_colors`."""
    brightness, contrast, saturation, hue = colors_N4[:, :, None, None, None].unbind(1)
    rgb = (rgb_N3HW.clamp_(0, 1) + brightness).clamp_(0, 1)
    mean = rgb.mean(dim=(2, 3), keepdim=True)
    rgb = (rgb * contrast + mean * (1 - contrast)).clamp_(0, 1)
    red, green, blue = rgb.split(1, dim=1)
    value = rgb.amax(dim=1, keepdim=True)
    chroma = value - rgb.amin(dim=1, keepdim=True)
    scale = chroma.clamp_min(1e-9).reciprocal()
    sector = torch.where(green == value, (blue - red) * scale + 2, (red - green) * scale + 4)
    sector = torch.where(red == value, (green - blue) * scale, sector)
    sector = (sector + 6 * hue).remainder_(6)
    chroma = torch.minimum(chroma * saturation, value)
    # Distance of the hue from cyan, green and blue, see `adjust_saturation_hue`.
    red, green, blue = (((sector - center).abs() - 1).clamp(0, 1) for center in (3, 2, 4))
    return value - torch.cat((1 - red, green, blue), dim=1) * chroma
