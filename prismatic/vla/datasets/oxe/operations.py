"""Put one vector (a step's action or state) together from the columns of a dataset's features.

Operations turn the numbers (T, w) float32 of all steps of one episode at once. The policy's gripper command is
absolute, 1 open and 0 closed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

_OPEN, _CLOSED = 0.95, 0.05
_MOVES = 0.1


def clip_to_unit(values_TW: np.ndarray) -> np.ndarray:
    """To [0, 1]."""
    return np.clip(values_TW, 0.0, 1.0)


def invert_gripper(values_TW: np.ndarray) -> np.ndarray:
    """1 - x: closedness to openness."""
    return 1.0 - values_TW


def binarize_gripper(values_T1: np.ndarray) -> np.ndarray:
    """Openness to 0 (closed, below 0.05) or 1 (open, above 0.95); values between take the next such step's.

    An episode that ends between the two keeps its last value for those steps.
    Source: upstream's binarize_gripper_actions.
    """
    values = values_T1[:, 0]
    settled = (values > _OPEN) | (values < _CLOSED)
    settled[-1] = True
    targets = np.where(values > _OPEN, 1.0, np.where(values < _CLOSED, 0.0, values))
    # The first settled step at or after each step: a running minimum of their numbers, from the end.
    numbers = np.where(settled, np.arange(len(values)), len(values))
    following = np.minimum.accumulate(numbers[::-1])[::-1]
    return targets[following][:, None].astype(np.float32)


def relative_gripper_to_absolute(values_T1: np.ndarray) -> np.ndarray:
    """Commands above 0.1 (close), below -0.1 (open) or between (stay) to the state that holds from there on.

    Before the first command the gripper was in the opposite state; without any command it is open throughout.
    Source: upstream's rel2abs_gripper_actions.
    """
    values = values_T1[:, 0]
    commands = np.where(values < -_MOVES, 1.0, np.where(values > _MOVES, -1.0, 0.0))
    given = np.flatnonzero(commands)
    before = -commands[given[0]] if len(given) else 1.0
    # The last command at or before each step, -1 for none.
    latest = np.maximum.accumulate(np.where(commands != 0, np.arange(len(values)), -1))
    states = np.where(latest < 0, before, commands[latest])
    return (states / 2 + 0.5)[:, None].astype(np.float32)


def step_to_next(values_TW: np.ndarray) -> np.ndarray:
    """The change from each step to the one after it; 0 at the last, which such datasets drop."""
    return np.diff(values_TW, axis=0, append=values_TW[-1:])


def quaternion_to_euler(values_T4: np.ndarray) -> np.ndarray:
    """Quaternions (x, y, z, w) to angles about the fixed x, y and z axes, radians (T, 3); 0 0 0 0 is no rotation."""
    from scipy.spatial.transform import Rotation

    given = np.any(values_T4 != 0, axis=1, keepdims=True)
    return Rotation.from_quat(np.where(given, values_T4, (0, 0, 0, 1))).as_euler("xyz").astype(np.float32)


class Operation(Enum):
    """An operation by name, so that tables of datasets compare, print and serialize."""

    CLIP = "clip"
    INVERT = "invert"
    BINARIZE = "binarize"
    RELATIVE = "relative"
    TO_NEXT = "to_next"
    TO_EULER = "to_euler"

    def __call__(self, values_TW: np.ndarray) -> np.ndarray:
        """Apply it to the (T, w) numbers of an episode."""
        return _FUNCTIONS[self](values_TW)


_FUNCTIONS: dict[Operation, Callable[[np.ndarray], np.ndarray]] = {
    Operation.CLIP: clip_to_unit,
    Operation.INVERT: invert_gripper,
    Operation.BINARIZE: binarize_gripper,
    Operation.RELATIVE: relative_gripper_to_absolute,
    Operation.TO_NEXT: step_to_next,
    Operation.TO_EULER: quaternion_to_euler,
}


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
    """An episode's features to its actions and states."""

    action: tuple[Part, ...]  # The vector's parts, in order
    proprio: tuple[Part, ...]  # No parts: the robot has no states
    drop_first: int = 0  # First steps that are no transitions; they go before any operation sees the numbers
    drop_last: int = 0  # Last steps that are no transitions; they go after

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
