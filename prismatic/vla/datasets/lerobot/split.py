"""One split of a LeRobot dataset as a table of episodes.

Numbers are read once and cached (`lerobot_index-<split>.npz`, beside the data or in the user's cache folder, as for
RLDS). Videos are read in place. Images inside Parquet are copied once into `lerobot_images-<split>.bin`, as large as
the images themselves: a Parquet page has to be read whole, and one random frame would cost megabytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_path
from prismatic.vla.datasets.episodes import EpisodeData, cache_folder, code_digest, has_size, load_index, save_index
from prismatic.vla.datasets.lerobot.images import (
    TIME_TOLERANCE,
    PackedImages,
    VideoImages,
    frame_times,
    time_tolerance,
)
from prismatic.vla.datasets.lerobot.metadata import (
    Columns,
    EpisodePlace,
    Metadata,
    as_rlds_actions,
    find_columns,
    read_metadata,
    read_rows,
    require,
)
from prismatic.vla.datasets.oxe import operations
from prismatic.vla.datasets.specs import DatasetSpec
from prismatic.vla.platforms import Platform

Images = PackedImages | VideoImages
FORMAT_VERSION = 2
_BATCH_ROWS = 64


@dataclass
class LeRobotEpisodes(EpisodeData):
    """Episodes of a LeRobot dataset; `stores` holds the images of each view that is used."""

    stores: tuple[Images | None, ...]

    def image(self, view: int, frame: int) -> np.ndarray:
        """The image (H, W, 3) of a frame; raises UsageError."""
        store = self.stores[view]
        assert store is not None, "the view was not asked for"
        return store.image(frame)


@dataclass(frozen=True)
class LeRobotSplit:
    """One split, found and checked."""

    metadata: Metadata
    columns: Columns
    needed: frozenset[str]
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
        """Features of used views whose images lie inside the Parquet files."""
        features = self.metadata.features
        names = [self.columns.views[view] for view in self.columns.used]
        return [name for name in dict.fromkeys(names) if features[name]["dtype"] == "image"]

    @property
    def has_videos(self) -> bool:
        """True when a used view is a video."""
        return any(self.metadata.features[self.columns.views[view]]["dtype"] == "video" for view in self.columns.used)

    def fingerprint(self) -> dict[str, object]:
        """Everything the table depends on: columns, tasks, the Parquet files' sizes and times."""
        files = list(dict.fromkeys(episode.rows for episode in self.episodes))
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise UsageError(f"{missing[0]}: no such file, but meta/ lists it (incomplete copy?)")
        columns = self.columns
        return {
            "version": [FORMAT_VERSION, self.metadata.version],
            "code": code_digest(operations),
            "split": self.split,
            "features": [*columns.numbers.values(), *columns.views.values(), columns.language],
            "assembly": repr(columns.spec.assembly),
            "tasks": {str(number): text for number, text in self.metadata.tasks.items()},
            "episodes": [[episode.number, episode.length] for episode in self.episodes],
            "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        }

    def load(self) -> LeRobotEpisodes:
        """The episodes, from the cached index or the Parquet files.

        Raises UsageError: a missing or damaged file, missing rows, numbers that are not finite, time stamps that no
        video has, an empty split.
        """
        if not sum(episode.length for episode in self.episodes):
            raise UsageError(f"{self.folder}: split {self.split!r} is empty; accepted: at least one episode")
        identity, cache = self.fingerprint(), cache_folder(self.folder)
        # Files of their own for fewer views, so that runs with more and with fewer never replace each other's.
        whole = len(self.columns.used) == len(self.columns.views)
        name = self.split if whole else f"{self.split}-{len(self.columns.used)}views"
        index, pack = cache / f"lerobot_index-{name}.npz", cache / f"lerobot_images-{name}.bin"
        wanted = {f"number/{feature}" for feature in self.columns.numbers if feature in self.needed}
        wanted |= {f"start/{name}" for name in self.packed_views} | ({"timestamp"} if self.has_videos else set())
        arrays, notes = load_index(index, identity) or ({}, {})
        if not wanted <= arrays.keys() or (self.packed_views and not has_size(pack, notes["pack_bytes"])):
            arrays = self._read(pack)
            notes = {"pack_bytes": pack.stat().st_size if self.packed_views else 0}
            save_index(index, identity, (arrays, notes))
        return self._table(arrays, pack)

    def _table(self, arrays: dict[str, np.ndarray], pack: Path) -> LeRobotEpisodes:
        language, instructions = self._instructions(arrays)
        action, state, frames, lengths = self._transitions(arrays)
        return LeRobotEpisodes(
            action=as_rlds_actions(action, self.columns.spec),
            state=state,
            language=language[frames],
            instructions=instructions,
            episode_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            views=tuple(self.columns.views),
            stores=tuple(self._store(view, arrays, frames, pack) for view in self.columns.views),
        )

    def _instructions(self, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, tuple[str, ...]]:
        """(number of every row's instruction, instructions)."""
        if self.columns.language:
            texts, numbers = np.unique(arrays["language"], return_inverse=True)
            return numbers.astype(np.int32), tuple(texts.tolist())
        tasks = self.metadata.tasks
        known = {number: place for place, number in enumerate(sorted(tasks))}
        unknown = sorted(set(arrays["task"].tolist()) - set(known))
        if unknown:
            raise UsageError(
                f"{self.folder / 'meta'}: no task {unknown[0]}, which the rows name; found: {sorted(tasks)}"
            )
        numbers = np.array([known[number] for number in arrays["task"].tolist()], dtype=np.int32)
        return numbers, tuple(tasks[number] for number in sorted(tasks))

    def _transitions(self, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
        """(actions, states, the rows they are of, length of each episode that has any)."""
        numbers = {feature: arrays.get(f"number/{feature}") for feature in self.columns.numbers}
        spec = self.columns.spec.without({feature for feature, values in numbers.items() if values is None})
        kept_rows, actions, states = [], [], []
        ends = np.cumsum([episode.length for episode in self.episodes]).tolist()
        for first, last in zip([0, *ends[:-1]], ends, strict=True):
            episode = {feature: values[first:last] for feature, values in numbers.items() if values is not None}
            action, state, kept = spec.assembled(episode)
            if len(action):
                kept_rows.append(np.arange(first, last)[kept])
                actions.append(action)
                states.append(state)
        if not actions:
            raise UsageError(f"{self.folder}: split {self.split!r} has no transition; accepted: at least one")
        lengths = [len(rows) for rows in kept_rows]
        return np.concatenate(actions), np.concatenate(states), np.concatenate(kept_rows), lengths

    def _store(self, view: str, arrays: dict[str, np.ndarray], frames: np.ndarray, pack: Path) -> Images | None:
        feature = self.columns.views[view]
        if view not in self.columns.used:
            return None
        if feature in self.packed_views:
            return PackedImages(pack, arrays[f"start/{feature}"][frames], arrays[f"size/{feature}"][frames])
        files, file, begin = self._videos(feature)
        seconds = arrays["timestamp"] + begin
        return VideoImages(files=files, file=file[frames], seconds=seconds[frames], fps=self.metadata.fps)

    def _videos(self, feature: str) -> tuple[tuple[Path, ...], np.ndarray, np.ndarray]:
        """(a camera's videos, number of each row's video there, the time at which its episode begins in it)."""
        places = [episode.videos[feature] for episode in self.episodes]
        files = list(dict.fromkeys(place.file for place in places))
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise UsageError(f"{missing[0]}: no such video, but meta/ lists it (incomplete copy?)")
        require("av")
        lengths = [episode.length for episode in self.episodes]
        file = np.repeat([files.index(place.file) for place in places], lengths).astype(np.int32)
        return tuple(files), file, np.repeat([place.begin for place in places], lengths)

    def _read(self, pack: Path) -> dict[str, np.ndarray]:
        """All numbers of the split by row; writes the packed images, if there are any."""
        files = [(file, frames_of_rows(file, episodes, first)) for file, episodes, first in self._files()]
        count = sum(episode.length for episode in self.episodes)
        shapes = {f"number/{feature}": (self.metadata.width(name),) for feature, name in self.columns.numbers.items()}
        columns = {f"number/{feature}": name for feature, name in self.columns.numbers.items()}
        types: dict[str, type] = {}
        if self.has_videos:
            columns["timestamp"], types["timestamp"] = "timestamp", np.float64
        if not self.columns.language:
            columns["task"], types["task"] = "task_index", np.int64
        arrays = {name: np.empty((count, *shapes.get(name, ())), types.get(name, np.float32)) for name in columns}
        texts = np.empty(count, object)
        for file, frames in files:
            used = frames >= 0
            for name, column in list(columns.items()):
                try:
                    values = _numbers(file, read_rows(file, [column]), column, arrays[name].shape[1:])
                    arrays[name][frames[used]] = values[used]
                except UsageError:
                    if name.removeprefix("number/") in self.needed or not name.startswith("number/"):
                        raise
                    del columns[name], arrays[name]
            if self.columns.language:
                rows = read_rows(file, [self.columns.language])[self.columns.language].to_pylist()
                texts[frames[used]] = [str(text or "") for text, wanted in zip(rows, used, strict=True) if wanted]
        if self.columns.language:
            arrays["language"] = texts.astype(np.str_)
        if self.has_videos:
            self._check_times(arrays["timestamp"])
        if self.packed_views:
            arrays |= self._pack(pack, files, count)
        return arrays

    def _check_times(self, timestamp: np.ndarray) -> None:
        """Refuse time stamps that are off the grid of frames, unless the videos have frames at those times."""
        step = np.concatenate([np.arange(episode.length) for episode in self.episodes])
        off = np.abs(timestamp - step / self.metadata.fps) > time_tolerance(timestamp)
        for view in self.columns.used if off.any() else ():
            feature = self.columns.views[view]
            if self.metadata.features[feature]["dtype"] != "video":
                continue
            files, file, begin = self._videos(feature)
            for number in sorted(set(file[off].tolist())):
                rows = np.flatnonzero(off & (file == number))
                shown = frame_times(files[number])
                nearest = _nearest(shown, timestamp[rows] + begin[rows])
                wrong = np.abs(nearest - timestamp[rows] - begin[rows]) > time_tolerance(timestamp[rows])
                if wrong.any():
                    row = int(rows[np.argmax(wrong)])
                    episode = int(np.searchsorted(np.cumsum([e.length for e in self.episodes]), row, side="right"))
                    raise UsageError(
                        f"{self.episodes[episode].rows}: episode {self.episodes[episode].number}: frame {step[row]}: "
                        f"timestamp {timestamp[row]:.6g} s, at which {files[number].name} has no frame (at "
                        f"{self.metadata.fps:g} frames a second it is {step[row] / self.metadata.fps:.6g} s); "
                        f"accepted: within {TIME_TOLERANCE:g} s"
                    )

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
        return arrays


def _nearest(sorted_times: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The one of `sorted_times` that is nearest to each of `times`."""
    places = np.clip(np.searchsorted(sorted_times, times), 1, max(len(sorted_times) - 1, 1))
    before, after = sorted_times[places - 1], sorted_times[np.minimum(places, len(sorted_times) - 1)]
    return np.where(times - before < after - times, before, after)


def frames_of_rows(file: Path, episodes: list[EpisodePlace], first: int) -> np.ndarray:
    """The frame number of every row of a file, -1 for rows of no wanted episode.

    Raises UsageError: an episode lacks rows or has too many.
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


def open_lerobot(
    folder: Path,
    spec: DatasetSpec,
    platform: Platform,
    with_proprio: bool = True,
    num_images: int | None = None,
) -> dict[str, LeRobotSplit]:
    """The splits of the LeRobot dataset in `folder`; arguments and refusals as for `builder.find_splits`."""
    metadata = read_metadata(folder)
    columns = find_columns(metadata, spec, platform, with_proprio, num_images)
    needed = spec.needed(num_images, with_proprio)
    return {split: LeRobotSplit(metadata, columns, needed, split) for split in metadata.splits}
