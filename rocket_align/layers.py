"""Lists of layers: as given, as indices, as the paper pairs them, chosen by position, and as a file.

Imports no torch.

Not obvious:
- A selected block is aligned at its output. For the student that is hidden state block + 1, as the released selection
  script prints it (its uniform 8 of 32 are 4, 8, ..., 32); for the teacher it is the block's own number (2, 5, ..., 23
  of 24).
- "e2m_last1" is the paper's recipe instead: the same early numbers on both sides (student states 2, 4, ..., 18, outputs
  of blocks 1, 3, ...), then the student's last state but one and the teacher's last block, as released.

A layer file is what a selection writes and fine-tuning reads, a JSON object:

    {"format": "rocket_align_layers", "version": 1,
     "student_layers": [1, 3, 6], "teacher_layers": [0, 2, 5],      one teacher layer per student layer
     "convention": {"student": "states", "teacher": "python"},      names of `LayerConvention`
     "student_depth": 6, "teacher_depth": 6,                        blocks of the models that it was made for
     "made": {...}}                                                 how: strategy, scores, models, samples, seed

Its student layers are hidden states (0 the embeddings, l the output of block l - 1), its teacher layers 0-based blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from rocket_align.analysis.selection import select_layers
from rocket_align.teacher.files import read_object

LayerConvention = Literal["released", "states", "python"]
TapConvention = Literal["blocks", "openvla", "openpi-torch", "openpi-jax"]
FORMAT = "rocket_align_layers"
VERSION = 1
_CONVENTIONS: dict[str, tuple[LayerConvention, ...]] = {"student": ("states", "released"), "teacher": ("python",)}


def parse_layers(spec: str | Sequence[int]) -> tuple[int, ...]:
    """Layers as given: a sequence of integers or upstream's comma string ("2,4,-1"); empty means none.

    Raises ValueError: an entry that is not an integer.
    """
    entries: Sequence[str | int] = [part for part in spec.split(",") if part.strip()] if isinstance(spec, str) else spec
    layers = []
    for entry in entries:
        try:
            layer = int(entry)
        except (TypeError, ValueError):
            layer = None
        if layer is None or isinstance(entry, bool) or (not isinstance(entry, str) and layer != entry):
            raise ValueError(f"layers: found {entry!r} in {spec!r}; accepted: integers, as in 2,4,-1")
        layers.append(layer)
    return tuple(layers)


def resolve_layers(spec: str | Sequence[int], num_layers: int, *, convention: LayerConvention) -> tuple[int, ...]:
    """Non-negative layer indices for a model of `num_layers` blocks.

    Student layers ascend, each once. Teacher layers ("python") come in any order and may repeat: a matching is in the
    order of the student's layers, and one block may teach several of them.

    Args:
        spec: integers or a comma string; negative numbers count from the end.
        num_layers: number of transformer blocks.
        convention: the meaning of the numbers.
            "released": hidden states 0 (embeddings) to num_layers of the student, as the released training code indexes
            them: it replaces -1 alone, by num_layers - 1; -2 is the last state but one, which is the same state, -3 the
            one before.
            "states": the same states; -1 is the last, num_layers, as the released analyses use it.
            "python": blocks 0 to num_layers - 1 of the teacher; -1 is the last.

    Raises:
        ValueError: not integers, out of range, or student layers that do not ascend; the message names `spec`.
    """
    if convention not in get_args(LayerConvention):
        raise ValueError(f"convention: found {convention!r}; accepted: {', '.join(get_args(LayerConvention))}")
    layers = parse_layers(spec)
    indices = num_layers if convention == "python" else num_layers + 1
    resolved = []
    for layer in layers:
        if not -indices <= layer < indices:
            raise ValueError(
                f"layers: found {layer} in {spec!r}; accepted: {-indices} to {indices - 1} for {num_layers} blocks"
            )
        last = num_layers if convention == "released" and layer == -1 else indices
        resolved.append(layer if layer >= 0 else last + layer)
    if convention != "python":
        if len(set(resolved)) < len(resolved):
            raise ValueError(
                f"layers: found a layer twice in {spec!r} (indices {tuple(resolved)}); accepted: each layer once"
            )
        if resolved != sorted(resolved):
            raise ValueError(f"layers: found {spec!r} (indices {tuple(resolved)}); accepted: layers in ascending order")
    return tuple(resolved)


# Numbers of taps, as `resolve_layers` reads them.
_TAP_NUMBERS: dict[TapConvention, LayerConvention] = {
    "blocks": "python",
    "openvla": "released",
    "openpi-torch": "states",
    "openpi-jax": "python",
}
_TAP_NAME = re.compile(r"(block|vision)\.(-?\d+)|embeddings|final_norm|projector")


def tap_names(
    spec: str | Sequence[int | str], num_blocks: int, *, convention: TapConvention = "blocks"
) -> tuple[str, ...]:
    """Unambiguous names of the places that `spec` means (see :mod:`rocket_align.taps`), in its order.

    Args:
        spec: names, numbers, or a comma string of both. "block.-1" is the last block's.
        num_blocks: blocks of the stream.
        convention: the meaning of numbers; the three of the ROCKET release differ for the same recipe.
            "blocks": the stream after block k, 0-based; -1 after the last block, before the final norm.
            "openvla": hidden states as the release's OpenVLA path counts them: 0 the embeddings, l after block l - 1,
            the last after the final norm; -1 is the last but one (see `resolve_layers`, "released").
            "openpi-torch": the same states as its PyTorch pi0.5 path counts them: -1 is after the final norm.
            "openpi-jax": outputs of blocks as its JAX path counts them: 2 is after three blocks, -1 after the last one,
            before the final norm.

    Raises:
        ValueError: neither a number nor a name, or out of range; one line.
    """
    if convention not in get_args(TapConvention):
        raise ValueError(f"convention: found {convention!r}; accepted: {', '.join(get_args(TapConvention))}")
    numbers = _TAP_NUMBERS[convention]
    names = []
    for entry in [part.strip() for part in spec.split(",") if part.strip()] if isinstance(spec, str) else spec:
        match = _TAP_NAME.fullmatch(entry) if isinstance(entry, str) else None
        if match and not match[1]:
            names.append(match[0])
        elif match:
            names.append(f"{match[1]}.{resolve_layers(match[2], num_blocks, convention='python')[0]}")
        elif isinstance(entry, str) and not re.fullmatch(r"-?\d+", entry):
            raise ValueError(
                f"layers: found {entry!r} in {spec!r}; accepted: embeddings, block.k, final_norm, vision.k, projector, "
                "or numbers"
            )
        else:
            (index,) = resolve_layers(
                [int(entry)] if isinstance(entry, str) else [entry], num_blocks, convention=numbers
            )
            names.append(f"block.{index}" if numbers == "python" else _state_name(index, num_blocks))
    if not names:
        raise ValueError("layers: found none; accepted: at least one tap")
    return tuple(names)


def _state_name(state: int, num_blocks: int) -> str:
    if state == num_blocks:
        return "final_norm"
    return f"block.{state - 1}" if state else "embeddings"


def paper_pairs(
    num_student_layers: int = 32, num_teacher_layers: int = 24, count: int = 10
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Student and teacher layers of the multi-layer methods: 2, 4, ..., 18 and the one before the student's last state
    / the teacher's last block; models too shallow for that get consecutive layers from 1, and as many pairs as fit."""
    count = min(count, num_student_layers - 1, num_teacher_layers - 1)
    shallow = min(num_student_layers, num_teacher_layers)
    early = select_layers("e2m_last1", num_layers=shallow, count=count)[:-1]
    return (*early, num_student_layers - 1), (*early, num_teacher_layers - 1)


def student_states(blocks: Sequence[int]) -> tuple[int, ...]:
    """Hidden states that are the outputs of these 0-based blocks."""
    return tuple(block + 1 for block in blocks)


def layers_by_position(
    strategy: str, side: str, *, num_student_layers: int, num_teacher_layers: int, count: int
) -> tuple[int, ...]:
    """Layers of one `side`, "student" or "teacher", chosen by a strategy that needs no measurement.

    Raises ValueError: more layers than the shallower model has, or what `select_layers` refuses.
    """
    shallow = min(num_student_layers, num_teacher_layers)
    if not 1 <= count <= shallow:
        raise ValueError(f"count: found {count}; accepted: 1 to {shallow} pairs")
    if strategy == "e2m_last1":
        pairs = paper_pairs(num_student_layers, num_teacher_layers, count)
        if len(pairs[0]) < count:
            raise ValueError(f"count: found {count}; accepted with e2m_last1: 1 to {len(pairs[0])}")
        return pairs[0] if side == "student" else pairs[1]
    depth = num_student_layers if side == "student" else num_teacher_layers
    blocks = select_layers(strategy, num_layers=depth, count=count)
    return student_states(blocks) if side == "student" else blocks


@dataclass(frozen=True)
class LayerFile:
    """Aligned layers and the models they belong to."""

    student_layers: tuple[int, ...]  # Hidden states of the student, ascending
    teacher_layers: tuple[int, ...]  # Teacher blocks, one per student layer, in any order, also repeated
    student_depth: int  # Blocks of the student
    teacher_depth: int  # Blocks of the teacher
    origin: dict[str, Any] = field(default_factory=dict)  # How the layers were chosen, for the reader

    def to_json(self) -> str:
        """The file's text."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "student_layers": list(self.student_layers),
            "teacher_layers": list(self.teacher_layers),
            "convention": {"student": "states", "teacher": "python"},
            "student_depth": self.student_depth,
            "teacher_depth": self.teacher_depth,
            "made": self.origin,
        }
        return json.dumps(content, indent=2) + "\n"


def read_layer_file(path: str | Path) -> LayerFile:
    """Read and check a layer file; negative layers are resolved by the conventions that it names.

    Raises ValueError: one line that names the file, what was found and what is accepted.
    """
    file = Path(path)
    content = read_object(file)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        wanted = f'a file that select_layers.py wrote, with "format": "{FORMAT}", "version": {VERSION}'
        raise ValueError(f"{file}: no layer file; accepted: {wanted}")
    conventions = content.get("convention")
    layers: dict[str, tuple[int, ...]] = {}
    for side, accepted in _CONVENTIONS.items():
        depth, listed = content.get(f"{side}_depth"), content.get(f"{side}_layers")
        convention = conventions.get(side) if isinstance(conventions, dict) else None
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"{file}: {side}_depth: found {depth!r}; accepted: the model's number of blocks")
        if convention not in accepted:
            raise ValueError(f"{file}: convention of {side}: found {convention!r}; accepted: {', '.join(accepted)}")
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"{file}: {side}_layers: found {listed!r}; accepted: a list of layers")
        try:
            layers[side] = resolve_layers(listed, depth, convention=convention)
        except ValueError as error:
            raise ValueError(f"{file}: {side}_{error}") from None
    student, teacher = layers["student"], layers["teacher"]
    if len(student) != len(teacher):
        raise ValueError(f"{file}: found {len(student)} student and {len(teacher)} teacher layers; accepted: pairs")
    origin = content.get("made")
    depths = int(content["student_depth"]), int(content["teacher_depth"])
    return LayerFile(student, teacher, *depths, origin=origin if isinstance(origin, dict) else {})


def layers_for_models(
    path: str | Path, num_student_layers: int, num_teacher_layers: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Student and teacher layers of a file, for models of these depths.

    Raises ValueError: a file that cannot be read, or that was made for models of other depths.
    """
    file = read_layer_file(path)
    made_for = (file.student_depth, file.teacher_depth)
    if made_for != (num_student_layers, num_teacher_layers):
        raise ValueError(
            f"{path}: made for a student of {made_for[0]} and a teacher of {made_for[1]} blocks; "
            f"accepted: {num_student_layers} and {num_teacher_layers}"
        )
    return file.student_layers, file.teacher_layers
