"""Tell which teacher a folder, file or hub id holds, and load it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rocket_align.teacher.files import CONFIG_NAME, PREPROCESSOR_NAME, files_hash, local_copy, read_object

if TYPE_CHECKING:
    import torch

    from rocket_align.teacher.timm_model import TimmTeacher
    from rocket_align.teacher.vggt.teacher import VGGTTeacher
    from rocket_align.teacher.vit import ViTTeacher

# Teacher -> the model types its config.json may have. VGGT's released one has none, a model of timm names its
# architecture instead. "transformers": any other plain vision transformer; "openvla": that policy's own vision encoder.
TEACHER_TYPES = {
    "vggt": ("vggt", None),
    "depth_anything": ("depth_anything",),
    "dinov2": ("dinov2", "dinov2_with_registers"),
    "timm": (),
    "transformers": (),
    "openvla": ("openvla",),
}


class TeacherInfo(NamedTuple):
    """Facts known of a teacher before its weights are loaded."""

    kind: str  # A key of `TEACHER_TYPES`
    depth: int  # Blocks whose features can be aligned
    channels: int  # Channels of a feature; :class:`MultiLayerAlignment` takes half of it as `teacher_dim`


def detect_kind(path: str | Path, kind: str = "auto") -> str:
    """`kind`, checked against the model type in config.json; "auto" goes by the latter.

    Raises ValueError: an unknown kind, or another model than `kind` says; one line.
    """
    if kind != "auto" and kind not in TEACHER_TYPES:
        close = difflib.get_close_matches(kind, TEACHER_TYPES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"teacher type: found {kind!r}{hint}; accepted: auto, {', '.join(TEACHER_TYPES)}")
    place = local_copy(path)
    if not place.exists():
        raise ValueError(f"{place}: no such file or folder; accepted: a teacher's folder, weights file or hub id")
    config = (place if place.is_dir() else place.parent) / CONFIG_NAME
    values = read_object(config) if config.is_file() else {}
    model_type = values.get("model_type")
    if model_type is None and "architecture" in values and kind in ("auto", "timm"):
        return "timm"
    if model_type is None and kind not in ("auto", "vggt"):
        # That nothing is said does not make it VGGT's.
        lacks = f"{config} names no model_type" if config.is_file() else f"no {CONFIG_NAME} is there"
        named = f"model_type {' or '.join(map(str, TEACHER_TYPES[kind])) or 'of a vision transformer'}"
        wanted = f"a folder or hub id with {CONFIG_NAME} ({'architecture' if kind == 'timm' else named})"
        saver = "timm" if kind == "timm" else "transformers"
        raise ValueError(f"{place}: {lacks}; accepted for {kind}: {wanted} and model.safetensors, as {saver} saves")
    held = next((name for name, types in TEACHER_TYPES.items() if model_type in types), None)
    if held is None:
        from rocket_align.teacher.vit import read_backbone_config

        read_backbone_config(place)
        held = "transformers"
    if kind not in ("auto", held):
        raise ValueError(f"teacher type: found {kind!r}, but {place} holds {held}; accepted: auto or {held}")
    return held


def describe_teacher(path: str | Path, kind: str = "auto") -> TeacherInfo:
    """Kind and sizes of the teacher at `path`, from its configuration alone.

    Raises ValueError: no teacher there; one line.
    """
    kind = detect_kind(path, kind)
    if kind == "vggt":
        from rocket_align.teacher.vggt.config import find_weights

        sizes = find_weights(path)[1]
        return TeacherInfo(kind, sizes.depth, 2 * sizes.embed_dim)
    from rocket_align.teacher.vit import read_backbone_config, weight_files

    folder = local_copy(path)
    if kind in ("timm", "openvla"):
        from rocket_align.teacher.timm_model import describe_timm

        weight_files(folder)
        return TeacherInfo(kind, *describe_timm(folder))
    config = read_backbone_config(folder)
    weight_files(folder)
    return TeacherInfo(kind, int(config.num_hidden_layers), int(config.hidden_size))


def load_teacher(
    path: str | Path,
    layers: str | Sequence[int],
    kind: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> VGGTTeacher | ViTTeacher | TimmTeacher:
    """The frozen teacher at `path`, cut after the last of `layers`; float32 unless `dtype` is given.

    Raises ValueError: nothing usable there, or layers out of range; one line.
    """
    import torch

    kind = detect_kind(path, kind)
    cls: type[VGGTTeacher | ViTTeacher | TimmTeacher]
    if kind == "vggt":
        from rocket_align.teacher.vggt.teacher import VGGTTeacher as cls
    elif kind in ("timm", "openvla"):
        from rocket_align.teacher.timm_model import TimmTeacher as cls
    else:
        from rocket_align.teacher.vit import ViTTeacher as cls
    return cls.from_pretrained(path, layers, dtype=dtype or torch.float32, device=device)


def teacher_hash(path: str | Path) -> str:
    """SHA-256 over all files that decide a teacher's features: weights, configuration, preprocessing.

    The same weights in another file format have another hash.
    """
    place = local_copy(path)
    if detect_kind(path) == "vggt":
        from rocket_align.teacher.vggt.config import find_weights

        weights = [find_weights(path)[0]]
    else:
        from rocket_align.teacher.vit import weight_files

        weights = weight_files(place)
    beside = [weights[0].parent / name for name in (CONFIG_NAME, PREPROCESSOR_NAME)]
    return files_hash([*weights, *(file for file in beside if file.is_file())])
