"""One-to-one matching of student and teacher layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment


def match_layers(similarity: ArrayLike | Sequence[Sequence[float]]) -> tuple[tuple[int, int], ...]:
    """Pairs that maximize the summed similarity (Hungarian algorithm), by ascending student layer.

    Args:
        similarity: (student layers, teacher layers); need not be square, the smaller side is matched completely.
            An array, nested lists, or a CPU tensor.

    Returns:
        (row, column) index pairs.

    Raises:
        ValueError: not a matrix, or not finite.
    """
    scores = np.asarray(similarity, dtype=np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ValueError(f"similarity: found shape {scores.shape}, or NaN; accepted: a matrix of finite numbers")
    rows, columns = linear_sum_assignment(scores, maximize=True)
    return tuple((int(row), int(column)) for row, column in zip(rows, columns))
