"""Normalization of states and actions: openpi's, by mean and deviation (pi0) or by quantiles to [-1, 1] (pi0.5).

LeRobot's differs by the small number in the denominator alone (1e-8 or none instead of 1e-6).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_EPSILON = 1e-6


@dataclass(frozen=True)
class Normalizer:
    """Statistics of one vector, [D] each; `quantiles` says by which of them it is normalized.

    Numbers beyond the D statistics (padding) stay as they are.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    quantiles: bool = False

    def __post_init__(self) -> None:
        if self.quantiles and (self.q01 is None or self.q99 is None):
            raise ValueError("q01, q99: None found; accepted: arrays, for normalization by quantiles")

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """Normalize [..., D or fewer]."""
        low, span = self._low_and_span(values.shape[-1])
        scaled = (values - low) / (span + _EPSILON)
        return scaled * 2 - 1 if self.quantiles else scaled

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """Undo :meth:`normalize` on [..., any number]."""
        low, span = self._low_and_span(values.shape[-1])
        known, rest = values[..., : len(low)], values[..., len(low) :]
        scaled = (known + 1) / 2 if self.quantiles else known
        return np.concatenate([scaled * (span + _EPSILON) + low, rest], axis=-1)

    def _low_and_span(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        if self.quantiles and self.q01 is not None and self.q99 is not None:
            return self.q01[:width], (self.q99 - self.q01)[:width]
        return self.mean[:width], self.std[:width]
