"""The frame index of one split: every number of the actions and states, and where each frame's JPEG lies on disk.

Built in one pass over the shards, with all checksums verified, then cached: beside the data as
`frame_index-<split>.npz`, or below the user's cache folder when the dataset folder is read-only. The cache is used as
long as every file's size and modification time, the features asked for and the format version are the same. A frame
costs some 80 bytes here; images are never kept. The records of ArrayRecord files are compressed in chunks, which cannot
be read at random places: they are copied once into `array_records-<split>.bin`, in the same folder as the index.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import atomic_path
from prismatic.vla.datasets.episodes import (
    ByteReader,
    EpisodeData,
    Index,
    cache_folder,
    code_digest,
    has_size,
    load_index,
    save_index,
)
from prismatic.vla.datasets.image_transforms import as_rgb, decode_image
from prismatic.vla.datasets.oxe import operations
from prismatic.vla.datasets.specs import DatasetSpec
from prismatic.vla.datasets.tfrecord import Example, MalformedExample, Record, read_array_records, read_records, varints

FORMAT_VERSION = 3


@dataclass(frozen=True)
class NumberFeature:
    """Storage of a feature of numbers."""

    width: int  # Values a step
    integers: bool = False  # A list of integers (or booleans) instead of floats
    packed: str = ""  # Their type, when each step's values are one byte string
    zlib: bool = False  # Whether that string is compressed


@dataclass(frozen=True)
class ImageFeature:
    """Storage of an image: as an encoded file when `shape` is empty, else as its uint8 values."""

    # (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); -1 for a size that the number of values tells
    shape: tuple[int, ...] = ()
    packed: bool = False  # Whether the values are one byte string, not a list of integers
    zlib: bool = False  # Whether that string is compressed


@dataclass(frozen=True)
class RLDSSplit:
    """One split of an RLDS dataset: its version folder, its shards with their record counts, what is read of them."""

    folder: Path
    split: str
    shards: tuple[Path, ...]
    shard_lengths: tuple[int, ...]
    spec: DatasetSpec  # The dataset's, without unused views and states that the files lack
    needed: frozenset[str]  # The features that cannot be done without; the others may be damaged
    # Feature -> how its numbers or images are stored
    numbers: Mapping[str, NumberFeature]
    images: Mapping[str, ImageFeature]
    array_record: bool = False  # The file format; else TFRecord

    @property
    def forms(self) -> tuple[ImageFeature, ...]:
        """Storage of the images of every view."""
        return tuple(self.images[feature] for feature in self.spec.stored_images.values())

    def fingerprint(self) -> dict[str, object]:
        """Everything the index depends on; two equal fingerprints mean the same index."""
        spec = self.spec
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.shards]
        return {
            "version": FORMAT_VERSION,
            "code": code_digest(operations),
            "split": self.split,
            "features": [*spec.numbers, spec.language, *spec.stored_images.values()],
            "assembly": repr(spec.assembly),
            "widths": {feature: self.numbers[feature].width for feature in spec.numbers},
            "forms": repr(self.forms),
            "shard_lengths": list(self.shard_lengths),
            "files": [list(file) for file in files],
        }

    def load(self) -> RLDSEpisodes:
        """Read the index; see :func:`load_frame_index`."""
        return load_frame_index(self)


@dataclass
class RLDSEpisodes(EpisodeData):
    """One split of an RLDS dataset, in file order; V views."""

    shards: tuple[Path, ...]  # The TFRecord files, or the one file that ArrayRecord files were copied into
    image_start: np.ndarray  # Byte offset of the encoded image in its shard (V, F) int64
    image_size: np.ndarray  # Bytes of the encoded image (V, F) int32
    episode_shard: np.ndarray  # The episode's shard number (E,) int32
    episode_record: np.ndarray  # The episode's record in its shard (E,) int32
    forms: tuple[ImageFeature, ...]  # How the images of each view are stored

    def __post_init__(self) -> None:
        self._reader = ByteReader(self.shards)

    def image(self, view: int, frame: int) -> np.ndarray:
        """The decoded image (H, W, 3) of a frame; raises UsageError when its bytes are no image."""
        episode = self.episode_of(frame)
        shard = int(self.episode_shard[episode])
        try:
            stored = self._reader.read(shard, int(self.image_start[view, frame]), int(self.image_size[view, frame]))
            return _pixels(stored, self.forms[view])
        except (OSError, ValueError, zlib.error) as error:
            raise UsageError(
                f"{self.shards[shard]}: record {int(self.episode_record[episode])}: "
                f"step {frame - int(self.episode_start[episode])}: image {self.views[view]}: "
                f"{one_line(error)}"
            ) from error


def _pixels(stored: bytes, form: ImageFeature) -> np.ndarray:
    """uint8 (H, W, 3) of an image's bytes."""
    if not form.shape:
        return decode_image(stored)
    if not form.packed:
        values = varints(stored).astype(np.uint8)
    else:
        values = np.frombuffer(zlib.decompress(stored) if form.zlib else stored, np.uint8)
    return as_rgb(values.reshape(form.shape))


@dataclass
class _Columns:
    """All that the pass over the shards collects; `faults` are those of features that are not needed."""

    action: list[np.ndarray] = field(default_factory=list)
    state: list[np.ndarray] = field(default_factory=list)
    image_start: list[np.ndarray] = field(default_factory=list)
    image_size: list[np.ndarray] = field(default_factory=list)
    language: list[np.ndarray] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    instructions: dict[bytes, int] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def _matrix(example: Example, name: str, steps: int, feature: NumberFeature) -> np.ndarray:
    """The (steps, width) float32 values of a feature."""
    _check_present(example, name)
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


def _spans(example: Example, name: str, steps: int, form: ImageFeature) -> np.ndarray:
    """(steps, 2): first byte and end of every image within the record."""
    _check_present(example, name)
    spans = example.integer_spans(name, steps) if form.shape and not form.packed else example.byte_spans(name)
    if len(spans) != steps:
        raise MalformedExample(f"{name} holds {len(spans)} images for {steps} steps")
    return np.array(spans, dtype=np.int64).reshape(steps, 2)


def _check_present(example: Example, name: str) -> None:
    if name not in example:
        raise MalformedExample(f"missing feature {name}; it holds {', '.join(example.names())}")


def _read(
    columns: _Columns, needed: Collection[str], feature: str, read: Callable[..., np.ndarray], *what: object
) -> np.ndarray | None:
    """The feature's values by `read(*what)`; None, and a note in `faults`, for damaged ones that are not needed."""
    try:
        return read(*what)
    except MalformedExample as error:
        if feature in needed:
            raise
        columns.faults.setdefault(feature, str(error))
        return None


def _add_episode(columns: _Columns, example: Example, offset: int, split: RLDSSplit) -> bool:
    """Append one episode; nothing when it has no transition (and False is returned) or MalformedExample is raised."""
    spec = split.spec
    _check_present(example, f"steps/{spec.language}")
    texts = _texts(example, f"steps/{spec.language}", split.numbers.get(spec.language))
    steps = len(texts)
    numbers, places = {}, []
    for name in spec.numbers:
        form = split.numbers[name]
        values = _read(columns, split.needed, name, _matrix, example, f"steps/{name}", steps, form)
        numbers[name] = np.zeros((steps, form.width), np.float32) if values is None else values
    for name in spec.stored_images.values():
        values = _read(columns, split.needed, name, _spans, example, f"steps/{name}", steps, split.images[name])
        places.append(np.zeros((steps, 2), np.int64) if values is None else values)
    spans_VT2 = np.stack(places) if places else np.zeros((0, steps, 2), np.int64)
    action, state, kept = spec.assembled(numbers)
    if not len(action):
        return False
    columns.action.append(action)
    columns.state.append(state)
    columns.image_start.append(spans_VT2[:, kept, 0] + offset)
    columns.image_size.append((spans_VT2[:, kept, 1] - spans_VT2[:, kept, 0]).astype(np.int32))
    table = columns.instructions
    columns.language.append(np.array([table.setdefault(text, len(table)) for text in texts[kept]], dtype=np.int32))
    return True


def _copied(path: Path, copy: BinaryIO) -> Iterator[Record]:
    """The records of an ArrayRecord file, each copied; its offset is that in the copy."""
    for payload in read_array_records(path):
        yield Record(copy.tell(), payload)
        copy.write(payload)


def _build(split: RLDSSplit, copy: Path | None) -> Index:
    """The index, with the faults of features that are not needed; ArrayRecord files are copied to `copy`."""
    if copy is None:
        return _collect(split, read_records)
    try:
        with atomic_path(copy) as temporary, open(temporary, "wb") as stream:
            arrays, notes = _collect(split, lambda path: _copied(path, stream))
            return arrays, {**notes, "copied": stream.tell()}
    except OSError as error:
        raise UsageError(
            f"{copy}: array_record files cannot be copied there ({error}); accepted: a folder with room, "
            "by the environment variable XDG_CACHE_HOME"
        ) from error


def _collect(split: RLDSSplit, records: Callable[[Path], Iterator[Record]]) -> Index:
    columns = _Columns()
    for shard_number, (path, expected) in enumerate(zip(split.shards, split.shard_lengths, strict=True)):
        record_number = -1
        for record_number, record in enumerate(records(path)):
            known = set(columns.faults)
            try:
                if _add_episode(columns, Example(record.payload), record.offset, split):
                    columns.places.append((0 if split.array_record else shard_number, record_number))
            except MalformedExample as error:
                raise UsageError(f"{path}: record {record_number}: {error}") from error
            for feature in set(columns.faults) - known:
                columns.faults[feature] = f"{path}: record {record_number}: {columns.faults[feature]}"
        if record_number + 1 != expected:
            raise UsageError(
                f"{path}: {record_number + 1} records, dataset_info.json says {expected} (incomplete copy?)"
            )
    if not columns.action:
        raise UsageError(f"{split.folder}: split {split.split!r} is empty; accepted: a split with at least one episode")
    return _index(split, columns)


def _index(split: RLDSSplit, columns: _Columns) -> Index:
    places = np.array(columns.places, dtype=np.int32)
    state = np.concatenate(columns.state)
    if any(feature in columns.faults for feature in split.spec.state_features):
        state = state[:, :0]
    arrays = {
        "action": np.concatenate(columns.action),
        "state": state,
        "image_start": np.concatenate(columns.image_start, axis=1),
        "image_size": np.concatenate(columns.image_size, axis=1),
        "language": np.concatenate(columns.language),
        "episode_start": np.cumsum([0, *map(len, columns.action)]),
        "episode_shard": places[:, 0],
        "episode_record": places[:, 1],
    }
    instructions = [text.decode("utf-8", errors="replace") for text in columns.instructions]
    return arrays, {"instructions": instructions, "faults": columns.faults, "copied": 0}


def load_frame_index(split: RLDSSplit) -> RLDSEpisodes:
    """The split's index, from its cache or built (and cached) now.

    Raises UsageError: a missing, truncated or corrupted shard, a record without a needed feature or with the wrong
    number of values, an empty split; the one line names file, record and reason.
    """
    for path in split.shards:
        if not path.is_file():
            raise UsageError(
                f"{path}: no such file, but dataset_info.json lists {len(split.shards)} shards (incomplete copy?)"
            )
    identity, folder = split.fingerprint(), cache_folder(split.folder)
    cache = folder / f"frame_index-{split.split}.npz"
    copy = folder / f"array_records-{split.split}.bin" if split.array_record else None
    index = load_index(cache, identity)
    if index is None or (copy is not None and not has_size(copy, index[1]["copied"])):
        index = _build(split, copy)
        save_index(cache, identity, index)
    arrays, notes = index
    for feature in split.needed & notes["faults"].keys():
        raise UsageError(notes["faults"][feature])
    return RLDSEpisodes(
        shards=split.shards if copy is None else (copy,),
        views=tuple(split.spec.stored_images),
        forms=split.forms,
        instructions=tuple(notes["instructions"]),
        **arrays,
    )
