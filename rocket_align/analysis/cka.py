"""Linear centered kernel alignment (Kornblith et al. 2019), biased and debiased.

The released code's "debiased" value only rescales both Gram matrices and so equals the biased one. Here
`debiased=True` is the unbiased HSIC estimator (Song et al. 2012), whose expectation for independent features is zero
however few samples there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
