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
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write
from prismatic.vla.datasets.builder import NumberFeature, SplitFiles
from prismatic.vla.datasets.episodes import ByteReader, EpisodeData, cache_folder
from prismatic.vla.datasets.image_transforms import decode_image
from prismatic.vla.datasets.specs import DatasetSpec
from prismatic.vla.datasets.tfrecord import Example, MalformedExample, read_records

FORMAT_VERSION = 2


@dataclass
class RLDSEpisodes(EpisodeData):
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


def _matrix(example: Example, name: str, steps: int, feature: NumberFeature) -> np.ndarray:
    """The (steps, width) float32 values of a feature."""
    if feature.packed:
        packed = example.byte_strings(name)
        try:
            content = b"".join(map(zlib.decompress, packed) if feature.zlib else packed)
            values = np.frombuffer(content, feature.packed).astype(np.float32)
        except (zlib.error, ValueError) as error:
            raise MalformedExample(f"{name}: {error}") from error
    else:
        values = example.integers(name).astype(np.float32) if feature.integers else example.floats(name)
    if values.size != steps * feature.width:
        raise MalformedExample(f"{name} holds {values.size} numbers, expected {steps} steps x {feature.width}")
    if not np.isfinite(values).all():
        raise MalformedExample(f"{name} holds values that are not finite")
    return values.reshape(steps, feature.width)


def _texts(example: Example, name: str, feature: NumberFeature | None) -> list[bytes]:
    """The instruction of every step, stored as text or as one code point a number, filled up with zeros."""
    if feature is None:
        return example.byte_strings(name)
    values = example.integers(name)
    if values.size % feature.width:
        raise MalformedExample(f"{name} holds {values.size} numbers, expected {feature.width} a step")
    rows = values.reshape(-1, feature.width).tolist()
    return ["".join(map(chr, row)).split("\0")[0].encode() for row in rows]


def _spans(example: Example, name: str, steps: int) -> np.ndarray:
    """(steps, 2): first byte and end of every image within the record."""
    spans = example.byte_spans(name)
    if len(spans) != steps:
        raise MalformedExample(f"{name} holds {len(spans)} images for {steps} steps")
    return np.array(spans, dtype=np.int64).reshape(steps, 2)


def _add_episode(columns: _Columns, example: Example, offset: int, spec: DatasetSpec, split: SplitFiles) -> bool:
    """Append one episode; nothing when it has no transition (and False is returned) or MalformedExample is raised."""
    wanted = [f"steps/{feature}" for feature in (*spec.numbers, spec.language, *spec.stored_images.values())]
    missing = [name for name in wanted if name not in example]
    if missing:
        raise MalformedExample(f"missing feature {missing[0]}; it holds {', '.join(example.names())}")
    texts = _texts(example, f"steps/{spec.language}", split.numbers.get(spec.language))
    steps = len(texts)
    numbers = {name: _matrix(example, f"steps/{name}", steps, split.numbers[name]) for name in spec.numbers}
    spans_VT2 = np.stack([_spans(example, f"steps/{feature}", steps) for feature in spec.stored_images.values()])
    if spec.assembly is None:
        action, state, kept = numbers[spec.action], numbers[spec.state], slice(None)
    else:
        action, state = spec.assembly(numbers)
        kept = spec.assembly.kept(steps)
    if not len(action):
        return False
    columns.action.append(action)
    columns.state.append(state)
    columns.image_start.append(spans_VT2[:, kept, 0] + offset)
    columns.image_size.append((spans_VT2[:, kept, 1] - spans_VT2[:, kept, 0]).astype(np.int32))
    table = columns.instructions
    columns.language.append(np.array([table.setdefault(text, len(table)) for text in texts[kept]], dtype=np.int32))
    columns.lengths.append(len(action))
    return True


def _build(spec: DatasetSpec, split: SplitFiles) -> RLDSEpisodes:
    columns = _Columns()
    for shard_number, (path, expected) in enumerate(zip(split.shards, split.shard_lengths, strict=True)):
        record_number = -1
        for record_number, record in enumerate(read_records(path)):
            try:
                if _add_episode(columns, Example(record.payload), record.offset, spec, split):
                    columns.places.append((shard_number, record_number))
            except MalformedExample as error:
                raise UsageError(f"{path}: record {record_number}: {error}") from error
        if record_number + 1 != expected:
            raise UsageError(
                f"{path}: {record_number + 1} records, dataset_info.json says {expected} (incomplete copy?)"
            )
    if not sum(columns.lengths):
        raise UsageError(f"{split.folder}: split {split.split!r} is empty; accepted: a split with at least one episode")
    shard_and_record = np.array(columns.places, dtype=np.int32)
    return RLDSEpisodes(
        shards=split.shards,
        views=tuple(spec.stored_images),
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


def fingerprint(spec: DatasetSpec, split: SplitFiles) -> dict[str, object]:
    """Everything the index depends on; two equal fingerprints mean the same index."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in split.shards]
    return {
        "version": FORMAT_VERSION,
        "split": split.split,
        "features": [*spec.numbers, spec.language, *spec.stored_images.values()],
        "assembly": repr(spec.assembly),
        "widths": [split.action_width, split.state_width],
        "shard_lengths": list(split.shard_lengths),
        "files": [list(file) for file in files],
    }


def _load(path: Path, identity: dict[str, object], spec: DatasetSpec, split: SplitFiles) -> RLDSEpisodes | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            header = json.loads(bytes(stored["header"]))
            if header["fingerprint"] != identity:
                return None
            arrays = {name: stored[name] for name in _ARRAYS}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # absent, from another version or damaged: built anew
    instructions = tuple(header["instructions"])
    return RLDSEpisodes(shards=split.shards, views=tuple(spec.stored_images), instructions=instructions, **arrays)


def _save(path: Path, identity: dict[str, object], index: RLDSEpisodes) -> None:
    header = json.dumps({"fingerprint": identity, "instructions": index.instructions}).encode()
    buffer = io.BytesIO()
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    np.savez(buffer, header=np.frombuffer(header, dtype=np.uint8), **arrays)
    with contextlib.suppress(OSError):  # a full or read-only disk costs the next start a few seconds, nothing else
        atomic_write(path, buffer.getvalue())


def load_frame_index(spec: DatasetSpec, split: SplitFiles) -> RLDSEpisodes:
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

    def fingerprint(self) -> dict[str, object]:
        return fingerprint(self.spec, self.files)

    def load(self) -> RLDSEpisodes:
        return load_frame_index(self.spec, self.files)
