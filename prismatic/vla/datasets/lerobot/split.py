"""One split of a LeRobot dataset as a table of episodes.

Numbers are read once and cached (`lerobot_index-<split>.npz`, beside the data or in the user's cache folder, as for
RLDS). Videos are read in place. Images inside Parquet are copied once into `lerobot_images-<split>.bin`, as large as
the images themselves: a Parquet page has to be read whole, and one random frame would cost megabytes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_path, atomic_write
from prismatic.vla.datasets.episodes import EpisodeData, cache_folder
from prismatic.vla.datasets.lerobot.features import Columns, as_rlds_actions, find_columns
from prismatic.vla.datasets.lerobot.images import ImageStore, PackedImages, VideoImages
from prismatic.vla.datasets.lerobot.metadata import EpisodePlace, Metadata, read_metadata, read_rows, require
from prismatic.vla.datasets.specs import DatasetSpec
from prismatic.vla.platforms import Platform

FORMAT_VERSION = 1
_BATCH_ROWS = 64


@dataclass
class LeRobotEpisodes(EpisodeData):
    """Episodes of a LeRobot dataset; `stores` holds the images of each view."""

    stores: tuple[ImageStore, ...]

    def image(self, view: int, frame: int) -> np.ndarray:
        """The image (H, W, 3) of a frame; raises UsageError."""
        return self.stores[view].image(frame)


@dataclass(frozen=True)
class LeRobotSplit:
    """One split, found and checked."""

    metadata: Metadata
    spec: DatasetSpec
    columns: Columns
    split: str

    @property
    def folder(self) -> Path:
        return self.metadata.folder

    @property
    def episodes(self) -> list[EpisodePlace]:
        """The split's episodes in order."""
        chosen = self.metadata.splits[self.split]
        return [episode for episode in self.metadata.episodes if episode.number in chosen]

    @property
    def packed_views(self) -> list[str]:
        """Features whose images lie inside the Parquet files."""
        features = self.metadata.features
        return [name for name in self.columns.views.values() if features[name]["dtype"] == "image"]

    def fingerprint(self) -> dict[str, object]:
        """Everything the table depends on: columns, tasks, the Parquet files' sizes and times."""
        files = list(dict.fromkeys(episode.rows for episode in self.episodes))
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise UsageError(f"{missing[0]}: no such file, but meta/ lists it (incomplete copy?)")
        return {
            "version": [FORMAT_VERSION, self.metadata.version],
            "split": self.split,
            "features": [self.columns.action, self.columns.state, *self.columns.views.values()],
            "tasks": {str(number): text for number, text in self.metadata.tasks.items()},
            "episodes": [[episode.number, episode.length] for episode in self.episodes],
            "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        }

    def load(self) -> LeRobotEpisodes:
        """The episodes, from the cached index or the Parquet files.

        Raises:
            UsageError: a missing or damaged file, missing rows, numbers that are not finite, an empty split.
        """
        if not sum(episode.length for episode in self.episodes):
            raise UsageError(f"{self.folder}: split {self.split!r} is empty; accepted: at least one episode")
        identity, cache = self.fingerprint(), cache_folder(self.folder)
        index, pack = cache / f"lerobot_index-{self.split}.npz", cache / f"lerobot_images-{self.split}.bin"
        arrays = _load_arrays(index, identity, pack if self.packed_views else None)
        if arrays is None:
            arrays = self._read(pack)
            _save_arrays(index, identity, arrays)
        return self._table(arrays, pack)

    def _table(self, arrays: dict[str, np.ndarray], pack: Path) -> LeRobotEpisodes:
        lengths = [episode.length for episode in self.episodes]
        tasks = self.metadata.tasks
        known = {number: place for place, number in enumerate(sorted(tasks))}
        unknown = sorted(set(arrays["task"].tolist()) - set(known))
        if unknown:
            raise UsageError(
                f"{self.folder / 'meta'}: no task {unknown[0]}, which the rows name; found: {sorted(tasks)}"
            )
        return LeRobotEpisodes(
            action=as_rlds_actions(arrays["action"], self.spec),
            state=arrays["state"],
            language=np.array([known[number] for number in arrays["task"].tolist()], dtype=np.int32),
            instructions=tuple(tasks[number] for number in sorted(tasks)),
            episode_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            views=tuple(self.columns.views),
            stores=tuple(self._store(name, arrays, pack) for name in self.columns.views.values()),
        )

    def _store(self, feature: str, arrays: dict[str, np.ndarray], pack: Path) -> ImageStore:
        if feature in self.packed_views:
            return PackedImages(pack, arrays[f"start/{feature}"], arrays[f"size/{feature}"])
        places = [episode.videos[feature] for episode in self.episodes]
        files = list(dict.fromkeys(place.file for place in places))
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise UsageError(f"{missing[0]}: no such video, but meta/ lists it (incomplete copy?)")
        require("av")
        lengths = [episode.length for episode in self.episodes]
        return VideoImages(
            files=tuple(files),
            file=np.repeat([files.index(place.file) for place in places], lengths).astype(np.int32),
            seconds=arrays["timestamp"] + np.repeat([place.begin for place in places], lengths),
            fps=self.metadata.fps,
        )

    def _read(self, pack: Path) -> dict[str, np.ndarray]:
        """All numbers of the split by frame; writes the packed images, if there are any."""
        places = [frames_of_rows(file, episodes, first) for file, episodes, first in self._files()]
        files = [file for file, _, _ in self._files()]
        count = sum(episode.length for episode in self.episodes)
        action_width = self.metadata.features[self.columns.action]["shape"][0]
        state_width = self.metadata.features[self.columns.state]["shape"][0]
        arrays = {
            "action": np.empty((count, action_width), np.float32),
            "state": np.empty((count, state_width), np.float32),
            "timestamp": np.empty(count, np.float64),
            "task": np.empty(count, np.int64),
        }
        columns = {"action": self.columns.action, "state": self.columns.state}
        columns |= {"timestamp": "timestamp", "task": "task_index"}
        for file, frames in zip(files, places, strict=True):
            table, used = read_rows(file, list(columns.values())), frames >= 0
            for name, column in columns.items():
                arrays[name][frames[used]] = _numbers(file, table, column, arrays[name].shape[1:])[used]
        if self.packed_views:
            arrays |= self._pack(pack, list(zip(files, places, strict=True)), count)
        return arrays

    def _files(self) -> Iterator[tuple[Path, list[EpisodePlace], int]]:
        """(Parquet file, its episodes in order, number of its first frame)."""
        first = 0
        for file, group in itertools.groupby(self.episodes, key=lambda episode: episode.rows):
            episodes = list(group)
            yield file, episodes, first
            first += sum(episode.length for episode in episodes)

    def _pack(self, pack: Path, files: list[tuple[Path, np.ndarray]], count: int) -> dict[str, np.ndarray]:
        """Copy the images into `pack`, some rows at a time; returns where they lie."""
        parquet = require("pyarrow.parquet")
        arrays: dict[str, np.ndarray] = {}
        for name in self.packed_views:
            arrays[f"start/{name}"] = np.zeros(count, np.int64)
            arrays[f"size/{name}"] = np.zeros(count, np.int32)
        with atomic_path(pack) as temporary, open(temporary, "wb") as stream:
            for file, frames in files:
                row = 0
                for batch in parquet.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=self.packed_views):
                    for name in self.packed_views:
                        images = _image_bytes(file, batch, name)
                        for frame, image in zip(frames[row : row + len(images)], images, strict=True):
                            if frame >= 0:
                                arrays[f"start/{name}"][frame] = stream.tell()
                                arrays[f"size/{name}"][frame] = stream.write(image)
                    row += batch.num_rows
            arrays["pack_bytes"] = np.array(stream.tell())
        return arrays


def frames_of_rows(file: Path, episodes: list[EpisodePlace], first: int) -> np.ndarray:
    """The frame number of every row of a file, -1 for rows of no wanted episode.

    Raises:
        UsageError: an episode lacks rows or has too many.
    """
    table = read_rows(file, ["episode_index", "frame_index"])
    number, step = (np.asarray(table[name]).astype(np.int64) for name in ("episode_index", "frame_index"))
    frames = np.full(len(number), -1, dtype=np.int64)
    for episode in episodes:
        rows = np.flatnonzero(number == episode.number)
        if len(rows) != episode.length or not np.array_equal(np.sort(step[rows]), np.arange(episode.length)):
            raise UsageError(
                f"{file}: episode {episode.number} has {len(rows)} rows, meta/ says {episode.length} (incomplete copy?)"
            )
        frames[rows] = first + step[rows]
        first += episode.length
    return frames


def _numbers(file: Path, table: Any, column: str, shape: tuple[int, ...]) -> np.ndarray:
    values = table[column].combine_chunks()
    while hasattr(values, "flatten") and hasattr(values.type, "value_type"):
        values = values.flatten()
    numbers = values.to_numpy(zero_copy_only=False)
    rows = table.num_rows
    if numbers.size != rows * int(np.prod(shape, dtype=int)):
        raise UsageError(f"{file}: column {column} holds {numbers.size} numbers, expected {rows} rows x {shape}")
    if not np.isfinite(numbers).all():
        raise UsageError(f"{file}: column {column} holds values that are not finite")
    return numbers.reshape(rows, *shape)


def _image_bytes(file: Path, batch: Any, name: str) -> list[bytes]:
    """The encoded images of some rows."""
    column = batch.column(name)
    try:
        images = column.field("bytes").to_pylist()
    except (KeyError, AttributeError, ValueError) as error:
        raise UsageError(f"{file}: column {name} is {column.type}; accepted: a struct of bytes and path") from error
    if any(not image for image in images):
        raise UsageError(f"{file}: column {name} has rows without image bytes; accepted: embedded images")
    return images


def _load_arrays(path: Path, identity: dict[str, object], pack: Path | None) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            if json.loads(bytes(stored["header"])) != identity:
                return None
            arrays = {name: stored[name] for name in stored.files if name != "header"}
        if pack is not None and pack.stat().st_size != int(arrays["pack_bytes"]):
            return None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # absent, from another version or damaged: read anew
    return arrays


def _save_arrays(path: Path, identity: dict[str, object], arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    header = np.frombuffer(json.dumps(identity).encode(), dtype=np.uint8)
    np.savez(buffer, header=header, **arrays)  # type: ignore[arg-type]
    with contextlib.suppress(OSError):  # a full or read-only disk costs the next start some seconds, nothing else
        atomic_write(path, buffer.getvalue())


def open_lerobot(
    folder: Path, spec: DatasetSpec, platform: Platform, with_proprio: bool = True
) -> dict[str, LeRobotSplit]:
    """The splits of the LeRobot dataset in `folder`, after a check of its description.

    States that are not used (`with_proprio` False) may have any width.

    Raises:
        UsageError: damaged or missing metadata, another version, or columns that do not fit `spec` and `platform`.
    """
    metadata = read_metadata(folder)
    columns = find_columns(metadata, spec, platform, with_proprio)
    return {split: LeRobotSplit(metadata, spec, columns, split) for split in metadata.splits}
