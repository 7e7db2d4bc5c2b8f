"""transformers' Llama layers in fewer passes over memory, for float32 training; the same numbers up to rounding.

`use_fused_layers` changes the classes of a Llama's modules in place: names, parameters and hooks stay. Where gradients
are off, for other types, under autocast, with a cache or another attention than "sdpa", they are transformers' own.

Not obvious: the decoder layer's class keeps its name, since sharding finds the layers to wrap by it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from prismatic.util.matmul import is_plain_float32


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        for_weight = (grad * x * inverse).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        scaled = grad * weight
        along = (scaled * x).sum(-1, keepdim=True) * inverse.pow(3) / -x.shape[-1]
        return scaled.mul_(inverse).addcmul_(x, along), for_weight, None


class _Rotate(torch.autograd.Function):
    """Queries or keys (B, H, S, D) turned: channels i and i + D/2 form a plane; `sin` is negative in its first half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (grad * cos).addcmul_(grad.roll(grad.shape[-1] // 2, -1), sin, value=-1), None, None


class LlamaRMSNorm(modeling_llama.LlamaRMSNorm):
    """The norm as one function with a backward pass of its own."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if not (torch.is_grad_enabled() and is_plain_float32(hidden_states, self.weight)):
            return super().forward(hidden_states)
        return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class LlamaAttention(modeling_llama.LlamaAttention):
    """Attention whose rotation is one function, and which may leave out queries that nobody reads."""

    def fused(self, x_BSD: Tensor, position_embeddings: Any, attention_mask: Tensor | None, first: int) -> Tensor:
        """Outputs (B, S - first, D) of the queries from `first` on."""
        cos, sin = (table.unsqueeze(1) for table in position_embeddings)
        half = sin.shape[-1] // 2
        signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        states = (self.q_proj(x_BSD[:, first:]), self.k_proj(x_BSD), self.v_proj(x_BSD))
        query, key, value = (state.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for state in states)
        query = _Rotate.apply(query, cos[..., first:, :], signed[..., first:, :])
        key = _Rotate.apply(key, cos, signed)
        mask = None if attention_mask is None else attention_mask[:, :, first:]
        dropout = float(self.attention_dropout or 0.0) if self.training else 0.0
        grouped = self.num_key_value_groups > 1
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=self.scaling, enable_gqa=grouped
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class LlamaDecoderLayer(modeling_llama.LlamaDecoderLayer):
    """A layer that may compute its last rows alone.

    Attributes:
        first_row: in training, rows before it keep what the layer was given.
    """

    first_row = 0

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """(B, S, D) -> (B, S, D)."""
        cached = kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None
        sdpa = self.self_attn.config._attn_implementation == "sdpa"
        if cached or not (sdpa and torch.is_grad_enabled() and is_plain_float32(hidden_states)):
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        first, attention = self.first_row, cast(LlamaAttention, self.self_attn)
        normed = self.input_layernorm(hidden_states)
        mixed = attention.fused(normed, kwargs["position_embeddings"], attention_mask, first)
        rows = hidden_states[:, first:] + mixed
        rows = rows + self.mlp(self.post_attention_layernorm(rows))
        return torch.cat([hidden_states[:, :first], rows], dim=1) if first else rows


_CLASSES = {
    modeling_llama.LlamaRMSNorm: LlamaRMSNorm,
    modeling_llama.LlamaAttention: LlamaAttention,
    modeling_llama.LlamaDecoderLayer: LlamaDecoderLayer,
}


def use_fused_layers(llama: nn.Module) -> None:
    """Let the modules of a Llama compute as the classes here, in place."""
    for module in llama.modules():
        if fused := _CLASSES.get(type(module)):
            module.__class__ = fused
