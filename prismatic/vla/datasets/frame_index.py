"""The frame index of one split: every number of the actions and states, and where each frame's JPEG lies on disk.

Built in one pass over the shards, with all checksums verified, then cached: beside the data as
`frame_index-<split>.npz`, or below the user's cache folder when the dataset folder is read-only. The cache is used as
long as every file's size and modification time, the features asked for and the format version are the same. A frame
costs some 80 bytes here; images are never kept.
"""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write
from prismatic.vla.datasets.builder import SplitFiles
from prismatic.vla.datasets.episode_table import ByteReader, EpisodeTable, cache_folder
from prismatic.vla.datasets.image_transforms import decode_image
from prismatic.vla.datasets.specs import DatasetSpec
from prismatic.vla.datasets.tfrecord import Example, MalformedExample, read_records

FORMAT_VERSION = 1


@dataclass
class FrameIndex(EpisodeTable):
    """One split of an RLDS dataset, in file order; V views.

    Attributes:
        shards: the TFRecord files.
        image_start: byte offset of the encoded image in its shard (V, F) int64; image_size: its bytes (V, F) int32.
        episode_shard, episode_record: the episode's shard number and its record in there (E,) int32.
    """

    shards: tuple[Path, ...]
    image_start: np.ndarray
    image_size: np.ndarray
    episode_shard: np.ndarray
    episode_record: np.ndarray

    def __post_init__(self) -> None:
        self._reader = ByteReader(self.shards)

    def image(self, view: int, frame: int) -> np.ndarray:
        """The decoded image (H, W, 3) of a frame; raises UsageError when its bytes are no image."""
        episode = self.episode_of(frame)
        shard = int(self.episode_shard[episode])
        try:
            return decode_image(
                self._reader.read(shard, int(self.image_start[view, frame]), int(self.image_size[view, frame]))
            )
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{self.shards[shard]}: record {int(self.episode_record[episode])}: "
                f"step {frame - int(self.episode_start[episode])}: image {self.views[view]}: "
                f"{' '.join(str(error).split())}"
            ) from error


_ARRAYS = (
    "action",
    "state",
    "image_start",
    "image_size",
    "language",
    "episode_start",
    "episode_shard",
    "episode_record",
)


@dataclass
class _Columns:
    """What the pass over the shards collects."""

    action: list[np.ndarray] = field(default_factory=list)
    state: list[np.ndarray] = field(default_factory=list)
    image_start: list[np.ndarray] = field(default_factory=list)
    image_size: list[np.ndarray] = field(default_factory=list)
    language: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    instructions: dict[bytes, int] = field(default_factory=dict)


def _matrix(example: Example, name: str, steps: int, width: int) -> np.ndarray:
    values = example.floats(name)
    if values.size != steps * width:
        raise MalformedExample(f"{name} holds {values.size} numbers, expected {steps} steps x {width}")
    if not np.isfinite(values).all():
        raise MalformedExample(f"{name} holds values that are not finite")
    return values.reshape(steps, width)


def _add_episode(columns: _Columns, example: Example, offset: int, spec: DatasetSpec, split: SplitFiles) -> None:
    """Append one episode; nothing is appended when it raises MalformedExample."""
    names = {feature: f"steps/{feature}" for feature in (spec.action, spec.state, spec.language, *spec.images.values())}
    missing = [name for name in names.values() if name not in example]
    if missing:
        raise MalformedExample(f"missing feature {missing[0]}; it holds {', '.join(example.names())}")
    texts = example.byte_strings(names[spec.language])
    steps = len(texts)
    action = _matrix(example, names[spec.action], steps, split.action_width)
    state = _matrix(example, names[spec.state], steps, split.state_width)
    places = []
    for feature in spec.images.values():
        spans = example.byte_spans(names[feature])
        if len(spans) != steps:
            raise MalformedExample(f"{names[feature]} holds {len(spans)} images for {steps} steps")
        places.append(np.array(spans, dtype=np.int64).reshape(steps, 2))
    spans_VT2 = np.stack(places)
    columns.action.append(action)
    columns.state.append(state)
    columns.image_start.append(spans_VT2[..., 0] + offset)
    columns.image_size.append((spans_VT2[..., 1] - spans_VT2[..., 0]).astype(np.int32))
    table = columns.instructions
    columns.language.append(np.array([table.setdefault(text, len(table)) for text in texts], dtype=np.int32))
    columns.lengths.append(steps)


def _build(spec: DatasetSpec, split: SplitFiles) -> FrameIndex:
    columns = _Columns()
    for shard_number, (path, expected) in enumerate(zip(split.shards, split.shard_lengths, strict=True)):
        record_number = -1
        for record_number, record in enumerate(read_records(path)):
            try:
                _add_episode(columns, Example(record.payload), record.offset, spec, split)
            except MalformedExample as error:
                raise UsageError(f"{path}: record {record_number}: {error}") from error
            columns.places.append((shard_number, record_number))
        if record_number + 1 != expected:
            raise UsageError(
                f"{path}: {record_number + 1} records, dataset_info.json says {expected} (incomplete copy?)"
            )
    if not sum(columns.lengths):
        raise UsageError(f"{split.folder}: split {split.split!r} is empty; accepted: a split with at least one episode")
    shard_and_record = np.array(columns.places, dtype=np.int32)
    return FrameIndex(
        shards=split.shards,
        views=tuple(spec.images),
        action=np.concatenate(columns.action),
        state=np.concatenate(columns.state),
        image_start=np.concatenate(columns.image_start, axis=1),
        image_size=np.concatenate(columns.image_size, axis=1),
        language=np.concatenate(columns.language),
        instructions=tuple(text.decode("utf-8", errors="replace") for text in columns.instructions),
        episode_start=np.concatenate([[0], np.cumsum(columns.lengths)]).astype(np.int64),
        episode_shard=shard_and_record[:, 0],
        episode_record=shard_and_record[:, 1],
    )


def fingerprint(spec: DatasetSpec, split: SplitFiles) -> dict[str, Any]:
    """Everything the index depends on; two equal fingerprints mean the same index."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in split.shards]
    return {
        "version": FORMAT_VERSION,
        "split": split.split,
        "features": [spec.action, spec.state, spec.language, *spec.images.values()],
        "widths": [split.action_width, split.state_width],
        "shard_lengths": list(split.shard_lengths),
        "files": [list(file) for file in files],
    }


def _load(path: Path, identity: dict[str, Any], spec: DatasetSpec, split: SplitFiles) -> FrameIndex | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            header = json.loads(bytes(stored["header"]))
            if header["fingerprint"] != identity:
                return None
            arrays = {name: stored[name] for name in _ARRAYS}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # absent, from another version or damaged: built anew
    instructions = tuple(header["instructions"])
    return FrameIndex(shards=split.shards, views=tuple(spec.images), instructions=instructions, **arrays)


def _save(path: Path, identity: dict[str, Any], index: FrameIndex) -> None:
    header = json.dumps({"fingerprint": identity, "instructions": index.instructions}).encode()
    buffer = io.BytesIO()
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    np.savez(buffer, header=np.frombuffer(header, dtype=np.uint8), **arrays)
    with contextlib.suppress(OSError):  # a full or read-only disk costs the next start a few seconds, nothing else
        atomic_write(path, buffer.getvalue())


def load_frame_index(spec: DatasetSpec, split: SplitFiles) -> FrameIndex:
    """The split's index, from its cache or built (and cached) now.

    Raises:
        UsageError: a missing, truncated or corrupted shard, a record without a needed feature or with the wrong number
            of values, an empty split; the one line names file, record and reason.
    """
    for path in split.shards:
        if not path.is_file():
            raise UsageError(
                f"{path}: no such file, but dataset_info.json lists {len(split.shards)} shards (incomplete copy?)"
            )
    identity = fingerprint(spec, split)
    cache = cache_folder(split.folder) / f"frame_index-{split.split}.npz"
    index = _load(cache, identity, spec, split)
    if index is None:
        index = _build(spec, split)
        _save(cache, identity, index)
    return index


@dataclass(frozen=True)
class RLDSSplit:
    """One split of an RLDS dataset behind the protocol of all formats."""

    spec: DatasetSpec
    files: SplitFiles

    @property
    def folder(self) -> Path:
        return self.files.folder

    @property
    def split(self) -> str:
        return self.files.split

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.spec, self.files)

    def load(self) -> FrameIndex:
        return load_frame_index(self.spec, self.files)
