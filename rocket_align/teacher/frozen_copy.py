"""The student's own frozen copy as a teacher: its states before training hold the trained ones in place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from rocket_align.rows import ImageTokens
from rocket_align.taps import attach
from rocket_align.teacher.base import AlignmentTargets


class FrozenCopy:
    """Targets at the taps of a frozen copy that sees the same batch (the anchor of Anchor-Align).

    It needs the whole batch, text included, so that no feature store can stand in for it. For the vision encoder alone,
    which needs images only, name the checkpoint's folder as the teacher (see `load_teacher`). The copy is no submodule:
    it is neither trained nor saved.

    Args:
        model: the student before training; copied, so that it takes its memory once more.
        layers, image_tokens, options: of the copy's taps, see :func:`rocket_align.attach`.
    """

    def __init__(self, model: nn.Module, layers: Any, image_tokens: ImageTokens = None, **options: Any) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False).eval()
        self._taps = attach(self._model, layers, image_tokens, **options)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> AlignmentTargets:
        """The copy's states (K, B, N, D) in its own forward pass; `MultiLayerAlignment` takes D / 2 as `teacher_dim`.

        Raises:
            ValueError: see :meth:`rocket_align.Taps.take`.
        """
        self._model(*args, **kwargs)
        return AlignmentTargets(self._taps.take())
