"""The student's own pixels as a teacher sees them, and the features it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
    """

    def __init__(self, teacher: Teacher, image_processor: ImageProcessor) -> None:
        self.teacher = teacher
        self.mean, self.std = tuple(image_processor.means[0]), tuple(image_processor.stds[0])
        self.channels_per_view = 3 * len(image_processor.means)

    def __call__(self, pixel_values: Tensor) -> TeacherFeatures:
        """Features of a batch's `pixel_values`. Raises ValueError: a channel count that is no multiple of a view's."""
        return self.teacher(
            unnormalize_views(pixel_values, self.mean, self.std, channels_per_view=self.channels_per_view)
        )
