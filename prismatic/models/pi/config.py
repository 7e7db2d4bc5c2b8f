"""Configurations of pi0 and pi0.5: transformers' `PI0Config`, from any of the folders that the three projects write.

Not obvious:
- openpi's PyTorch folders say neither which model they hold nor its sizes; both are read off the weights.
- All of openpi's and LeRobot's Gemma variants have 8 query heads and one key head, and the vision tower (So400m) has
  heads of 72 channels; a model with others needs transformers' form of `config.json`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PI0Config

from prismatic.checkpoint.layout import PI_MARKS
from prismatic.util.errors import UsageError, unknown_name
from prismatic.util.files import read_json

CONFIG = "config.json"
LANGUAGE = "paligemma_with_expert.paligemma.model.language_model."
VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
PROMPT_LENGTH = {"pi0": 48, "pi05": 200}
_SO400M_HEAD = 72
# LeRobot's names of settings that transformers' configuration has too, then openpi's.
_SHARED_FIELDS = (
    *("chunk_size", "num_inference_steps", "min_period", "max_period", "max_state_dim", "max_action_dim"),
    *("time_sampling_beta_alpha", "time_sampling_beta_beta", "time_sampling_scale", "time_sampling_offset"),
)
_RENAMED_FIELDS = {"action_horizon": "chunk_size", "tokenizer_max_length": "prompt_length"}


class Pi05Config(PI0Config):
    """The same fields for pi0.5, which transformers has no class for."""

    model_type = "pi05"


AutoConfig.register("pi05", Pi05Config, exist_ok=True)  # Else a tokenizer beside its config.json warns.


def pi_config(kind: str, **fields: Any) -> PI0Config:
    """Configuration of a "pi0" or "pi05" with transformers' fields, and `prompt_length` in tokens beside them.

    Raises UsageError: another kind.
    """
    classes = {"pi0": PI0Config, "pi05": Pi05Config}
    if kind not in classes:
        raise unknown_name("pi model", kind, classes)
    config = classes[kind](**fields)
    if getattr(config, "prompt_length", None) is None:
        config.prompt_length = PROMPT_LENGTH[kind]
    return config


def read_pi_config(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> PI0Config:
    """Configuration of a checkpoint folder.

    Args:
        folder: with transformers' (or our) config.json, LeRobot's, openpi's, or none.
        shapes: of its weights by published name, see :func:`prismatic.models.pi.weights.published_names`.

    Raises:
        UsageError: config.json is of another model, or the weights are of neither model.
    """
    path = folder / CONFIG
    fields = read_json(path) if path.is_file() else {}
    if "model_type" in fields:
        return pi_config(fields.pop("model_type"), **fields)
    kind = kind_from_names(shapes, folder)
    named = fields.get("type", kind)
    if named != kind:
        raise UsageError(f"{path}: type {named!r} found, and weights of {kind}; accepted: those of one model")
    sizes = sizes_from_weights(shapes, folder)
    taken = {name: fields[name] for name in _SHARED_FIELDS if name in fields}
    taken |= {ours: fields[theirs] for theirs, ours in _RENAMED_FIELDS.items() if theirs in fields}
    return pi_config(kind, **sizes | taken)


def kind_from_names(names: Mapping[str, object], source: Path) -> str:
    """Tell "pi0" from "pi05" by the published names of the weights: pi0.5 has an MLP of its own for time.

    Raises UsageError: they are of neither; the message begins with `source`.
    """
    for name, kind in PI_MARKS.items():
        if name in names:
            return kind
    raise UsageError(f"{source}: no time_mlp_in or action_time_mlp_in found; accepted: weights of pi0.5 or pi0")


def sizes_from_weights(shapes: Mapping[str, tuple[int, ...]], source: Path) -> dict[str, Any]:
    """Fields of the configuration that the shapes of the weights give, with openpi's numbers of heads.

    Raises UsageError: a weight that is needed for it is missing; the message begins with `source`.
    """
    try:
        text, expert = _gemma_sizes(shapes, LANGUAGE), _gemma_sizes(shapes, EXPERT)
        text["vocab_size"] = shapes[f"{LANGUAGE}embed_tokens.weight"][0]
        width, _, patch, _ = shapes[f"{VISION}embeddings.patch_embedding.weight"]
        side = math.isqrt(shapes[f"{VISION}embeddings.position_embedding.weight"][0])
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": width,
            "intermediate_size": shapes[f"{VISION}encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": _depth(shapes, f"{VISION}encoder."),
            "num_attention_heads": max(1, width // _SO400M_HEAD),
            "patch_size": patch,
            "image_size": side * patch,
            "vision_use_head": False,
        }
        actions, states = shapes["action_in_proj.weight"][1], shapes.get("state_proj.weight", (0, None))[1]
    except KeyError as error:
        raise UsageError(f"{source}: no weight {error} found; accepted: a checkpoint of pi0 or pi0.5") from None
    return {
        "vlm_config": {
            "model_type": "paligemma",
            "text_config": text,
            "vision_config": vision,
            "projection_dim": text["hidden_size"],
            "image_token_index": text["vocab_size"],
        },
        "dit_config": expert,
        "max_action_dim": actions,
        "max_state_dim": states or actions,
    }


def _gemma_sizes(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    block = f"{prefix}layers.0."
    queries, width = shapes[f"{block}self_attn.q_proj.weight"]
    head = shapes[f"{block}self_attn.k_proj.weight"][0]
    return {
        "model_type": "gemma",
        "hidden_size": width,
        "intermediate_size": shapes[f"{block}mlp.gate_proj.weight"][0],
        "num_hidden_layers": _depth(shapes, prefix),
        "num_attention_heads": queries // head,
        "num_key_value_heads": 1,
        "head_dim": head,
    }


def _depth(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
    return 1 + max(int(match.group(1)) for name in shapes if (match := pattern.match(name)))
