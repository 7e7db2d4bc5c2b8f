"""Cone effect: how much the token features of a layer point the same way (the paper's Figure 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenCone:
    """Mean cosine between two tokens, streamed: only the sum of the tokens' directions is kept.

    With unit vectors u_i, the mean over all ordered pairs of different tokens is (|sum u_i|^2 - n) / (n (n - 1)).
    """

    def __init__(self) -> None:
        self.samples = 0
        self.tokens = 0
        self._directions: Tensor | None = None
        self._within = torch.zeros((), dtype=torch.float64)

    def update(self, tokens_BND: Tensor) -> None:
        """Add the tokens of a batch.

        Raises:
            ValueError: not three-dimensional, or fewer than 2 tokens a sample.
        """
        if tokens_BND.ndim != 3 or tokens_BND.shape[1] < 2:
            raise ValueError(f"tokens: found shape {tuple(tokens_BND.shape)}; accepted: (B, 2 or more, D)")
        batch, count, _ = tokens_BND.shape
        sums_BD = F.normalize(tokens_BND.double(), dim=-1).sum(dim=1)
        of_samples = (sums_BD.square().sum(dim=-1) - count) / (count * (count - 1))
        self._within = self._within.to(sums_BD.device) + of_samples.sum()
        total = sums_BD.sum(dim=0)
        self._directions = total if self._directions is None else self._directions + total
        self.samples += batch
        self.tokens += batch * count

    def within_samples(self) -> float:
        """Mean cosine between two different tokens of the same sample."""
        self._require_samples()
        return float(self._within / self.samples)

    def overall(self) -> float:
        """Mean cosine between any two different tokens of all samples."""
        directions = self._require_samples()
        return float((directions.square().sum() - self.tokens) / (self.tokens * (self.tokens - 1)))

    def _require_samples(self) -> Tensor:
        if self._directions is None:
            raise ValueError("tokens: found none; accepted: at least one batch")
        return self._directions
