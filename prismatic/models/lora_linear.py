"""A linear layer and its LoRA adapter as one function with a backward pass of its own, for float32.

PEFT computes x W + s (x A) B as three products, a product with the scale and a sum, and the backward pass twice as
many. Here, where there are many more tokens than channels, W + s B A is formed first and multiplied once. Values and
gradients are PEFT's up to rounding; parameters, state dicts and everything else stay PEFT's.

Not obvious: the sum of weights is formed in float32 only, where an update that is small beside W survives it. It is
formed again in the backward pass, since keeping it would cost as much memory as the model.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from prismatic.util.matmul import is_plain_float32, product

# Tokens for each harmonic mean of a layer's widths above which forming the sum of weights pays.
_ROWS_TO_MERGE = 4


class _LinearWithAdapter(torch.autograd.Function):
    """(x, W, bias, A, B, scale) -> x (W + scale B A)^T + bias; W and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        weight, bias, lora_a, lora_b, scale = parameters
        (out_dim, in_dim), rows = weight.shape, x.numel() // x.shape[-1]
        ctx.scale, ctx.merged = scale, rows * (in_dim + out_dim) >= _ROWS_TO_MERGE * in_dim * out_dim
        if ctx.merged:
            ctx.save_for_backward(x, weight, lora_a, lora_b)
            return product(x, torch.addmm(weight, lora_b, lora_a, alpha=scale), bias)
        narrow = product(x, lora_a)
        ctx.save_for_backward(x, weight, lora_a, lora_b, narrow)
        return product(x, weight, bias).add_(product(narrow, lora_b), alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, *narrow = ctx.saved_tensors
        scale, rank = ctx.scale, len(lora_a)
        rows, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = None
        if ctx.merged and weight.numel() <= 2 * rank * sum(weight.shape):
            # The gradient of the whole matrix is smaller than those of both factors' inputs.
            whole = product(rows.t(), x_rows.t())
            grads = product(lora_b.t(), whole.t()), product(whole, lora_a)
        else:
            by_b = product(rows, lora_b.t())
            by_a = narrow[0].reshape(-1, rank) if narrow else product(x_rows, lora_a)
            grads = product(by_b.t(), x_rows.t()), product(rows.t(), by_a.t())
        if ctx.needs_input_grad[0] and ctx.merged:
            grad_x = product(grad, torch.addmm(weight, lora_b, lora_a, alpha=scale).t())
        elif ctx.needs_input_grad[0]:
            grad_x = product(grad, weight.t()).add_(product(by_b, lora_a.t()).view_as(x), alpha=scale)
        return grad_x, None, None, grads[0].mul_(scale), grads[1].mul_(scale), None


class FusedLoraLinear(LoraLinear):
    """PEFT's linear layer with an adapter, computed as one function where nothing but a plain adapter is asked for."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., I) -> (..., O)."""
        name = str(self.active_adapters[0]) if len(self.active_adapters) == 1 else ""
        if args or kwargs or name not in self.lora_A or not self._is_plain(name, x):
            return super().forward(x, *args, **kwargs)
        base, lora_a, lora_b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        return _LinearWithAdapter.apply(x, base.weight, base.bias, lora_a, lora_b, self.scaling[name])

    def _is_plain(self, name: str, x: Tensor) -> bool:
        base, lora_a, lora_b = self.base_layer, self.lora_A[name], self.lora_B[name]
        return (
            not (self.disable_adapters or self.merged or name in self.lora_variant)
            and not (self.training and not isinstance(self.lora_dropout[name], nn.Identity))
            and not (base.weight.requires_grad or lora_b.bias is not None)
            # Weights that are elsewhere until their own module is called have another shape.
            and lora_a.weight.ndim == base.weight.ndim == 2
            and is_plain_float32(x, base.weight, base.bias, lora_a.weight, lora_b.weight)
        )


def fuse_lora_layers(model: nn.Module) -> None:
    """Let every linear layer of `model` that has a PEFT adapter compute as :class:`FusedLoraLinear`, in place."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear and not module.fan_in_fan_out:
            module.__class__ = FusedLoraLinear
