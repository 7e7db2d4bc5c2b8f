"""Projector and cosine of one pair as one function, for float32 training on CPUs with AVX-512.

It forms the gradients together with the loss, while all they need lies in the processor's cache, and keeps nothing
else. Values and gradients are those of :func:`rocket_align.cosine_loss` after the projector, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rocket_align.matmul import multiplies, product
from rocket_align.projector import AlignmentProjector


class _ProjectedCosineLoss(torch.autograd.Function):
    """(tokens (B, N, D), targets (B, N, C), shares of the tokens in the mean (B, N), epsilon of the norm, the
    projector's weights) -> loss."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, target: Tensor, shares: Tensor, eps: float, *weights: Tensor) -> Tensor:
        fc1, bias1, fc2, bias2, *norm = weights
        tokens, fc2, width = tokens.contiguous(), fc2.contiguous(), tokens.shape[-1:]
        normed, *moments = torch.ops.aten.native_layer_norm(tokens, width, *norm, eps) if norm else [tokens]
        x = normed.flatten(0, 1)
        before = product(x, fc1, bias1)
        hidden = F.gelu(before)
        projected = product(hidden, fc2, bias2)
        loss, by_projected = _cosine_loss(projected, target.reshape(projected.shape), shares.flatten())

        by_before = torch.ops.aten.gelu_backward(product(by_projected, fc2.t()), before)
        by_tokens = product(by_before, fc1.t()).view(tokens.shape)
        by_fc1 = product(by_before.t(), x.t()), by_before.sum(0)
        # Of the two ways to multiply, the one that rearranges the hidden units, of which there are fewer.
        by_fc2 = product(hidden.t(), by_projected.t()).t(), by_projected.sum(0)
        by_norm: list[Tensor] = []
        if norm:
            arguments = by_tokens, tokens, width, *moments, *norm, [True] * 3
            by_tokens, *by_norm = torch.ops.aten.native_layer_norm_backward(*arguments)
        ctx.save_for_backward(by_tokens, *by_fc1, *by_fc2, *by_norm)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_tokens, *by_weights = (grad * gradient for gradient in ctx.saved_tensors)
        return by_tokens, None, None, None, *by_weights


def _cosine_loss(x: Tensor, y: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the rows of share * (1 - cosine), where norms count as 1e-8 or more, and its gradient by x."""
    x_inverse, y_inverse = (torch.linalg.vector_norm(part, dim=1).clamp_min_(1e-8).reciprocal_() for part in (x, y))
    across = x_inverse * y_inverse
    cosine = torch.linalg.vecdot(x, y) * across
    along = shares * cosine * x_inverse.square()
    return shares @ (1 - cosine), (x * along[:, None]).addcmul_(y, (-shares * across)[:, None])


def fused_loss(
    projector: AlignmentProjector, width: int, tokens_BND: Tensor, target_BNC: Tensor, mask_BN: Tensor | None
) -> Tensor | None:
    """Scalar `cosine_loss` of a pair's tokens after `width` hidden units of the projector; None where that is not for
    this function: other devices and types, autocast, no gradients."""
    weights, norm = projector.weights(width), projector.vlm_norm
    if not (torch.is_grad_enabled() and tokens_BND.numel() and multiplies(tokens_BND, target_BNC, *weights)):
        return None
    mask = torch.ones(tokens_BND.shape[:2]) if mask_BN is None else mask_BN
    shares = mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * len(mask))
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else 0.0
    return _ProjectedCosineLoss.apply(tokens_BND, target_BNC, shares, eps, *weights)
