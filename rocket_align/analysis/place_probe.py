"""A linear readout of tokens that knows each token's place, so that what is the same in every picture earns nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class PlaceProbe:
    """Ridge regression of outputs on tokens, with a free constant per place; streamed, as `RidgeProbe`.

    The weights are shared by all places. With them, the fit equals that of tokens beside a one-hot place that is not
    penalized: tokens and outputs are taken from their means at their place.

    Args:
        ridge: weight of the penalty per sample, in units of a standardized feature's variance within places.

    Raises:
        ValueError: a penalty that is not above zero.
    """

    def __init__(self, ridge: float = 1e-2) -> None:
        if not ridge > 0:
            raise ValueError(f"ridge: found {ridge}; accepted: a number above 0")
        self.ridge = ridge
        self.samples = 0
        self._offset: Tensor | None = None

    def update(self, tokens_BPC: Tensor, outputs_BPK: Tensor) -> None:
        """Add training data. Raises ValueError: not as many outputs as tokens."""
        if tokens_BPC.shape[:2] != outputs_BPK.shape[:2]:
            raise ValueError(
                f"probe: found tokens {tuple(tokens_BPC.shape[:2])} and outputs {tuple(outputs_BPK.shape[:2])}; "
                "accepted: one output for each sample and place"
            )
        tokens, outputs = tokens_BPC.double(), outputs_BPK.double()
        if self._offset is None:
            # Near the means, so that differences of large sums lose no digits.
            self._offset, self._output_offset = tokens.mean(dim=0), outputs.mean(dim=0)
            self._token_sum, self._output_sum = torch.zeros_like(self._offset), torch.zeros_like(self._output_offset)
            width = tokens.shape[-1]
            self._squares, self._cross = tokens.new_zeros(width, width), tokens.new_zeros(width, outputs.shape[-1])
        tokens, outputs = tokens - self._offset, outputs - self._output_offset
        self._token_sum += tokens.sum(dim=0)
        self._output_sum += outputs.sum(dim=0)
        rows = tokens.flatten(0, 1)
        self._squares += rows.T @ rows
        self._cross += rows.T @ outputs.flatten(0, 1)
        self.samples += len(tokens)

    def solve(self) -> PlaceReadout:
        """The readout of all data so far. Raises ValueError: no data."""
        if self._offset is None:
            raise ValueError("probe: found no data; accepted: at least one batch")
        tokens, outputs = self._token_sum / self.samples, self._output_sum / self.samples
        rows = self.samples * len(tokens)
        covariance = self._squares / rows - tokens.T @ tokens / len(tokens)
        cross = self._cross / rows - tokens.T @ outputs / len(tokens)
        weights = _solve_ridge(covariance, cross, self.ridge)
        return PlaceReadout(weights, tokens + self._offset, outputs + self._output_offset)


def _solve_ridge(covariance_CC: Tensor, cross_CK: Tensor, ridge: float) -> Tensor:
    """Weights (C, K) of standardized features with a penalty of `ridge`, for features as they are."""
    scale = covariance_CC.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    correlation = covariance_CC / torch.outer(scale, scale)
    penalty = ridge * torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
    return torch.linalg.solve(correlation + penalty, cross_CK / scale[:, None]) / scale[:, None]


@dataclass(frozen=True)
class PlaceReadout:
    """Outputs = mean output of the place + (token - mean token of the place) @ weights."""

    # weights_CK, tokens_PC, outputs_PK: float64; the latter two are means of the training data
    weights_CK: Tensor
    tokens_PC: Tensor
    outputs_PK: Tensor

    def __call__(self, tokens_BPC: Tensor) -> Tensor:
        """(B, P, K) float64."""
        return self.outputs_PK + (tokens_BPC.double() - self.tokens_PC) @ self.weights_CK


class ExplainedBeyondPlace:
    """R2 on other data above the training mean of each place: 1 reads everything, 0 knows no more than the place."""

    def __init__(self, readout: PlaceReadout) -> None:
        self.readout = readout
        self._left: Tensor | None = None

    def update(self, tokens_BPC: Tensor, outputs_BPK: Tensor) -> None:
        """Add test data."""
        outputs = outputs_BPK.double()
        errors = ((outputs - self.readout(tokens_BPC)).square(), (outputs - self.readout.outputs_PK).square())
        sums = torch.stack([error.sum(dim=(0, 1)) for error in errors])
        self._left = sums if self._left is None else self._left + sums

    def result(self, outputs: slice = slice(None)) -> float:
        """R2 of some outputs together; below 0 where the readout is worse than the place's mean.

        Raises ValueError: no data.
        """
        if self._left is None:
            raise ValueError("readout: found no test data; accepted: at least one batch")
        left, total = self._left[:, outputs].sum(dim=1).tolist()
        return 1 - left / total
