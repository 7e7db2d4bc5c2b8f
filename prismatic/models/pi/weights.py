"""Weights of pi0 and pi0.5 in the files of openpi (PyTorch), LeRobot and transformers, which share their names.

Not obvious:
- LeRobot puts `model.` before every name, newer transformers leave out `vision_model.`; both are read.
- Language heads and the expert's embeddings are in some files and never used. openpi's files hold the head in
  place of the embeddings that it is tied to.
- Whatever the files hold, weights are float32 unless asked otherwise; with bfloat16, norms of the two transformers and
  the heads stay float32, as openpi's do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PI0Config

from prismatic.checkpoint.layout import MODEL_WEIGHTS, weight_files
from prismatic.models.pi.config import EXPERT, LANGUAGE, VISION, read_pi_config
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_path
from prismatic.util.tensor_files import WEIGHTS, TensorFiles

Module = TypeVar("Module", bound=nn.Module)
_PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector."
# A module's prefix here and in the files; the heads have the same names in both.
_PREFIXES = {
    "language_model.": LANGUAGE,
    "vision_tower.": VISION,
    "multi_modal_projector.": _PROJECTOR,
    "expert.": EXPERT,
}
_TIED_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
_DEAD = (_TIED_HEAD, "paligemma_with_expert.gemma_expert.lm_head.weight", f"{EXPERT}embed_tokens.weight")
_KEPT_FLOAT32 = re.compile(r"(^|\.)(input_layernorm|post_attention_layernorm|norm)\.|^(action|state|time)_")


def published_name(name: str) -> str:
    """The name in files of a parameter of the policy."""
    for prefix, published in _PREFIXES.items():
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    return name


def published_names(names: Iterable[str]) -> dict[str, str]:
    """{published name: name} of the weights in a file; heads that stand for embeddings count as these, dead ones not.

    A published name has no `model.` in front, and `vision_model.` in those of the vision tower.
    """
    plain = {}
    for name in names:
        published = name.removeprefix("model.")
        tower = VISION.removesuffix("vision_model.")
        if published.startswith(tower) and not published.startswith(VISION):
            published = VISION + published.removeprefix(tower)
        plain[published] = name
    if _TIED_HEAD in plain:
        plain.setdefault(f"{LANGUAGE}embed_tokens.weight", plain[_TIED_HEAD])
    return {published: name for published, name in plain.items() if published not in _DEAD}


def read_config(folder: Path) -> PI0Config:
    """Configuration of the checkpoint in `folder`, from config.json and the headers of its weight files.

    Raises UsageError: no weights, or of another model.
    """
    return read_pi_config(folder, _open(folder)[2])


def load_weights(folder: Path, build: Callable[[PI0Config], Module], dtype: torch.dtype = torch.float32) -> Module:
    """Build the model of a checkpoint folder with its weights, on the CPU, reading one tensor at a time.

    Args:
        build: makes the model from its configuration; called on the meta device, so that buffers hold nothing yet.

    Raises:
        UsageError: no weights, or of another model: one is missing, unknown or of another shape.
    """
    stored, names, shapes = _open(folder)
    with torch.device("meta"):
        model = build(read_pi_config(folder, shapes))
    expected = model.state_dict()
    _refuse_others(folder, shapes, {published_name(name): tuple(value.shape) for name, value in expected.items()})
    weights = {name: stored.read(names[published_name(name)]).to(parameter_dtype(name, dtype)) for name in expected}
    model.load_state_dict(weights, assign=True)
    return model


def _open(folder: Path) -> tuple[TensorFiles, dict[str, str], dict[str, tuple[int, ...]]]:
    """The weights of a folder, their names by published name, and their shapes by published name."""
    files = weight_files(folder, MODEL_WEIGHTS)
    if not files:
        raise UsageError(f"{folder}: no {WEIGHTS} found; accepted: a checkpoint folder of pi0 or pi0.5")
    stored = TensorFiles(files)
    names = published_names(stored.specs)
    return stored, names, {published: stored.specs[name].shape for published, name in names.items()}


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type that a parameter of the policy has in a model of `dtype`."""
    return torch.float32 if _KEPT_FLOAT32.search(name) and not name.startswith("vision_tower.") else dtype


def _refuse_others(folder: Path, shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing or unknown:
        raise UsageError(
            f"{folder}: {len(missing)} weights missing and {len(unknown)} unknown "
            f"({', '.join((missing + unknown)[:3])}); accepted: those of the model that config.json describes"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UsageError(f"{folder}: {name} of shape {shapes[name]} found; accepted: {shape}, by config.json")


def save_weights(folder: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` to `folder`: one file, as openpi and LeRobot read it."""
    named = {published_name(name): value.detach().contiguous().cpu() for name, value in state_dict.items()}
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(named, temporary, metadata={"format": "pt"})
