"""The student's own pixels as a teacher sees them, and the features it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rocket_align.teacher.base import Teacher, TeacherFeatures
from rocket_align.teacher.preprocess import unnormalize_views


class ImageProcessor(Protocol):
    """Normalization of the student's images: per featurizer, the primary one first, three means and deviations."""

    means: Sequence[Sequence[float]]
    stds: Sequence[Sequence[float]]


class TeacherTargets:
    """Student pixels (B, V * channels, H, W), augmented as they may be -> features of a teacher that sees the same.

    Every featurizer of the student has three channels of each view; the teacher gets the primary one's, in [0, 1].

    Args:
        teacher: see :class:`Teacher`.
        image_processor: what normalized the student's images.
        expects_images: refuse pixels that are no images of [0, 1] once that normalization is undone.
    """

    def __init__(self, teacher: Teacher, image_processor: ImageProcessor, *, expects_images: bool = True) -> None:
        self.teacher = teacher
        self.mean, self.std = tuple(image_processor.means[0]), tuple(image_processor.stds[0])
        self.channels_per_view = 3 * len(image_processor.means)
        self._range_checked = not expects_images

    def __call__(self, pixel_values: Tensor, view_mask_BV: Tensor | None = None) -> TeacherFeatures:
        """Features of a batch's `pixel_values`; see :func:`present_views` for `view_mask_BV`.

        Raises:
            ValueError: a channel count that is no multiple of a view's, or pixels whose range is not [0, 1] (looked at
                in the first batch alone: a teacher would clamp them without a word).
        """
        images = unnormalize_views(pixel_values, self.mean, self.std, channels_per_view=self.channels_per_view)
        if not self._range_checked:
            check_range(images)
            self._range_checked = True
        return present_views(self.teacher, images, view_mask_BV)


def check_range(images: Tensor) -> None:
    """Refuse images that are not in [0, 1], such as ones in [-1, 1]; rounding and resampling may overshoot by 0.1.

    Raises:
        ValueError: one line with the range.
    """
    low, high = torch.stack(images.detach().float().aminmax()).tolist()
    if low < -0.1 or high > 1.1:
        raise ValueError(f"teacher images: found values from {low:.3g} to {high:.3g}; accepted: 0 to 1")


def present_views(teacher: Teacher, images_BV3HW: Tensor, view_mask_BV: Tensor | None) -> TeacherFeatures:
    """Features of the cameras that are there; those of a missing one are zeros, and no other view sees it.

    A teacher such as VGGT mixes the views of a sample: a blank picture in the place of a missing camera would change
    the features of the others. Samples with the same cameras go through the teacher together.

    Args:
        images_BV3HW: values in [0, 1].
        view_mask_BV: bool, False for a missing camera; None: all are there.
    """
    patterns = [] if view_mask_BV is None else [tuple(row) for row in view_mask_BV.tolist()]
    if all(all(pattern) for pattern in patterns):
        return teacher(images_BV3HW)
    layers: list[Tensor] = []
    for pattern in sorted(set(patterns), reverse=True):  # Samples without any camera come last.
        samples = [sample for sample, other in enumerate(patterns) if other == pattern]
        views = [view for view, present in enumerate(pattern) if present]
        if views or not layers:  # With no camera at all, for the shape of the features.
            seen = teacher(images_BV3HW[samples][:, views or [0]])
        if not layers:
            layers = [layer.new_zeros(*images_BV3HW.shape[:2], *layer.shape[2:]) for layer in seen.layers]
        for layer, features in zip(layers, seen.layers if views else ()):
            layer[torch.tensor(samples)[:, None], torch.tensor(views)] = features
    return seen._replace(layers=tuple(layers))
