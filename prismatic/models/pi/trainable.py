"""Parameters of pi0 and pi0.5 by what trains them: adapters, all of it, or no gradient at all.

PEFT's "all-linear" would adapt the heads as well, and the dead layers of the last prefix block.
"""

from __future__ import annotations

from torch import nn

from prismatic.models.pi.model import PiPolicy

_LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def dead_modules(policy: PiPolicy, *, uses_last_block: bool = False, uses_final_norm: bool = False) -> list[str]:
    """Modules of the prefix whose parameters never get a gradient, since the expert reads keys and values alone.

    Args:
        uses_last_block: another loss reads the output of the language model's last block.
        uses_final_norm: another loss reads the output of its final norm, so nothing is dead.
    """
    if uses_final_norm:
        return []
    last = f"language_model.layers.{len(policy.language_model.layers) - 1}."
    unread = () if uses_last_block else ("self_attn.q_proj", "self_attn.o_proj", *_MLP, "post_attention_layernorm")
    return [*(last + name for name in unread), "language_model.norm"]


def dead_parameters(policy: PiPolicy, *, uses_last_block: bool = False, uses_final_norm: bool = False) -> list[str]:
    """Names of the parameters in :func:`dead_modules`."""
    dead = dead_modules(policy, uses_last_block=uses_last_block, uses_final_norm=uses_final_norm)
    return [name for name, _ in policy.named_parameters() if name.startswith(tuple(f"{module}." for module in dead))]


def lora_targets(policy: PiPolicy, *, uses_last_block: bool = False, uses_final_norm: bool = False) -> list[str]:
    """Full names of the layers to adapt: attention and MLP of both streams, without the dead ones."""
    dead = dead_modules(policy, uses_last_block=uses_last_block, uses_final_norm=uses_final_norm)
    names = [
        f"{stream}.layers.{index}.{layer}"
        for stream in ("language_model", "expert")
        for index in range(len(getattr(policy, stream).layers))
        for layer in (*_LAYERS, *_MLP)
    ]
    return [name for name in names if name not in dead]


def fully_trained(policy: PiPolicy) -> list[str]:
    """Modules that train in full beside adapters: heads, image projector and, as in openpi, the vision tower."""
    heads = [name for name, module in policy.named_children() if isinstance(module, nn.Linear)]
    return ["vision_tower", "multi_modal_projector", *heads]
