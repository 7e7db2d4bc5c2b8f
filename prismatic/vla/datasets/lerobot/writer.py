"""Writing episodes as a LeRobot dataset (codebase version 2.1 or 3.0) with images inside its Parquet files.

One Parquet file an episode, which version 3.0 allows. An episode that is written stays as it is: only the folder
`meta`, written at the end, makes a dataset of the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prismatic.util.files import atomic_path, atomic_write
from prismatic.vla.datasets.image_transforms import decode_with_pillow
from prismatic.vla.datasets.lerobot.metadata import require

Version = Literal["v2.1", "v3.0"]
_CHUNK = 1000  # files a folder
_SAMPLED_IMAGES = 8  # of an episode, for the statistics of colors
_PATHS = {
    "v2.1": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "v3.0": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}


class LeRobotWriter:
    """Writes one dataset to `folder`.

    Args:
        fps: frames a second.
        records: of the episodes that an interrupted run wrote, to go on after them.
    """

    def __init__(
        self,
        folder: Path,
        version: Version,
        fps: float,
        robot: str,
        records: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.folder, self.version, self.fps, self.robot = folder, version, fps, robot
        self.records = list(records)

    def add(self, columns: Mapping[str, np.ndarray | Sequence[bytes]], task: str) -> dict[str, Any]:
        """Write the next episode: arrays (T, w) of numbers, lists of T encoded images. Returns its record, for JSON."""
        arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
        number, steps = len(self.records), len(next(iter(columns.values())))
        first = sum(record["length"] for record in self.records)
        tasks = list(dict.fromkeys([*(record["task"] for record in self.records), task]))
        frames = np.arange(steps)
        numbers = {
            "timestamp": (frames / self.fps).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(steps, number),
            "index": first + frames,
            "task_index": np.full(steps, tasks.index(task)),
        }
        table = {name: _column(arrow, values) for name, values in {**columns, **numbers}.items()}
        with atomic_path(self.folder / self._path(number)) as temporary:
            parquet.write_table(arrow.table(table), temporary, row_group_size=64)
        record = {
            "length": steps,
            "task": task,
            "features": {name: _feature(values) for name, values in columns.items()},
            "stats": {name: _statistics(values) for name, values in {**columns, **numbers}.items()},
        }
        self.records.append(record)
        return record

    def finish(self) -> None:
        """Write `meta`; info.json, by which readers know a dataset, comes last."""
        episodes = [self._episode(number, record) for number, record in enumerate(self.records)]
        tasks = list(dict.fromkeys(record["task"] for record in self.records))
        meta = self.folder / "meta"
        if self.version == "v2.1":
            stats = [{"episode_index": number, "stats": record["stats"]} for number, record in enumerate(self.records)]
            lines = [{"task_index": number, "task": task} for number, task in enumerate(tasks)]
            for name, rows in (("episodes", episodes), ("episodes_stats", stats), ("tasks", lines)):
                atomic_write(meta / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        else:
            self._write_table(meta / "episodes" / "chunk-000" / "file-000.parquet", episodes)
            rows = [{"task_index": number, "task": task} for number, task in enumerate(tasks)]
            self._write_table(meta / "tasks.parquet", rows, index="task")
            atomic_write(meta / "stats.json", json.dumps(_merged([record["stats"] for record in self.records])))
        atomic_write(meta / "info.json", json.dumps(self._info(len(tasks)), indent=4))

    def _path(self, number: int) -> str:
        chunk, file = divmod(number, _CHUNK)
        names = {"episode_chunk": chunk, "episode_index": number, "chunk_index": chunk, "file_index": file}
        return _PATHS[self.version].format(**names)

    def _episode(self, number: int, record: Mapping[str, Any]) -> dict[str, Any]:
        row = {"episode_index": number, "tasks": [record["task"]], "length": record["length"]}
        if self.version == "v2.1":
            return row
        first = sum(earlier["length"] for earlier in self.records[:number])
        chunk, file = divmod(number, _CHUNK)
        row |= {"data/chunk_index": chunk, "data/file_index": file}
        row |= {"dataset_from_index": first, "dataset_to_index": first + record["length"]}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        stats = {
            f"stats/{name}/{key}": value for name, entry in record["stats"].items() for key, value in entry.items()
        }
        return row | stats

    def _info(self, tasks: int) -> dict[str, object]:
        number = {"shape": [1], "names": None}
        integers = {name: {"dtype": "int64", **number} for name in ("frame_index", "episode_index", "index")}
        described = {
            "timestamp": {"dtype": "float32", **number},
            **integers,
            "task_index": {"dtype": "int64", **number},
        }
        count = len(self.records)
        info = {
            "codebase_version": self.version,
            "robot_type": self.robot,
            "total_episodes": count,
            "total_frames": sum(record["length"] for record in self.records),
            "total_tasks": tasks,
            "chunks_size": _CHUNK,
            "fps": int(self.fps) if self.fps == int(self.fps) else self.fps,
            "splits": {"train": f"0:{count}"},
            "data_path": _PATHS[self.version],
            "video_path": None,
            "features": {**self.records[0]["features"], **described},
        }
        if self.version == "v2.1":
            return {**info, "total_videos": 0, "total_chunks": -(-count // _CHUNK)}
        return {**info, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200}

    @staticmethod
    def _write_table(path: Path, rows: Sequence[Mapping[str, object]], index: str = "") -> None:
        """Write rows; LeRobot reads them with pandas, which takes the column `index` for the table's index."""
        table = require("pyarrow").Table.from_pylist(rows)
        if index:
            column = {"name": index, "field_name": index, "pandas_type": "unicode", "numpy_type": "object"}
            pandas = {"index_columns": [index], "column_indexes": [], "columns": [{**column, "metadata": None}]}
            table = table.replace_schema_metadata({"pandas": json.dumps(pandas)})
        with atomic_path(path) as temporary:
            require("pyarrow.parquet").write_table(table, temporary)


def _column(arrow: Any, values: np.ndarray | Sequence[bytes]) -> Any:
    if not isinstance(values, np.ndarray):
        rows = [{"bytes": image, "path": None} for image in values]
        return arrow.array(rows, arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]))
    if values.ndim == 1:
        return arrow.array(values)
    return arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), values.shape[1])


def _feature(values: np.ndarray | Sequence[bytes]) -> dict[str, object]:
    if isinstance(values, np.ndarray):
        return {"dtype": str(values.dtype), "shape": list(values.shape[1:]), "names": None}
    shape = decode_with_pillow(values[0]).shape
    return {"dtype": "image", "shape": list(shape), "names": ["height", "width", "channels"]}


def _statistics(values: np.ndarray | Sequence[bytes]) -> dict[str, list[Any]]:
    """An episode's statistics in LeRobot's form; colors are of some images, in [0, 1], of shape (3, 1, 1)."""
    if isinstance(values, np.ndarray):
        table = values.reshape(len(values), -1).astype(np.float64)
    else:
        chosen = np.linspace(0, len(values) - 1, min(_SAMPLED_IMAGES, len(values))).astype(int)
        table = np.stack([decode_with_pillow(values[frame]) for frame in chosen]).reshape(-1, 3) / 255
    described = {name: getattr(table, name)(axis=0) for name in ("mean", "std", "min", "max")}
    lists = {
        name: value.tolist() if isinstance(values, np.ndarray) else value.reshape(3, 1, 1).tolist()
        for name, value in described.items()
    }
    return {**lists, "count": [len(values)]}


def _merged(stats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The dataset's statistics of its episodes' ones."""
    merged = {}
    for name in stats[0]:
        parts = {key: np.array([episode[name][key] for episode in stats]) for key in stats[0][name]}
        count = parts["count"].sum()
        weight = (parts["count"] / count).reshape(-1, *[1] * (parts["mean"].ndim - 1))
        mean = (weight * parts["mean"]).sum(axis=0)
        variance = (weight * (parts["std"] ** 2 + (parts["mean"] - mean) ** 2)).sum(axis=0)
        values = {"mean": mean, "std": np.sqrt(variance), "min": parts["min"].min(axis=0)}
        values |= {"max": parts["max"].max(axis=0), "count": np.array([count])}
        merged[name] = {key: value.tolist() for key, value in values.items()}
    return merged
