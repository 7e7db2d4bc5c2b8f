"""Share of an alignment's targets that the token's place alone explains, the same in every picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class StaticShare:
    """Numbers of the targets' directions (unit vectors), for K pairs and V views; (K, V) float64 each."""

    explained_KV: Tensor  # Share of the variance about the view's mean that the mean of each place explains, 0 to 1
    constant_loss_KV: Tensor  # Alignment loss (1 - cosine) of the best constant per place, which sees no picture
    remaining_KV: Tensor  # Variance about the mean of each place, for unit vectors: what only a picture can tell


class StaticTargets:
    """Accumulates pooled targets batch by batch; keeps one sum per pair, place and channel, however many samples.

    With unit vectors u of places n and m_n their means, the variance in all is 1 - |mean m_n|^2, that within places
    1 - mean |m_n|^2, and the best constant per place is m_n / |m_n|, whose mean cosine with u is |m_n|.

    Args:
        num_views: views that the tokens belong to, in equal parts.

    Raises:
        ValueError: fewer than one view.
    """

    def __init__(self, num_views: int) -> None:
        if num_views < 1:
            raise ValueError(f"num_views: found {num_views}; accepted: 1 or more")
        self.num_views = num_views
        self.samples = 0
        self._sum_KNC = torch.zeros((), dtype=torch.float64)

    def update(self, targets_KBNC: Tensor) -> None:
        """Add the targets of a batch, as `MultiLayerAlignment.targets` gives them.

        Raises ValueError: tokens that do not divide into the views.
        """
        if targets_KBNC.shape[2] % self.num_views:
            raise ValueError(
                f"targets: found {targets_KBNC.shape[2]} tokens; accepted: a multiple of the {self.num_views} views"
            )
        total_KNC = F.normalize(targets_KBNC.double(), dim=-1).sum(dim=1)
        self._sum_KNC = self._sum_KNC.to(total_KNC.device) + total_KNC
        self.samples += targets_KBNC.shape[1]

    def result(self) -> StaticShare:
        """The numbers of all samples so far; a share is NaN where the targets do not vary.

        Raises ValueError: no batch.
        """
        if not self.samples:
            raise ValueError("targets: found none; accepted: at least one batch")
        mean_KVPC = (self._sum_KNC / self.samples).unflatten(1, (self.num_views, -1))
        lengths_KVP = mean_KVPC.norm(dim=-1)
        remaining_KV = 1 - lengths_KVP.square().mean(dim=-1)
        variance_KV = 1 - mean_KVPC.mean(dim=2).square().sum(dim=-1)
        return StaticShare(1 - remaining_KV / variance_KV, 1 - lengths_KVP.mean(dim=-1), remaining_KV)
