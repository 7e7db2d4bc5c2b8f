"""Do losses pull parameters the same way? Cosines between their gradients (the paper's Figures 1, 13 and 14)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientReport:
    """Of one group of parameters, for K losses; NaN where a loss does not reach the group.

    Attributes:
        cosine_KK: between the gradients averaged over all batches.
        batch_cosine_KK: mean over batches of the cosine within a batch.
        batch_cosine_std_KK: its standard deviation over batches (0 for a single one).
        norm_K: of the averaged gradients.
    """

    cosine_KK: Tensor
    batch_cosine_KK: Tensor
    batch_cosine_std_KK: Tensor
    norm_K: Tensor


def cosines_of_gram(gram_KK: Tensor) -> Tensor:
    """Inner products -> cosines; NaN for zero vectors."""
    norms = gram_KK.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(norms, norms)
    return torch.where(scale > 0, gram_KK / scale, torch.full_like(gram_KK, torch.nan)).clamp(-1, 1)


class GradientCosines:
    """Accumulates the gradients of several losses with respect to groups of parameters, batch by batch.

    Memory: a few gradients per loss (their sum, and those of the latest batch), however many batches.

    Args:
        groups: disjoint groups by name, such as the blocks of a model; "all" is their union.

    Raises:
        ValueError: a group without parameters, or one named "all".
    """

    def __init__(self, groups: Mapping[str, Sequence[Tensor]]) -> None:
        if "all" in groups or not groups or not all(groups.values()):
            raise ValueError(f"groups: found {', '.join(groups) or 'none'}; accepted: non-empty ones, none named all")
        self._groups = {name: list(parameters) for name, parameters in groups.items()}
        self.batches = 0
        self._sums: dict[str, Tensor] = {}
        self._batch_sums: dict[str, Tensor] = {}
        self._batch_squares: dict[str, Tensor] = {}

    def update(self, losses: Sequence[Tensor]) -> None:
        """Add a batch: K scalars that share one graph, in the same order in every batch. The graph is freed."""
        parameters = [parameter for group in self._groups.values() for parameter in group]
        rows: dict[str, list[Tensor]] = {name: [] for name in self._groups}
        for number, loss in enumerate(losses):
            keep = number + 1 < len(losses)
            gradients = iter(torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True))
            for name, group in self._groups.items():
                rows[name].append(_flatten(group, [next(gradients) for _ in group]))
        grams = {name: torch.stack(vectors) for name, vectors in rows.items()}
        for name, gradients_KP in grams.items():
            self._sums[name] = self._sums[name] + gradients_KP if name in self._sums else gradients_KP
        self._count_batch({name: _gram(gradients_KP) for name, gradients_KP in grams.items()})

    def _count_batch(self, grams: dict[str, Tensor]) -> None:
        grams["all"] = torch.stack(list(grams.values())).sum(dim=0)
        for name, gram in grams.items():
            cosine = cosines_of_gram(gram)
            self._batch_sums[name] = self._batch_sums.get(name, torch.zeros_like(cosine)) + cosine
            self._batch_squares[name] = self._batch_squares.get(name, torch.zeros_like(cosine)) + cosine.square()
        self.batches += 1

    def result(self) -> dict[str, GradientReport]:
        """Per group, and for "all" of them together.

        Raises:
            ValueError: no batch.
        """
        if not self.batches:
            raise ValueError("losses: found none; accepted: at least one batch")
        grams = {name: _gram(total / self.batches) for name, total in self._sums.items()}
        grams["all"] = torch.stack(list(grams.values())).sum(dim=0)
        reports = {}
        for name, gram in grams.items():
            mean = self._batch_sums[name] / self.batches
            spread = (self._batch_squares[name] / self.batches - mean.square()).clamp(min=0).sqrt()
            reports[name] = GradientReport(cosines_of_gram(gram), mean, spread, gram.diagonal().clamp(min=0).sqrt())
        return reports


def _flatten(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    parts = [
        torch.zeros(parameter.numel(), device=parameter.device) if gradient is None else gradient.float().flatten()
        for parameter, gradient in zip(parameters, gradients)
    ]
    return torch.cat(parts)


def _gram(vectors_KP: Tensor) -> Tensor:
    return (vectors_KP @ vectors_KP.T).double()
