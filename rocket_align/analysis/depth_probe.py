"""A layer's knowledge of depth, read out by ridge regression whose data are streamed (the paper's Figure 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rocket_align.analysis.place_probe import PlaceProbe


class RidgeProbe:
    """Linear regression of outputs on features from the normal equations: memory does not grow with the samples.

    Features are standardized with the training data's mean and deviation; the mean output is the intercept.

    Args:
        ridge: weight of the penalty per sample, in units of a standardized feature's variance.

    Raises:
        ValueError: a penalty that is not above zero.
    """

    def __init__(self, ridge: float = 1e-3) -> None:
        self._probe = PlaceProbe(ridge)  # Of one place

    @property
    def samples(self) -> int:
        """Samples so far."""
        return self._probe.samples

    def update(self, features_NC: Tensor, outputs_NK: Tensor) -> None:
        """Add training data. Raises ValueError: not as many outputs as features."""
        if len(features_NC) != len(outputs_NK):
            raise ValueError(f"probe: found {len(features_NC)} features and {len(outputs_NK)} outputs; accepted: pairs")
        self._probe.update(features_NC[:, None], outputs_NK[:, None])

    def solve(self) -> LinearReadout:
        """The readout of all data so far. Raises ValueError: no data."""
        readout = self._probe.solve()
        weights = readout.weights_CK
        return LinearReadout(weights, readout.outputs_PK[0] - readout.tokens_PC[0] @ weights)


@dataclass(frozen=True)
class LinearReadout:
    """Outputs = features @ weights + intercept."""

    weights: Tensor
    intercept: Tensor

    def __call__(self, features_NC: Tensor) -> Tensor:
        """(N, K) float64."""
        return features_NC.double() @ self.weights + self.intercept


class DepthErrors:
    """Errors of predicted depth, streamed.

    AbsRel: mean of |predicted - true| / true. delta1: share of max(predicted / true, true / predicted) below 1.25.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._relative = 0.0
        self._within = 0.0

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """Add depths of the same shape, in the same unit, above zero."""
        predicted, true = predicted.double(), true.double()
        ratio = torch.maximum(predicted / true, true / predicted)
        self._relative += float(((predicted - true).abs() / true).sum())
        self._within += float((ratio < 1.25).sum())
        self.samples += true.numel()

    def result(self) -> dict[str, float]:
        """{"abs_rel": ..., "delta1": ...}. Raises ValueError: no data."""
        if not self.samples:
            raise ValueError("depth: found none; accepted: at least one batch")
        return {"abs_rel": self._relative / self.samples, "delta1": self._within / self.samples}


def patch_depths(depth_BVHW: Tensor, grid_hw: tuple[int, int], cells: int) -> Tensor:
    """Depth of cells x cells blocks of every patch, as the mean log-depth of a block: (B, V, P, cells * cells).

    Raises ValueError: a depth that is not above zero.
    """
    if not bool((depth_BVHW > 0).all()):
        raise ValueError("depth: found values of zero or less; accepted: distances along the optical axis, above zero")
    height, width = grid_hw
    size = (height * cells, width * cells)
    log_depth = F.adaptive_avg_pool2d(depth_BVHW.float().log().flatten(0, 1)[:, None], size)
    blocks = log_depth.reshape(-1, height, cells, width, cells).permute(0, 1, 3, 2, 4)
    return blocks.reshape(*depth_BVHW.shape[:2], height * width, cells * cells)


def depth_map(values_BVPK: Tensor, grid_hw: tuple[int, int], cells: int) -> Tensor:
    """The inverse arrangement: (B, V, P, cells * cells) -> (B, V, height * cells, width * cells)."""
    height, width = grid_hw
    blocks = values_BVPK.unflatten(3, (cells, cells)).unflatten(2, (height, width))
    return blocks.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
