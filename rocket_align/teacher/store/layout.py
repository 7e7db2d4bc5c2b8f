"""A feature store's description of itself, and the comparison of two."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rocket_align.teacher.files import files_hash, read_object, replacing
from rocket_align.teacher.registry import TeacherInfo

FORMAT = 1
INDEX_NAME, BASIS_NAME, FRAMES_NAME = "index.json", "basis.safetensors", "frames.npy"
StoreDType = Literal["int8", "float16"]
DTYPES = get_args(StoreDType)
# A shard is the unit of work of a build, and what an interrupted one loses at most.
SHARD_BYTES, SHARD_FRAMES = 256 * 2**20, 512


class StoreError(ValueError):
    """A store that is damaged, is another one than asked for, or cannot hold what is asked; one line for the user."""


@dataclass(frozen=True)
class StoreLayout:
    """Everything that decides a store's numbers, apart from the data."""

    teacher_kind: str
    teacher_hash: str  # See `teacher_hash` in the registry
    teacher_depth: int  # The teacher's blocks
    layers: tuple[int, ...]  # The stored blocks, ascending
    channels: int  # Of a feature
    components: int  # Coefficients kept of them
    dtype: str  # "int8" or "float16"
    views: tuple[str, ...]  # Names of the views, in the student's order (VGGT mixes views, so their set matters)
    view_pixels: int  # Side of the student's square views
    teacher_image_hw: tuple[int, int]  # Pixels that the teacher saw
    teacher_grid_hw: tuple[int, int]  # And patches
    grid_hw: tuple[int, int]  # Stored tokens along height and width of a view

    @property
    def teacher(self) -> TeacherInfo:
        """The teacher, as the registry describes it."""
        return TeacherInfo(self.teacher_kind, self.teacher_depth, self.channels)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one record: codes, scales, checksums."""
        tokens = len(self.layers) * len(self.views) * self.grid_hw[0] * self.grid_hw[1]
        a_token = self.components + 4 if self.dtype == "int8" else 2 * self.components
        return tokens * a_token + 8 * len(self.layers)

    @property
    def shard_frames(self) -> int:
        """Records of a full shard."""
        return max(1, min(SHARD_FRAMES, SHARD_BYTES // self.frame_bytes))

    def check_layers(self, layers: Iterable[int], place: object) -> None:
        """Raises StoreError, naming `place`, when a teacher block is not among the stored ones."""
        absent = [layer for layer in layers if layer not in self.layers]
        if absent:
            lists = [", ".join(map(str, layers)) for layers in (absent, self.layers)]
            raise StoreError(f"{place}: holds no teacher layers {lists[0]}; accepted: {lists[1]}")

    def differences(self, other: StoreLayout) -> str:
        """List what differs, as "layers (1, 2), not (1, 3)" with this one's value first; empty when equal."""
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        parts = [
            f"{name} {_short(ours[name])}, not {_short(theirs[name])}" for name in ours if ours[name] != theirs[name]
        ]
        return "; ".join(parts)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def read_index(path: Path) -> dict[str, Any]:
    """A store's JSON file. Raises StoreError: missing, damaged, or of another version of the format; one line."""
    try:
        values = read_object(path)
    except ValueError as error:
        accepted = "a folder that vla-scripts/build_feature_store.py wrote"
        raise StoreError(f"{path}: no index of a feature store ({error}); accepted: {accepted}") from error
    if values.get("format") != FORMAT:
        raise StoreError(f"{path}: no feature store of format {FORMAT}; accepted: one built by this version")
    return values


def write_index(path: Path, values: Mapping[str, object]) -> None:
    """Write a store's JSON file atomically, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write_text(json.dumps({"format": FORMAT, **values}, indent=2) + "\n", encoding="utf-8")


def read_layout(root: Path) -> StoreLayout:
    """The layout of the store at `root`. Raises StoreError: see :func:`read_index`."""
    stored = read_index(root / INDEX_NAME).get("layout") or {}
    try:
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
        layout = StoreLayout(**values)
        pairs = (layout.teacher_image_hw, layout.teacher_grid_hw, layout.grid_hw)
        if not all(isinstance(v, tuple) for v in (*pairs, layout.layers, layout.views)) or {*map(len, pairs)} != {2}:
            raise TypeError("layers, views and pairs of sizes are lists")
        numbers = (layout.teacher_depth, layout.channels, layout.components, layout.view_pixels)
        sizes = (*numbers, *layout.layers, *(size for pair in pairs for size in pair))
        if not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
            raise TypeError("sizes are whole numbers")
        if not all(isinstance(text, str) for text in (layout.teacher_kind, layout.teacher_hash, *layout.views)):
            raise TypeError("names are texts")
        return layout
    except (TypeError, AttributeError) as error:
        raise StoreError(f"{root / INDEX_NAME}: its layout is damaged ({error}); accepted: a new build") from error


def made_from(root: Path, layout: StoreLayout, fingerprint: str, frames: bytes) -> str:
    """SHA-256 of what a data set's shards depend on: the data, its frames, the layout and the basis there is now."""
    parts = [fingerprint, json.dumps(dataclasses.asdict(layout), sort_keys=True), files_hash([root / BASIS_NAME])]
    return hashlib.sha256("\n".join(parts).encode() + frames).hexdigest()
