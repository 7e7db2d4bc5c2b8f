"""The teacher, as the alignment needs it: a callable from images to features of some layers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class TeacherFeatures(NamedTuple):
    """Patch features of a frozen teacher."""

    # One (B, V, P, C) tensor per requested layer, in the order requested; P is row-major over `grid_hw`
    layers: tuple[Tensor, ...]
    grid_hw: tuple[int, int]  # Patches along height and width of one view
    image_hw: tuple[int, int]  # Pixels the teacher saw, height and width
    tasks: Tensor | None = None  # `task_keys` (B,) of the samples, where means by task are subtracted


class AlignmentTargets(NamedTuple):
    """Targets that are pooled already, as a feature store gives them."""

    pooled_KBNC: Tensor  # One target per layer pair, sample and student token; position embedding included where wanted
    tasks: Tensor | None = None  # As above


class Teacher(Protocol):
    """Images (B, V, 3, H, W) in [0, 1] -> features."""

    def __call__(self, images_BV3HW: Tensor, /) -> TeacherFeatures: ...
