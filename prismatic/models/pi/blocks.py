"""Blocks of the two transformers of pi0 and pi0.5, whose streams share every attention.

A block is called as a module, once a forward, for hooks, FSDP and PEFT alike; gradient checkpointing acts below that.
Only keys and values pass from the prefix's block to the expert's, so each stream's block is a module of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig
from transformers.activations import ACT2FN

KeysValues = tuple[Tensor, Tensor]


class _ScaledNorm(torch.autograd.Function):
    """hidden / rms(hidden) * factor in float32, keeping `hidden` and one number a row for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, factor: Tensor, eps: float) -> Tensor:
        inverse = (hidden.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(hidden, inverse, factor)
        return hidden.float() * inverse * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, inverse, factor = ctx.saved_tensors
        normed, scaled = hidden.float() * inverse, gradients[0] * factor
        along = (scaled * normed).mean(-1, keepdim=True)
        hidden_gradient = ((scaled - normed * along) * inverse).type_as(hidden)
        return hidden_gradient, (gradients[0] * normed).sum_to_size(factor.shape), None


class RMSNorm(nn.Module):
    """Gemma's RMS norm in float32; its weight is stored as the difference from 1."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return _ScaledNorm.apply(hidden_BSD, 1 + self.weight.float(), self.eps).type_as(hidden_BSD)


class AdaptiveRMSNorm(nn.Module):
    """RMS norm whose scale, shift and gate are a linear function of a condition (openpi's adaRMS).

    It starts as the identity of a gated residual: zero weights give gate 0.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden_BSD: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalized states and the gate [B, 1, D] of the branch that they enter."""
        scale, shift, gate = self.dense(condition_BD.to(self.dense.weight.dtype))[:, None].float().chunk(3, dim=-1)
        normed = _ScaledNorm.apply(hidden_BSD, 1 + scale, self.eps) + shift
        return normed.type_as(hidden_BSD), gate.type_as(hidden_BSD)


def rotary(positions_BS: Tensor, head_dim: int, theta: float) -> KeysValues:
    """Cosines and sines [B, S, 1, head_dim] of rotary position embeddings, in float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions_BS.device).float() / head_dim
    angles = positions_BS[..., None, None].float() * (1.0 / theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(heads_BSHD: Tensor, rope: KeysValues) -> Tensor:
    cos, sin = (part.to(heads_BSHD.dtype) for part in rope)
    first, second = heads_BSHD.chunk(2, dim=-1)
    return heads_BSHD * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Projections of a Gemma attention; queries of one stream, keys and values of one or both."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, width, bias=config.attention_bias)

    def keys_values(self, normed_BSD: Tensor, rope: KeysValues) -> KeysValues:
        """Rotated keys and values, [B, S, key heads, head_dim] each."""
        shape = (*normed_BSD.shape[:2], -1, self.head_dim)
        return _rotate(self.k_proj(normed_BSD).view(shape), rope), self.v_proj(normed_BSD).view(shape)

    def queries(self, normed_BSD: Tensor, rope: KeysValues) -> Tensor:
        """Rotated queries [B, S, heads, head_dim]."""
        return _rotate(self.q_proj(normed_BSD).view(*normed_BSD.shape[:2], -1, self.head_dim), rope)

    def forward(self, queries_BSHD: Tensor, keys_values: KeysValues, mask: Tensor) -> Tensor:
        """Attend to keys and values of any stream.

        Args:
            mask: [B, 1, 1 or S, keys] of the queries' type, added to the scores. A bool mask would be converted, and
                kept for the backward pass, in every block.
        """
        # Views: no copy of the keys for each query head where there is one key head, as in all published models.
        keys, values = (
            part.transpose(1, 2)[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(1, 2) for part in keys_values
        )
        attended = _attend(queries_BSHD.transpose(1, 2), keys, values, mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of [B, heads, S, head_dim]; trained in bfloat16 on a CPU without torch's kernel.

    The backward pass of that kernel takes half of a training step there.
    """
    if queries.device.type != "cpu" or queries.dtype != torch.bfloat16 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1]) + mask
    return scores.softmax(-1) @ values


class _GatedProduct(torch.autograd.Function):
    """Product act(gate) * up that keeps nothing but its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.act(gate)
        (gate_gradient,) = torch.autograd.grad(activated, gate, gradients[0] * up)
        return gate_gradient, gradients[0] * activated.detach(), None


def _recomputed(tensor: Tensor, compute: Callable[[], Tensor]) -> saved_tensors_hooks:
    """A context in which autograd keeps the shape of `tensor`; the backward pass has it from `compute`, once."""
    start, size = tensor.data_ptr(), tensor.numel()
    pending, again = 0, None

    def pack(saved: Tensor) -> Tensor | torch.Size:
        nonlocal pending
        if saved.data_ptr() != start or saved.numel() != size or not saved.is_contiguous():
            return saved
        pending += 1
        return saved.shape

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        nonlocal pending, again
        if isinstance(packed, Tensor):
            return packed
        if again is None:
            with torch.no_grad():
                again = compute()
        value, pending = again.view(packed), pending - 1
        if pending <= 0:
            again = None
        return value

    return saved_tensors_hooks(pack, unpack)


class MLP(nn.Module):
    """Gemma's gated MLP. Training keeps its two wide projections alone, of four wide tensors; the rest is cheap."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        width, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, wide, bias=False)
        self.up_proj = nn.Linear(width, wide, bias=False)
        self.down_proj = nn.Linear(wide, width, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, normed_BSD: Tensor, *, frugal: bool = True) -> Tensor:
        """Map [B, S, D] to [B, S, D]; without `frugal` all activations are kept, as within a checkpoint."""
        gate, up = self.gate_proj(normed_BSD), self.up_proj(normed_BSD)
        if not frugal or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.down_proj(self.act_fn(gate) * up)
        product = _GatedProduct.apply(gate, up, self.act_fn)
        with _recomputed(product, lambda: self.act_fn(gate) * up):
            return self.down_proj(product)


class Block(nn.Module):
    """One transformer block of either stream.

    Args:
        adaptive: norms take the condition of pi0.5's expert.
    """

    def __init__(self, config: GemmaConfig, *, adaptive: bool) -> None:
        super().__init__()
        norm = AdaptiveRMSNorm if adaptive else RMSNorm
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_BSD: Tensor,
        rope: KeysValues,
        mask: Tensor,
        *,
        past: KeysValues | None = None,
        condition: Tensor | None = None,
        keys_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the block.

        Args:
            rope: of this stream's positions, see :func:`rotary`.
            mask: see :meth:`Attention.forward`.
            past: keys and values of the other stream, which come before this one's.
            condition: [B, D] for adaptive norms.
            keys_only: compute keys and values alone, and return the states as they came.

        Returns:
            States after the block, and this stream's keys and values [B, S, key heads, head_dim].
        """
        if keys_only:
            normed, _ = _normed(self.input_layernorm, hidden_BSD, condition)
            return hidden_BSD, *self.self_attn.keys_values(normed, rope)
        run = partial(self._run, rope=rope, mask=mask, past=past, condition=condition)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(run, hidden_BSD, frugal=False, use_reentrant=False)
        return run(hidden_BSD, frugal=True)

    def _run(
        self,
        hidden: Tensor,
        *,
        rope: KeysValues,
        mask: Tensor,
        past: KeysValues | None,
        condition: Tensor | None,
        frugal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, gate = _normed(self.input_layernorm, hidden, condition)
        frugal_norms = frugal and past is None  # Most tokens are the prefix's.
        with _kept(self.input_layernorm, hidden, normed, frugal_norms):
            keys, values = self.self_attn.keys_values(normed, rope)
            queries = self.self_attn.queries(normed, rope)
        seen = (keys, values)
        if past is not None:
            seen = (torch.cat([past[0], keys], dim=1), torch.cat([past[1], values], dim=1))
        hidden = _residual(hidden, self.self_attn(queries, seen, mask), gate)
        normed, gate = _normed(self.post_attention_layernorm, hidden, condition)
        with _kept(self.post_attention_layernorm, hidden, normed, frugal_norms):
            branch = self.mlp(normed, frugal=frugal)
        return _residual(hidden, branch, gate), keys, values


def _normed(norm: nn.Module, hidden: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (norm(hidden), None) if condition is None else norm(hidden, condition)


def _kept(norm: nn.Module, hidden: Tensor, normed: Tensor, frugal: bool) -> AbstractContextManager[object]:
    """A context in which projections keep `normed`; or not, where the norm is cheap to do again and has no hooks."""
    plain = type(norm) is RMSNorm and not (norm._forward_hooks or norm._forward_pre_hooks)
    if not (frugal and plain and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return nullcontext()
    return _recomputed(normed, lambda: norm.forward(hidden))


def _residual(hidden: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return hidden + branch if gate is None else hidden + branch * gate
