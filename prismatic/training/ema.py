"""Exponential moving average of the weights that train, which is what checkpoints and validations then use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from prismatic.training.engine import Engine


class WeightAverage:
    """Averages what this process holds of the trainable weights, in their own type.

    It begins with the weights as they are, and as openpi's has no warm-up: average = decay * average + (1 - decay) *
    weights after every optimizer step.

    Args:
        engine: a prepared one.
        decay: 0 to 1.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self._average = [held.clone() for held in engine.held()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        torch._foreach_lerp_(self._average, self._engine.held(), 1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the average inside of the context."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        self._engine.free_gathered()
        for weight, average in zip(self._engine.held(), self._average, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def trained_weights(engine: Engine) -> dict[str, Tensor]:
    """Copies on the CPU of all that trains, whole; call on every process. Others than the main one may get nothing."""
    names = engine.parameters.keys()
    return {name: value.to("cpu", copy=True) for name, value in engine.weights(names.__contains__).items()}


@torch.no_grad()
def load_trained_weights(engine: Engine, weights: Mapping[str, Tensor]) -> None:
    """Put back what :func:`trained_weights` gave. Raises KeyError where other parameters train."""
    for name, parameter in engine.parameters.items():
        parameter.copy_(engine.placed(weights[name], parameter))
