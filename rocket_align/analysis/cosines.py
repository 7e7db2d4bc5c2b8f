"""Likeness of tokens (the cone effect, Figure 4) and of the pairs' projectors (Figure 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rocket_align.alignment import MultiLayerAlignment


class TokenCone:
    """Mean cosine between two tokens, streamed: only the sum of the tokens' directions is kept.

    With unit vectors u_i, the mean over all ordered pairs of different tokens is (|sum u_i|^2 - n) / (n (n - 1)).
    """

    def __init__(self) -> None:
        self.samples = 0
        self.tokens = 0
        self._directions = self._within = torch.zeros((), dtype=torch.float64)

    def update(self, tokens_BND: Tensor) -> None:
        """Add the tokens of a batch. Raises ValueError: not three-dimensional, or fewer than 2 tokens a sample."""
        if tokens_BND.ndim != 3 or tokens_BND.shape[1] < 2:
            raise ValueError(f"tokens: found shape {tuple(tokens_BND.shape)}; accepted: (B, 2 or more, D)")
        batch, count, _ = tokens_BND.shape
        sums_BD = F.normalize(tokens_BND.double(), dim=-1).sum(dim=1)
        per_sample = (sums_BD.square().sum(dim=-1) - count) / (count * (count - 1))
        self._within = self._within.to(sums_BD.device) + per_sample.sum()
        self._directions = self._directions.to(sums_BD.device) + sums_BD.sum(dim=0)
        self.samples += batch
        self.tokens += batch * count

    def within_samples(self) -> float:
        """Mean cosine between two different tokens of the same sample."""
        self._require_samples()
        return float(self._within / self.samples)

    def overall(self) -> float:
        """Mean cosine between any two different tokens of all samples."""
        self._require_samples()
        return float((self._directions.square().sum() - self.tokens) / (self.tokens * (self.tokens - 1)))

    def _require_samples(self) -> None:
        if not self.samples:
            raise ValueError("tokens: found none; accepted: at least one batch")


@torch.no_grad()
def parameter_similarity(alignment: MultiLayerAlignment, member: int = 0) -> dict[str, Tensor]:
    """Cosine between the flattened weights of every two pairs' projectors.

    A pair's weights are those that it uses: hidden units beyond its width count as zero.

    Returns:
        "fc1" and "fc2": (K, K) float64.

    Raises:
        ValueError: an alignment without pairs.
    """
    if not alignment.config.num_pairs:
        raise ValueError("alignment: found no pair; accepted: one with projectors")
    weights: dict[str, list[Tensor]] = {"fc1": [], "fc2": []}
    for pair in range(alignment.config.num_pairs):
        projector, width = alignment.projector_of(pair, member)
        for name, used in (("fc1", projector.fc1.weight[:width]), ("fc2", projector.fc2.weight[:, :width].T)):
            full = used.new_zeros(projector.fc1.out_features, used.shape[1], dtype=torch.float64)
            full[:width] = used
            weights[name].append(F.normalize(full.flatten(), dim=0))
    return {name: torch.stack(rows) @ torch.stack(rows).T for name, rows in weights.items()}


class OutputSimilarity:
    """Mean cosine between the outputs of every two pairs' projectors, streamed over batches.

    "same_input": both projectors get the same tokens; averaged over the aligned tokens of all pairs. It is 1 for a
    shared projector of full width. "own_input": each projector gets its own pair's tokens.
    """

    def __init__(self, alignment: MultiLayerAlignment, member: int = 0) -> None:
        self._alignment, self._member = alignment, member
        pairs = alignment.config.num_pairs
        self._same = torch.zeros(pairs, pairs, dtype=torch.float64)
        self._own = torch.zeros(pairs, pairs, dtype=torch.float64)
        self.tokens = 0

    @torch.no_grad()
    def update(self, tokens_KBND: Tensor) -> None:
        """Add the aligned tokens of a batch, as `MultiLayerAlignment.student_tokens` gives them."""
        pairs = len(tokens_KBND)
        own = []
        for source in range(pairs):
            outputs = [self._directions(tokens_KBND[source], pair) for pair in range(pairs)]
            same = _summed_cosines(outputs) / pairs
            self._same = self._same.to(same.device) + same
            own.append(outputs[source])
        cosines = _summed_cosines(own)
        self._own = self._own.to(cosines.device) + cosines
        self.tokens += tokens_KBND.shape[1] * tokens_KBND.shape[2]

    def _directions(self, tokens_BND: Tensor, pair: int) -> Tensor:
        projected = self._alignment.project_pair(tokens_BND, pair, self._member)
        return F.normalize(projected.float(), dim=-1).flatten(0, 1)

    def result(self) -> dict[str, Tensor]:
        """(K, K) each. Raises ValueError: no batch."""
        if not self.tokens:
            raise ValueError("tokens: found none; accepted: at least one batch")
        return {"same_input": self._same / self.tokens, "own_input": self._own / self.tokens}


def _summed_cosines(directions: list[Tensor]) -> Tensor:
    stacked = torch.stack(directions).flatten(1)
    return (stacked @ stacked.T).double()
