"""Layer pairs as a file: what a selection writes and fine-tuning reads. Imports no torch.

A JSON object:

    {"format": "rocket_align_layers", "version": 1,
     "student_layers": [1, 3, 6], "teacher_layers": [0, 2, 5],      one teacher layer per student layer
     "convention": {"student": "states", "teacher": "python"},      names of `rocket_align.layers.LayerConvention`
     "student_depth": 6, "teacher_depth": 6,                        blocks of the models that it was made for
     "made": {...}}                                                 how: strategy, scores, models, samples, seed

Student layers are hidden states (0 the embeddings, l the output of block l - 1), teacher layers 0-based blocks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rocket_align.layers import LayerConvention, resolve_layers

FORMAT = "rocket_align_layers"
VERSION = 1
_CONVENTIONS: dict[str, tuple[LayerConvention, ...]] = {"student": ("states", "released"), "teacher": ("python",)}


@dataclass(frozen=True)
class LayerFile:
    """Aligned layers and the models they belong to.

    Attributes:
        student_layers: hidden states of the student, ascending.
        teacher_layers: teacher blocks, one per student layer, in any order.
        student_depth, teacher_depth: blocks of the models.
        made: how the layers were chosen, for the reader.
    """

    student_layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]
    student_depth: int
    teacher_depth: int
    made: dict[str, Any] = field(default_factory=dict)

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
            "made": self.made,
        }
        return json.dumps(content, indent=2) + "\n"


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; accepted: a file written by select_layers.py") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise ValueError(f'{path}: no layer file; accepted: a JSON object with "format": "{FORMAT}", version {VERSION}')
    return content


def read_layer_file(path: str | Path) -> LayerFile:
    """Read and check a layer file; negative layers are resolved by the conventions that it names.

    Raises:
        ValueError: one line that names the file, what was found and what is accepted.
    """
    file = Path(path)
    content = _object(file)
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
            layers[side] = resolve_layers(listed, depth, convention=convention, ordered=side == "student")
        except ValueError as error:
            raise ValueError(f"{file}: {side}_{error}") from None
    student, teacher = layers["student"], layers["teacher"]
    if len(student) != len(teacher):
        raise ValueError(f"{file}: found {len(student)} student and {len(teacher)} teacher layers; accepted: pairs")
    made = content.get("made")
    depths = int(content["student_depth"]), int(content["teacher_depth"])
    return LayerFile(student, teacher, *depths, made=made if isinstance(made, dict) else {})


def layers_for_models(
    path: str | Path, num_student_layers: int, num_teacher_layers: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Student and teacher layers of a file, for models of these depths.

    Raises:
        ValueError: a file that cannot be read, or that was made for models of other depths.
    """
    file = read_layer_file(path)
    made_for = (file.student_depth, file.teacher_depth)
    if made_for != (num_student_layers, num_teacher_layers):
        raise ValueError(
            f"{path}: made for a student of {made_for[0]} and a teacher of {made_for[1]} blocks; "
            f"accepted: {num_student_layers} and {num_teacher_layers}"
        )
    return file.student_layers, file.teacher_layers
