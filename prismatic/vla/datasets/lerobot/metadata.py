"""The folder `meta/` of a LeRobot dataset: features, tasks, where each episode's rows and videos lie, and which columns
are the action, the state and the views of a dataset's specification.

Versions 2.0 and 2.1 keep one Parquet file and one video per camera for each episode, and JSON lines; version 3.0 puts
many episodes into one file, and keeps Parquet tables that say where an episode begins.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import read_json
from prismatic.vla.datasets.specs import DatasetSpec, libero_transform
from prismatic.vla.platforms import Platform

_VIDEO_PLACE = ("chunk_index", "file_index", "from_timestamp")
VERSIONS = ("v2.0", "v2.1", "v3.0")
_PACKAGES = {"pyarrow": "pyarrow", "av": "PyAV"}
# Last part of the RLDS feature's name -> names in LeRobot datasets, the likeliest first: `lerobot/libero` has
# observation.images.image, observation.images.image2 (the wrist), observation.state and action,
# `physical-intelligence/libero` image, wrist_image, state and actions; others mix the two.
_NAMES = {
    "image": ("image", "cam_high"),
    "wrist_image": ("wrist_image", "image2"),
    "left_wrist_image": ("left_wrist_image", "cam_left_wrist"),
    "right_wrist_image": ("right_wrist_image", "cam_right_wrist"),
    "action": ("action", "actions"),
}
_PREFIXES = ("observation.images.", "observation.", "")


@dataclass(frozen=True)
class VideoPlace:
    """A video file and the time (seconds) at which an episode begins in it."""

    file: Path
    begin: float


@dataclass(frozen=True)
class EpisodePlace:
    """Place of one episode: its number, its steps, its Parquet file and its video for each camera feature."""

    number: int
    length: int
    rows: Path
    videos: Mapping[str, VideoPlace]


@dataclass(frozen=True)
class Metadata:
    """A LeRobot dataset's description."""

    folder: Path
    version: str
    fps: float
    features: Mapping[str, Mapping[str, Any]]  # Column -> {"dtype", "shape", ...}
    tasks: Mapping[int, str]  # Task number -> instruction
    splits: Mapping[str, range]  # Split name -> episode numbers
    episodes: tuple[EpisodePlace, ...]

    def width(self, feature: str) -> int:
        """Count the numbers that a row holds of a feature. Raises UsageError: the description does not tell."""
        shape: Any = self.features[feature].get("shape")
        try:
            return math.prod(int(size) for size in shape)
        except (TypeError, ValueError):
            file = self.folder / "meta" / "info.json"
            raise UsageError(f"{file}: the shape of {feature!r} is {shape!r}; accepted: whole numbers") from None


def require(module: str) -> Any:
    """Import pyarrow or av. Raises UsageError: it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"LeRobot data need {_PACKAGES[module.split('.')[0]]} ({error}); "
            f'install it with: pip install "rocket-vla[lerobot]"'
        ) from error


def read_rows(path: Path, columns: list[str] | None = None) -> Any:
    """A Parquet file (or some columns of it) as a pyarrow table.

    Raises UsageError: the file is missing or damaged, or lacks a column.
    """
    parquet, arrow = require("pyarrow.parquet"), require("pyarrow")
    if not path.is_file():
        raise UsageError(f"{path}: no such file, but the folder meta/ lists it (incomplete copy?)")
    try:
        file = parquet.ParquetFile(path)
        missing = [name for name in columns or () if name not in file.schema_arrow.names]
        if missing:
            raise UsageError(f"{path}: no column {missing[0]!r}; found: {', '.join(file.schema_arrow.names)}")
        return file.read(columns=columns)
    except (arrow.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path}: no readable Parquet file ({one_line(error, 160)})") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; accepted: a LeRobot dataset folder") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path}: line {number}: not valid JSON ({error})") from None


def _tasks(folder: Path, version: str) -> dict[int, str]:
    if version != "v3.0":
        return {int(row["task_index"]): str(row["task"]) for row in _json_lines(folder / "meta" / "tasks.jsonl")}
    table = read_rows(folder / "meta" / "tasks.parquet")
    # The instruction is the data frame's index: its column is called "task" or has pandas' name for an unnamed index.
    texts = [name for name in table.column_names if name != "task_index"]
    name = "task" if "task" in texts else next(iter(texts), "")
    if "task_index" not in table.column_names or not name:
        raise UsageError(
            f"{folder / 'meta' / 'tasks.parquet'}: columns {table.column_names}; accepted: task, task_index"
        )
    numbers, instructions = table["task_index"].to_pylist(), table[name].to_pylist()
    return {int(number): str(text) for number, text in zip(numbers, instructions, strict=True)}


def _episodes_v2(folder: Path, info: Mapping[str, Any], cameras: list[str]) -> Iterator[EpisodePlace]:
    for row in _json_lines(folder / "meta" / "episodes.jsonl"):
        number = int(row["episode_index"])
        names = {"episode_chunk": number // int(info["chunks_size"]), "episode_index": number}
        videos = {
            camera: VideoPlace(folder / str(info["video_path"]).format(video_key=camera, **names), 0.0)
            for camera in cameras
        }
        yield EpisodePlace(number, int(row["length"]), folder / str(info["data_path"]).format(**names), videos)


def _episodes_v3(folder: Path, info: Mapping[str, Any], cameras: list[str]) -> Iterator[EpisodePlace]:
    files = sorted((folder / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise UsageError(f"{folder / 'meta' / 'episodes'}: no chunk-*/file-*.parquet (incomplete copy?)")
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for camera in cameras:
        columns += [f"videos/{camera}/{name}" for name in _VIDEO_PLACE]
    for table in files:
        for row in read_rows(table, columns).to_pylist():
            rows = str(info["data_path"]).format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            videos = {}
            for camera in cameras:
                chunk, file, begin = (row[f"videos/{camera}/{name}"] for name in _VIDEO_PLACE)
                path = str(info["video_path"]).format(video_key=camera, chunk_index=chunk, file_index=file)
                videos[camera] = VideoPlace(folder / path, float(begin))
            yield EpisodePlace(int(row["episode_index"]), int(row["length"]), folder / rows, videos)


def _splits(info: Mapping[str, Any], path: Path, count: int) -> dict[str, range]:
    splits = {}
    for name, text in (info.get("splits") or {"train": f"0:{count}"}).items():
        first, _, last = str(text).partition(":")
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise UsageError(f"{path}: split {name!r} is {text!r}; accepted: episodes as FIRST:LAST, such as 0:{count}")
        splits[name] = range(int(first), int(last))
    return splits


def read_metadata(folder: Path) -> Metadata:
    """The description of the dataset in `folder`.

    Raises UsageError: another version, or a missing or damaged file of `meta/`; names it.
    """
    path = folder / "meta" / "info.json"
    info = read_json(path)
    version = str(info.get("codebase_version"))
    if version not in VERSIONS:
        raise UsageError(
            f"{path}: codebase_version {version!r}; accepted: {', '.join(VERSIONS)} (LeRobot's scripts convert others)"
        )
    try:
        features = info["features"]
        cameras = [name for name, feature in features.items() if feature["dtype"] == "video"]
        find = _episodes_v3 if version == "v3.0" else _episodes_v2
        episodes = sorted(find(folder, info, cameras), key=lambda episode: episode.number)
        return Metadata(
            folder=folder,
            version=version,
            fps=float(info["fps"]),
            features=features,
            tasks=_tasks(folder, version),
            splits=_splits(info, path, len(episodes)),
            episodes=tuple(episodes),
        )
    except KeyError as error:
        raise UsageError(f"{folder / 'meta'}: entry {error} is missing (version {version})") from error
    except UsageError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: no valid LeRobot description ({one_line(error)})") from error


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold what a dataset's specification asks for."""

    spec: DatasetSpec  # The specification, without unused views and states that the dataset lacks
    numbers: Mapping[str, str]  # Feature of the specification -> column
    views: Mapping[str, str]  # View -> image or video column
    used: tuple[str, ...]  # Names of the views that the policy looks at
    language: str  # A column of instructions; "" where the tasks tell them


def _candidates(feature: str) -> list[str]:
    """Names that a feature may have here, the likeliest first."""
    leaf = feature.rsplit("/", 1)[-1]
    named = [prefix + name for name in _NAMES.get(leaf, (leaf,)) for prefix in _PREFIXES]
    return list(dict.fromkeys([feature, feature.replace("/", "."), *named]))


def _find(metadata: Metadata, feature: str, *, image: bool) -> str | None:
    for name in _candidates(feature):
        description = metadata.features.get(name, {"dtype": "string"})
        if description["dtype"] != "string" and (description["dtype"] in ("image", "video")) == image:
            return name
    return None


def find_columns(
    metadata: Metadata, spec: DatasetSpec, platform: Platform, with_proprio: bool = True, num_images: int | None = None
) -> Columns:
    """The columns that hold what `spec` asks for; see :func:`prismatic.vla.datasets.builder.open_dataset`.

    Raises UsageError: a needed one is missing, or actions or states do not have the platform's width.
    """
    file, needed = metadata.folder / "meta" / "info.json", spec.needed(num_images, with_proprio)
    columns = {feature: _find(metadata, feature, image=False) for feature in spec.numbers}
    cameras = {feature: _find(metadata, feature, image=True) for feature in spec.stored_images.values()}
    absent = {feature for feature, column in (columns | cameras).items() if column is None}
    for feature in (*columns, *cameras):
        if feature in absent & needed:
            raise UsageError(
                f"{file}: no {'camera' if feature in cameras else 'column'} for {feature!r} "
                f"(looked for {', '.join(_candidates(feature))}); found: {', '.join(sorted(metadata.features))}"
            )
    spec = spec.without(absent)
    numbers = {feature: column for feature in spec.numbers if (column := columns[feature])}
    views = {view: column for view, feature in spec.stored_images.items() if (column := cameras[feature])}
    spec.check_widths(
        file, {feature: metadata.width(column) for feature, column in numbers.items()}, platform, with_proprio
    )
    used = tuple(view for view, feature in spec.stored_images.items() if feature in needed)
    texts = metadata.features.get(spec.language, {"dtype": ""})["dtype"] == "string"
    return Columns(spec, numbers, views, used, spec.language if texts else "")


def as_rlds_actions(action_FA: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """Actions with the gripper as the RLDS data have it before they are standardized.

    For LIBERO that is -1 (open) to +1 (close), as in `lerobot/libero` and `physical-intelligence/libero`. Conversions
    that were standardized already (1 open, 0 closed) never are negative, and are turned back.
    """
    gripper = action_FA[:, -1:]
    if spec.standardize is not libero_transform or (gripper < 0).any():
        return action_FA
    return np.concatenate([action_FA[:, :-1], 1.0 - 2.0 * gripper], axis=1).astype(np.float32)
