"""The alignment loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cosine_loss(projected: Tensor, target: Tensor) -> Tensor:
    """Mean over samples and tokens of 1 - cos(projected, target), computed in float32.

    Source: the paper's alignment term before its average over pairs.

    Args:
        projected, target: (..., B, N, C).

    Returns:
        The leading dimensions, 0 (same direction) to 2 (opposite).
    """
    return 1 - F.cosine_similarity(projected.float(), target.float(), dim=-1).mean(dim=(-2, -1))
