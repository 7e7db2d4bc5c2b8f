"""Linear centered kernel alignment (Kornblith et al. 2019), biased and debiased.

The released code's "debiased" value only rescales both Gram matrices and so equals the biased one. Here
`debiased=True` is the unbiased HSIC estimator (Song et al. 2012), whose expectation for independent features is zero
however few samples there are.

`StreamingCKA` takes batches; its memory does not grow with the samples. Two estimators. "exact" keeps cross-covariances
and gives what `cka_map` gives for all samples at once, biased or debiased; its memory is the product of the widths for
every pair of layers (OpenVLA-7B with VGGT-1B: 53 GB). "minibatch" averages the unbiased HSIC of the batches (Nguyen et
al. 2021): a few numbers per pair of layers, for any width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Estimator = Literal["exact", "minibatch"]


def prepared_gram(x_ND: Tensor, debiased: bool) -> Tensor:
    """A float64 Gram matrix such that CKA is the cosine of two of them (as vectors)."""
    if x_ND.ndim != 2:
        raise ValueError(f"features: found shape {tuple(x_ND.shape)}; accepted: (samples, channels)")
    samples = x_ND.shape[0]
    if samples < (4 if debiased else 2):
        raise ValueError(f"features: found {samples} samples; accepted: {4 if debiased else 2} or more")
    features = x_ND.double()
    if not debiased:
        features = features - features.mean(dim=0)
        return features @ features.T
    # U-centering (Szekely & Rizzo 2014): inner products of such matrices are n (n - 3) times unbiased HSIC.
    # Subtracting the mean first changes nothing in exact arithmetic, but keeps the numbers small.
    features = features - features.mean(dim=0)
    gram = (features @ features.T).fill_diagonal_(0)
    rows = gram.sum(dim=0) / (samples - 2)
    centered = gram - rows[:, None] - rows[None, :] + gram.sum() / ((samples - 1) * (samples - 2))
    return centered.fill_diagonal_(0)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    scale = first.norm() * second.norm()
    return torch.where(scale > 0, (first * second).sum() / scale, torch.zeros_like(scale))


def linear_cka(x: Tensor, y: Tensor, debiased: bool = False) -> Tensor:
    """Similarity of two sets of features of the same samples.

    Args:
        x, y: (samples, channels); the channel counts may differ.
        debiased: use the unbiased estimator, which needs 4 samples and may be slightly negative.

    Returns:
        Float64 scalar, 1 for features that are equal up to rotation and scale, 0 if one of them is constant.

    Raises:
        ValueError: not two-dimensional, too few samples, or different numbers of samples.
    """
    if len(x) != len(y):
        raise ValueError(f"features: found {len(x)} and {len(y)} samples; accepted: the same samples twice")
    return _cosine(prepared_gram(x, debiased), prepared_gram(y, debiased))


def cka_map(students: Sequence[Tensor], teachers: Sequence[Tensor], debiased: bool = False) -> Tensor:
    """`linear_cka` of every student layer with every teacher layer: (len(students), len(teachers)), each Gram once."""
    columns = [prepared_gram(features, debiased) for features in teachers]
    rows = []
    for features in students:
        gram = prepared_gram(features, debiased)
        rows.append(torch.stack([_cosine(gram, column) for column in columns]))
    return torch.stack(rows)


class _Moments:
    """Sums over samples of two sets of features, enough for both HSIC estimators of the linear kernel."""

    def __init__(self) -> None:
        self.cross: Tensor | None = None

    def add(self, x_ND: Tensor, y_NE: Tensor) -> None:
        x_sizes, y_sizes = x_ND.square().sum(dim=1), y_NE.square().sum(dim=1)
        new = (x_ND.T @ y_NE, x_ND.T @ y_sizes, y_NE.T @ x_sizes, x_sizes @ y_sizes)
        if self.cross is None:
            self.cross, self.x_weighted, self.y_weighted, self.sizes = new
        else:
            self.cross += new[0]
            self.x_weighted, self.y_weighted = self.x_weighted + new[1], self.y_weighted + new[2]
            self.sizes = self.sizes + new[3]

    def hsic(self, x: _Sums, y: _Sums, samples: int, debiased: bool) -> Tensor:
        """HSIC of the two sets up to a factor that is the same for all sets."""
        assert self.cross is not None
        if not debiased:
            return (self.cross - torch.outer(x.sum, y.sum) / samples).square().sum()
        # Song et al. 2012, equation 5, with the Gram matrices' sums written as sums over features.
        diagonal_free = self.cross.square().sum() - self.sizes
        rows = x.sum @ self.cross @ y.sum - x.sum @ self.x_weighted - y.sum @ self.y_weighted + self.sizes
        totals = (x.sum.square().sum() - x.squares) * (y.sum.square().sum() - y.squares)
        return diagonal_free + totals / ((samples - 1) * (samples - 2)) - 2 / (samples - 2) * rows


@dataclass
class _Sums:
    """Sum and summed squares of one set of features."""

    sum: Tensor
    squares: Tensor


class StreamingCKA:
    """Accumulates batches; `result` is the map so far.

    Args:
        debiased: the unbiased HSIC estimator ("minibatch" is always unbiased).
        estimator: "exact" or "minibatch".

    Raises:
        ValueError: an unknown estimator, or "minibatch" without `debiased`.
    """

    def __init__(self, *, debiased: bool = False, estimator: Estimator = "exact") -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator: found {estimator!r}; accepted: {', '.join(get_args(Estimator))}")
        if estimator == "minibatch" and not debiased:
            raise ValueError("estimator: minibatch found with debiased False; accepted: exact, or debiased True")
        self.debiased, self.estimator = debiased, estimator
        self.samples = 0
        self._offsets: list[list[Tensor]] = []
        self._sums: list[list[_Sums]] = []
        self._moments: dict[tuple[int, int, int, int], _Moments] = {}
        self._hsic: list[Tensor] = []

    def update(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
        """Add a batch: per layer (samples, channels), the same samples everywhere.

        Raises ValueError: different numbers of samples, or fewer than 4 of them with "minibatch".
        """
        counts = {len(features) for features in (*students, *teachers)}
        if len(counts) != 1:
            raise ValueError(f"features: found {sorted(counts)} samples; accepted: the same samples in every layer")
        (count,) = counts
        if self.estimator == "minibatch":
            self._add_minibatch(students, teachers, count)
        else:
            self._add_moments([students, teachers])
        self.samples += count

    def _add_minibatch(self, students: Sequence[Tensor], teachers: Sequence[Tensor], count: int) -> None:
        rows = [prepared_gram(features, True) for features in students]
        columns = [prepared_gram(features, True) for features in teachers]
        # n (n - 3) makes HSIC of the U-centered matrices; weighted by n, so that samples count the same.
        weight = 1 / (count - 3)
        cross = torch.stack([torch.stack([(row * column).sum() for column in columns]) for row in rows])
        own = [torch.stack([gram.square().sum() for gram in grams]) for grams in (rows, columns)]
        new = [weight * value for value in (cross, *own)]
        self._hsic = [old + value for old, value in zip(self._hsic, new)] if self._hsic else new

    def _add_moments(self, sides: Sequence[Sequence[Tensor]]) -> None:
        if not self._offsets:
            # Any fixed offset leaves both estimators as they are; the first batch's mean keeps the numbers small.
            self._offsets = [[features.double().mean(dim=0) for features in side] for side in sides]
            self._sums = [
                [_Sums(torch.zeros_like(offset), offset.new_zeros(())) for offset in side] for side in self._offsets
            ]
        shifted = [
            [features.double() - offset for features, offset in zip(side, offsets, strict=True)]
            for side, offsets in zip(sides, self._offsets)
        ]
        for side, sums in zip(shifted, self._sums):
            for features, total in zip(side, sums):
                total.sum += features.sum(dim=0)
                total.squares += features.square().sum()
        for key in self._pairs():
            first, second = shifted[key[0]][key[1]], shifted[key[2]][key[3]]
            self._moments.setdefault(key, _Moments()).add(first, second)

    def _pairs(self) -> list[tuple[int, int, int, int]]:
        """(side, layer, side, layer): every student with every teacher, and every layer with itself."""
        students, teachers = (range(len(side)) for side in self._sums)
        own = [(0, layer, 0, layer) for layer in students] + [(1, layer, 1, layer) for layer in teachers]
        return [(0, student, 1, teacher) for student in students for teacher in teachers] + own

    def result(self) -> Tensor:
        """(student layers, teacher layers) float64; 0 where a layer is constant. Raises ValueError: too few samples."""
        needed = 4 if self.debiased else 2
        if self.samples < needed:
            raise ValueError(f"features: found {self.samples} samples; accepted: {needed} or more")
        if self.estimator == "minibatch":
            cross, rows, columns = self._hsic
        else:
            values = {key: self._exact_hsic(key) for key in self._pairs()}
            students, teachers = (range(len(side)) for side in self._sums)
            cross = torch.stack([torch.stack([values[0, s, 1, t] for t in teachers]) for s in students])
            rows = torch.stack([values[0, s, 0, s] for s in students])
            columns = torch.stack([values[1, t, 1, t] for t in teachers])
        scale = (rows.clamp(min=0)[:, None] * columns.clamp(min=0)).sqrt()
        return torch.where(scale > 0, cross / scale, torch.zeros_like(cross))

    def _exact_hsic(self, key: tuple[int, int, int, int]) -> Tensor:
        x, y = self._sums[key[0]][key[1]], self._sums[key[2]][key[3]]
        return self._moments[key].hsic(x, y, self.samples, self.debiased)
