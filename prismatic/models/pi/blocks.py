"""Blocks of the two transformers of pi0 and pi0.5, whose streams share every attention.

A block is called as a module, once a forward, for hooks, FSDP and PEFT alike; gradient checkpointing acts below that.
Only keys and values pass from the prefix's block to the expert's, so each stream's block is a module of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm

KeysValues = tuple[Tensor, Tensor]


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
        normed = F.rms_norm(hidden_BSD.float(), hidden_BSD.shape[-1:], eps=self.eps)
        return (normed * (1 + scale) + shift).type_as(hidden_BSD), gate.type_as(hidden_BSD)


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

    def forward(self, normed_BSD: Tensor, rope: KeysValues, keys_values: KeysValues, mask: Tensor) -> Tensor:
        """Attend to keys and values of any stream.

        The queries of a key head are folded into the sequence: no copy of the keys for each query head.

        Args:
            mask: bool [B, 1, 1 or S * groups, keys], True where a query may look.
        """
        batch, length, _ = normed_BSD.shape
        queries = _rotate(self.q_proj(normed_BSD).view(batch, length, -1, self.head_dim), rope)
        keys, values = (part.transpose(1, 2) for part in keys_values)
        folded = queries.view(batch, length, -1, self.groups, self.head_dim).transpose(1, 2).flatten(2, 3)
        attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
        unfolded = attended.view(batch, -1, length, self.groups * self.head_dim).transpose(1, 2)
        return self.o_proj(unfolded.reshape(batch, length, -1))


class Block(nn.Module):
    """One transformer block of either stream.

    Args:
        adaptive: norms take the condition of pi0.5's expert.
    """

    def __init__(self, config: GemmaConfig, *, adaptive: bool) -> None:
        super().__init__()
        norm = AdaptiveRMSNorm if adaptive else GemmaRMSNorm
        self.self_attn = Attention(config)
        self.mlp = GemmaMLP(config)
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
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self._run, hidden_BSD, rope, mask, past, condition, use_reentrant=False)
        return self._run(hidden_BSD, rope, mask, past, condition)

    def _run(
        self, hidden: Tensor, rope: KeysValues, mask: Tensor, past: KeysValues | None, condition: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, gate = _normed(self.input_layernorm, hidden, condition)
        keys, values = self.self_attn.keys_values(normed, rope)
        seen = (keys, values)
        if past is not None:
            seen = (torch.cat([past[0], keys], dim=1), torch.cat([past[1], values], dim=1))
        hidden = _residual(hidden, self.self_attn(normed, rope, seen, mask), gate)
        normed, gate = _normed(self.post_attention_layernorm, hidden, condition)
        return _residual(hidden, self.mlp(normed), gate), keys, values


def _normed(norm: nn.Module, hidden: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (norm(hidden), None) if condition is None else norm(hidden, condition)


def _residual(hidden: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return hidden + branch if gate is None else hidden + branch * gate
