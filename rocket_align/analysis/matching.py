"""One-to-one matching of student and teacher layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment


def match_layers(
    similarity: ArrayLike | Sequence[Sequence[float]], count: int | None = None
) -> tuple[tuple[int, int], ...]:
    """Pairs that maximize the summed similarity (Hungarian algorithm), by ascending student layer.

    Args:
        similarity: (student layers, teacher layers); need not be square, the smaller side is matched completely.
            An array, nested lists, or a CPU tensor.
        count: match so many pairs only: those of the best total among all one-to-one matchings of that size.

    Returns:
        (row, column) index pairs.

    Raises:
        ValueError: not a matrix, or not finite; a count that the matrix does not allow.
    """
    scores = np.asarray(similarity, dtype=np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ValueError(f"similarity: found shape {scores.shape}, or NaN; accepted: a matrix of finite numbers")
    height, width = scores.shape
    if count is not None and not 1 <= count <= min(height, width):
        raise ValueError(f"count: found {count}; accepted: 1 to {min(height, width)} pairs")
    if count is not None:
        scores = _with_idle_partners(scores, count)
    rows, columns = linear_sum_assignment(scores, maximize=True)
    return tuple((int(row), int(column)) for row, column in zip(rows, columns) if row < height and column < width)


def _with_idle_partners(scores: np.ndarray, count: int) -> np.ndarray:
    """A square matrix whose best complete matching leaves all but `count` rows and columns to idle partners."""
    height, width = scores.shape
    size = height + width - count
    padded = np.zeros((size, size))
    padded[:height, :width] = scores
    # Idle with idle costs more than any matching can gain, so every idle partner takes a real layer.
    padded[height:, width:] = -(np.abs(scores).sum() + 1.0) * size
    return padded
