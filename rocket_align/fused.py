"""Projector and cosine of one pair as one function, for float32 training on CPUs with AVX-512.

It forms the gradients together with the loss, while all they need lies in the processor's cache, and keeps them (those
of the projector once a pair) and references to its inputs until the backward pass. Values and gradients are those of
:func:`rocket_align.cosine_loss` after the projector, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        for_tokens, _, _, _, for_fc1, for_bias1, for_fc2, for_bias2, *for_norm = ctx.needs_input_grad
        rows, fc2, width = tokens.contiguous(), fc2.contiguous(), tokens.shape[-1:]
        normed, *moments = torch.ops.aten.native_layer_norm(rows, width, *norm, eps) if norm else [rows]
        x = normed.flatten(0, 1)
        before = product(x, fc1, bias1)
        hidden = F.gelu(before)
        projected = product(hidden, fc2, bias2)
        loss, by_projected = _cosine_loss(projected, target.reshape(projected.shape), shares.flatten())

        by_before = torch.ops.aten.gelu_backward(product(by_projected, fc2.t()), before)
        by_inputs: list[Tensor | None] = [None] * (1 + len(norm))  # Of tokens and norm
        if for_tokens or any(for_norm):
            by_inputs[0] = product(by_before, fc1.t()).view(tokens.shape)
        if norm and by_inputs[0] is not None:
            arguments = by_inputs[0], rows, width, *moments, *norm, [for_tokens, *for_norm]
            by_inputs = list(torch.ops.aten.native_layer_norm_backward(*arguments))
        by_weights = [
            product(by_before.t(), x.t()) if for_fc1 else None,
            by_before.sum(0) if for_bias1 else None,
            # Of the two ways to multiply, the one that rearranges the hidden units, of which there are fewer.
            product(hidden.t(), by_projected.t()).t() if for_fc2 else None,
            by_projected.sum(0) if for_bias2 else None,
        ]
        ctx.eps = eps
        ctx.save_for_backward(tokens, target, shares, *weights, by_inputs[0], *by_weights, *by_inputs[1:])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = len(ctx.needs_input_grad) - 1  # All but epsilon
        tokens, target, shares, *weights = ctx.saved_tensors[:inputs]
        if torch.is_grad_enabled():  # With create_graph: the gradients are to be differentiated in turn.
            loss = _differentiable_loss(tokens, target, shares, ctx.eps, *weights)
            gradients = _gradients(loss, [tokens, *weights], grad)
        else:
            gradients = [None if part is None else grad * part for part in ctx.saved_tensors[inputs:]]
        return gradients[0], None, None, None, *gradients[1:]


def _cosine_loss(x: Tensor, y: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the rows of share * (1 - cosine), where norms count as 1e-8 or more, and its gradient by x."""
    x_inverse, y_inverse = (torch.linalg.vector_norm(part, dim=1).clamp_min_(1e-8).reciprocal_() for part in (x, y))
    across = x_inverse * y_inverse
    cosine = torch.linalg.vecdot(x, y) * across
    along = shares * cosine * x_inverse.square()
    loss = shares @ torch.where(shares > 0, 1 - cosine, 0.0)  # Rows without a share may hold NaN.
    return loss, (x * along[:, None]).addcmul_(y, (-shares * across)[:, None])


def _differentiable_loss(tokens: Tensor, target: Tensor, shares: Tensor, eps: float, *weights: Tensor) -> Tensor:
    """The same loss by operations that torch differentiates as often as wanted."""
    fc1, bias1, fc2, bias2, *norm = weights
    x = F.layer_norm(tokens, tokens.shape[-1:], norm[0], norm[1], eps) if norm else tokens
    projected = F.linear(F.gelu(F.linear(x, fc1, bias1)), fc2, bias2)
    distances = 1 - F.cosine_similarity(projected, target, dim=-1)
    return (shares * torch.where(shares > 0, distances, 0.0)).sum()


def _gradients(loss: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    wanted = [part for part in inputs if part.requires_grad]
    gradients = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return [next(gradients) if part.requires_grad else None for part in inputs]


def _is_plain(projector: AlignmentProjector) -> bool:
    """Tell whether calling the projector does nothing but multiply: it is not wrapped or sharded and has no hooks."""
    return (
        type(projector) is AlignmentProjector
        and type(projector.vlm_norm) in (nn.LayerNorm, nn.Identity)
        and not any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
            for module in (projector, projector.vlm_norm)
        )
    )


def fuses(projector: AlignmentProjector, tokens_BND: Tensor, target_BNC: Tensor, mask_BN: Tensor | None) -> bool:
    """Tell whether `fused_loss` takes these arguments. Other devices and types, autocast, projectors with hooks or
    sharded, transforms of torch.func, compilation, broadcasts, and calls that want no gradient or one of the target
    are left to projector and cosine."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not _is_plain(projector):
        return False
    samples_tokens, parameters = tokens_BND.shape[:2], list(projector.parameters())
    return (
        torch.is_grad_enabled()
        and not target_BNC.requires_grad
        and any(part.requires_grad for part in (tokens_BND, *parameters))
        and tokens_BND.numel() > 0
        and target_BNC.shape == (*samples_tokens, projector.fc2.out_features)
        and (mask_BN is None or mask_BN.shape == samples_tokens)
        and multiplies(tokens_BND, target_BNC, *parameters)
    )


def fused_loss(
    projector: AlignmentProjector, pair: int, tokens_BND: Tensor, target_BNC: Tensor, mask_BN: Tensor | None
) -> Tensor:
    """Scalar `cosine_loss` of one pair's tokens after the projector, where `fuses` tells that this can be had; `pair`
    as in the projector's `forward`."""
    norm = projector.vlm_norm
    mask = tokens_BND.new_ones(tokens_BND.shape[:2]) if mask_BN is None else mask_BN.float()
    shares = mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * len(mask))
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else 0.0
    weights = projector.weights(projector.widths[pair])
    return _ProjectedCosineLoss.apply(tokens_BND, target_BNC, shares, eps, *weights)
