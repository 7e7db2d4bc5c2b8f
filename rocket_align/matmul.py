"""float32 matrix products of the teacher and the projectors on CPUs with AVX-512: by oneDNN instead of MKL.

torch multiplies float32 matrices with MKL, which keeps to AVX2 on processors of other makers than Intel; oneDNN, which
torch has for convolutions and narrower types, does not, and is 2.2 times as fast there. The operator is the one that
torch.compile puts in place of `F.linear`. Results differ in rounding alone. Everywhere else (other devices, types,
autocast, subclasses of tensors) these are `F.linear` and `F.scaled_dot_product_attention` themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The capability is lower in an environment that asks for it (ATEN_CPU_CAPABILITY).
_USABLE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
# Queries whose scores against some thousand keys stay in a core's cache.
_QUERIES = 256


def autocasts(device_type: str) -> bool:
    """Tell whether autocast is on; before torch 2.4, each kind of device has a query of its own."""
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:
        return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()


def multiplies(*tensors: Tensor) -> bool:
    """Tell whether oneDNN multiplies these tensors here."""
    return (
        _USABLE
        and all(
            type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
            for tensor in tensors
        )
        and not autocasts("cpu")
        and not torch.jit.is_tracing()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) times the transpose of weight (O, I) without gradients, for tensors that `multiplies` accepts."""
    # Weights with gaps in memory would fall to a reference loop, a thousand times as slow.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), (for_x, for_weight, for_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.t()) if for_x else None,
            linear(rows.t(), x.flatten(0, -2).t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, with gradients: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    if x.numel() == 0 or not multiplies(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


def attention(query_BHSD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor) -> Tensor:
    """`F.scaled_dot_product_attention`, every token seeing every other; fast where no gradients are wanted."""
    if torch.is_grad_enabled() or not multiplies(query_BHSD, key_BHSD, value_BHSD):
        return F.scaled_dot_product_attention(query_BHSD, key_BHSD, value_BHSD)
    scaled = query_BHSD * query_BHSD.shape[-1] ** -0.5
    if query_BHSD.shape[2] < _QUERIES:
        # So few scores that one product of all heads costs less than a call for each.
        scores = torch.matmul(scaled, key_BHSD.transpose(-1, -2))
        return torch.matmul(torch.softmax(scores, dim=-1, out=scores), value_BHSD)
    # (B, S, H, D) in memory, as the projection that follows reads it.
    mixed = torch.empty_like(scaled.transpose(1, 2), memory_format=torch.contiguous_format)
    for sample in range(len(scaled)):
        for head in range(scaled.shape[1]):
            key, value = key_BHSD[sample, head].contiguous(), value_BHSD[sample, head].contiguous().t()
            for first in range(0, scaled.shape[2], _QUERIES):
                scores = product(scaled[sample, head, first : first + _QUERIES], key)
                torch.softmax(scores, dim=-1, out=scores)
                mixed[sample, first : first + _QUERIES, head] = product(scores, value)
    return mixed.transpose(1, 2)
