"""Gradient coherence: cosines between the losses' gradients (the paper's Figures 1, 13 and 14), and the paper's bound.

`GradientCosines` says whether losses pull parameters the same way. `TheoremCheck` measures both sides of the theorem on
gradient coherence through one shared projector.

Of one token, let g_a be the gradient of pair a's loss at the projector's output, J_a the projector's Jacobian at the
pair's hidden state, and v_a = J_a^T g_a what arrives at that state. With a reference Jacobian J, and c and eta such
that every u in span{g} has |u^T (J J^T - c) u| <= eta c |u|^2,

    <v_a, v_b> >= c g_a.g_b - eta c (|g_a|^2 + |g_b|^2) / 2 - |Delta_ab|,    Delta_ab = <v_a, v_b> - g_a^T J J^T g_b.

All terms are measured, c and eta as the best ones for the span (from the extreme eigenvalues of J J^T on it), so the
bound must hold; what it is worth shows in its sign: above zero it proves that two pairs do not work against each other.
For independent projectors, and in part for nested widths, there is no common J: |Delta_ab| shows what that costs.

Everything comes from K x K inner products, summed over tokens, so memory does not grow with the samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rocket_align.alignment import MultiLayerAlignment

Reference = Literal["first", "mean"]
# Relative to the largest eigenvalue: directions of span{g} below it are rounding noise.
_RANK_TOLERANCE = 1e-10
_SLACK = 1e-9


@dataclass(frozen=True)
class GradientReport:
    """Cosines of one group of parameters, for K losses; NaN where a loss does not reach the group."""

    cosine_KK: Tensor  # Between the gradients averaged over all batches
    batch_cosine_KK: Tensor  # Mean over batches of the cosine within a batch
    batch_cosine_std_KK: Tensor  # Its standard deviation over batches (0 for a single one)
    norm_K: Tensor  # Of the averaged gradients


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
        batch = {name: torch.stack(vectors) for name, vectors in rows.items()}
        self._sums = {name: self._sums.get(name, 0) + gradients_KP for name, gradients_KP in batch.items()}
        for name, gram in _grams(batch).items():
            cosine = cosines_of_gram(gram)
            self._batch_sums[name] = self._batch_sums.get(name, 0) + cosine
            self._batch_squares[name] = self._batch_squares.get(name, 0) + cosine.square()
        self.batches += 1

    def result(self) -> dict[str, GradientReport]:
        """Per group, and for "all" of them together. Raises ValueError: no batch."""
        if not self.batches:
            raise ValueError("losses: found none; accepted: at least one batch")
        reports = {}
        for name, gram in _grams({name: total / self.batches for name, total in self._sums.items()}).items():
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


def _grams(groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inner products (K, K) of each group's vectors (K, P), and of "all" groups together."""
    grams = {name: (vectors_KP @ vectors_KP.T).double() for name, vectors_KP in groups.items()}
    return {**grams, "all": torch.stack(list(grams.values())).sum(dim=0)}


@dataclass(frozen=True)
class TheoremReport:
    """Terms of the bound, inner products being means over tokens."""

    inner_KK: Tensor  # <v_a, v_b>
    features_KK: Tensor  # g_a.g_b
    delta_KK: Tensor  # Delta_ab
    # The right-hand side, with `c` and `eta` of the span of the gradients of all tokens put end to end
    bound_KK: Tensor
    c: float  # Of that span, like `eta`
    eta: float
    token_holds_KK: Tensor  # Share of tokens whose own bound holds
    token_informative_KK: Tensor  # Share of tokens whose own bound is above zero
    token_c: float  # Mean over tokens of each one's own c
    token_eta: float  # Mean over tokens of each one's own eta
    increment_K: Tensor  # Mean over tokens of |h_a - h_reference| / |h_reference|
    tokens: int  # How many were measured

    @property
    def holds_KK(self) -> Tensor:
        """Tell whether the bound holds, up to rounding."""
        return self.inner_KK >= self.bound_KK - _slack(self.inner_KK)


class TheoremCheck:
    """Accumulates the terms over batches.

    Args:
        alignment: projectors and pairs.
        reference: where the common Jacobian is taken: at the "first" (shallowest) aligned state, from which the
            residual stream's increments count, or at the "mean" of the aligned states. The projector, and the width
            of a nested one, is that of the middle pair.
        member: of an ensemble.

    Raises:
        ValueError: an unknown reference, or an alignment without pairs.
    """

    def __init__(self, alignment: MultiLayerAlignment, *, reference: Reference = "first", member: int = 0) -> None:
        if reference not in get_args(Reference):
            raise ValueError(f"reference: found {reference!r}; accepted: {', '.join(get_args(Reference))}")
        pairs = alignment.config.num_pairs
        if not pairs:
            raise ValueError("alignment: found no pair; accepted: one with projectors")
        self._alignment, self._reference, self._member = alignment, reference, member
        self._reference_pair = pairs // 2
        self._tokens = 0
        self._sums: dict[str, Tensor] = {}

    def update(self, tokens_KBND: Tensor, targets_KBNC: Tensor) -> None:
        """Add a batch: what `MultiLayerAlignment.student_tokens` and `.targets` give."""
        tokens_KTD = tokens_KBND.detach().flatten(1, 2)
        pulls, gradients = self._pulls(tokens_KTD, targets_KBNC.flatten(1, 2))
        reference_TD = tokens_KTD[0] if self._reference == "first" else tokens_KTD.mean(dim=0)
        common = self._pull_back(reference_TD, gradients)
        inner, features, at_reference = (_token_gram(vectors) for vectors in (pulls, gradients, common))
        low, high = _extreme_eigenvalues(features, at_reference)
        c, eta = (low + high) / 2, (high - low) / (high + low)
        bound = _bound(inner, features, at_reference, c, eta)
        distances_KT = (tokens_KTD - reference_TD).double().norm(dim=-1)
        terms = {
            "inner": inner,
            "features": features,
            "reference": at_reference,
            "holds": (inner >= bound - _slack(inner)).double(),
            "informative": (bound > 0).double(),
            "c": c,
            "eta": eta,
            "increment": (distances_KT / reference_TD.double().norm(dim=-1)).T,
        }
        self._sums = {name: self._sums.get(name, 0) + values.sum(dim=0) for name, values in terms.items()}
        self._tokens += tokens_KTD.shape[1]

    def _pulls(self, tokens_KTD: Tensor, targets_KTC: Tensor) -> tuple[Tensor, Tensor]:
        """Every pair's v (K, T, D) and g (K, T, C), of the tokens' own losses 1 - cos."""
        pulls, gradients = [], []
        for pair, (tokens, targets) in enumerate(zip(tokens_KTD, targets_KTC, strict=True)):
            with torch.enable_grad():
                tokens = tokens.clone().requires_grad_()
                projected = self._project(tokens, pair)
                loss = (1 - F.cosine_similarity(projected.float(), targets.float(), dim=-1)).sum()
                (gradient,) = torch.autograd.grad(loss, projected, retain_graph=True)
                (pull,) = torch.autograd.grad(projected, tokens, gradient)
            pulls.append(pull)
            gradients.append(gradient)
        return torch.stack(pulls), torch.stack(gradients)

    def _pull_back(self, reference_TD: Tensor, gradients_KTC: Tensor) -> Tensor:
        """J^T g of every pair, with the reference's Jacobian: (K, T, D)."""
        with torch.enable_grad():
            tokens = reference_TD.clone().requires_grad_()
            projected = self._project(tokens, self._reference_pair)
            rows = [
                torch.autograd.grad(projected, tokens, gradient, retain_graph=True)[0] for gradient in gradients_KTC
            ]
        return torch.stack(rows)

    def _project(self, tokens_TD: Tensor, pair: int) -> Tensor:
        return self._alignment.project_pair(tokens_TD[None], pair, self._member)[0]

    def result(self) -> TheoremReport:
        """The terms over all tokens so far. Raises ValueError: no batch."""
        if not self._tokens:
            raise ValueError("tokens: found none; accepted: at least one batch")
        means = {name: total / self._tokens for name, total in self._sums.items()}
        inner, features, at_reference = means["inner"], means["features"], means["reference"]
        low, high = (value[0] for value in _extreme_eigenvalues(features[None], at_reference[None]))
        c, eta = (low + high) / 2, (high - low) / (high + low)
        return TheoremReport(
            inner_KK=inner,
            features_KK=features,
            delta_KK=inner - at_reference,
            bound_KK=_bound(inner[None], features[None], at_reference[None], c[None], eta[None])[0],
            c=float(c),
            eta=float(eta),
            token_holds_KK=means["holds"],
            token_informative_KK=means["informative"],
            token_c=float(means["c"]),
            token_eta=float(means["eta"]),
            increment_K=means["increment"],
            tokens=self._tokens,
        )


def _token_gram(vectors_KTX: Tensor) -> Tensor:
    """Inner products of the K vectors of each token: (T, K, K) float64."""
    rows = vectors_KTX.double().transpose(0, 1)
    return rows @ rows.transpose(1, 2)


def _slack(inner: Tensor) -> Tensor:
    """Bound on what rounding takes from an inner product of these sizes."""
    sizes = inner.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return _SLACK + 1e-6 * sizes[..., :, None] * sizes[..., None, :]


def _extreme_eigenvalues(features_TKK: Tensor, common_TKK: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest eigenvalue (T,) of J J^T on the span of the g, from their Gram matrix and that of J^T g."""
    sizes, directions = torch.linalg.eigh(features_TKK)
    kept = sizes > _RANK_TOLERANCE * sizes[:, -1:].clamp(min=torch.finfo(sizes.dtype).tiny)
    scale = torch.where(kept, sizes.clamp(min=torch.finfo(sizes.dtype).tiny).rsqrt(), torch.zeros_like(sizes))
    basis = directions * scale[:, None, :]
    restricted = basis.transpose(1, 2) @ common_TKK @ basis
    # Directions outside the span get an eigenvalue inside the range: the mean of the others.
    mean = restricted.diagonal(dim1=1, dim2=2).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
    restricted = restricted + torch.diag_embed(torch.where(kept, torch.zeros_like(sizes), mean[:, None]))
    values = torch.linalg.eigvalsh(restricted)
    return values[:, 0].clamp(min=0), values[:, -1].clamp(min=torch.finfo(sizes.dtype).tiny)


def _bound(inner: Tensor, features: Tensor, common: Tensor, c: Tensor, eta: Tensor) -> Tensor:
    """The theorem's right-hand side, (T, K, K)."""
    sizes = features.diagonal(dim1=1, dim2=2)
    worst = (sizes[:, :, None] + sizes[:, None, :]) / 2
    return c[:, None, None] * (features - eta[:, None, None] * worst) - (inner - common).abs()
