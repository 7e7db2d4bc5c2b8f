"""Put one vector (a step's action or state) together from the columns of a dataset's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prismatic.vla.datasets.oxe.operations import Operation


@dataclass(frozen=True)
class Columns:
    """Columns [start, stop) of a feature, sent through `operations` in order.

    `Columns("action")[:6]` and `Columns("action")[-1:].then(Operation.CLIP)` are how tables write it.
    """

    feature: str
    start: int | None = None
    stop: int | None = None
    operations: tuple[Operation, ...] = ()

    def __getitem__(self, columns: slice) -> Columns:
        return replace(self, start=columns.start, stop=columns.stop)

    def then(self, *operations: Operation) -> Columns:
        """The same columns with further operations."""
        return replace(self, operations=(*self.operations, *operations))

    def values(self, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
        """(T, w) from the features (T, W) of one episode."""
        values_TW = numbers[self.feature][:, self.start : self.stop]
        for operation in self.operations:
            values_TW = operation(values_TW)
        return values_TW


@dataclass(frozen=True)
class Constant:
    """`width` columns of one value."""

    value: float
    width: int = 1

    def values(self, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
        """(T, width); T is that of any feature."""
        return np.full((len(next(iter(numbers.values()))), self.width), self.value, dtype=np.float32)


Part = Columns | Constant


def features_of(parts: Sequence[Part]) -> tuple[str, ...]:
    """The features the parts read, each once."""
    return tuple(dict.fromkeys(part.feature for part in parts if isinstance(part, Columns)))


@dataclass(frozen=True)
class Assembly:
    """An episode's features to its actions and states.

    Attributes:
        action, proprio: the parts of each vector, in order; no parts of proprio: the robot has no states.
        drop_first, drop_last: steps at the episode's ends that are no transitions. The first ones go before any
            operation sees the numbers, the last ones after.
    """

    action: tuple[Part, ...]
    proprio: tuple[Part, ...]
    drop_first: int = 0
    drop_last: int = 0

    @property
    def features(self) -> tuple[str, ...]:
        """The features that hold the numbers."""
        return features_of((*self.action, *self.proprio))

    def kept(self, steps: int) -> slice:
        """Select the steps of an episode that are transitions."""
        return slice(self.drop_first, max(self.drop_first, steps - self.drop_last))

    def __call__(self, numbers: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Features (T, w) of one episode to (action (K, A), proprio (K, P)) of the K kept steps, float32."""
        kept = self.kept(len(next(iter(numbers.values()))))
        # Operations need a step to look at, also in an episode too short to have a transition.
        first = kept.start if kept.start < kept.stop else 0
        begun = {name: values[first:] for name, values in numbers.items()}
        empty = np.zeros((len(next(iter(begun.values()))), 0), np.float32)
        action, proprio = (
            np.concatenate([empty, *(part.values(begun) for part in parts)], axis=1)[: kept.stop - kept.start]
            for parts in (self.action, self.proprio)
        )
        return action.astype(np.float32), proprio.astype(np.float32)
