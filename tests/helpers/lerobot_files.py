"""Small LeRobot datasets on disk for the tests: the episodes of rlds_files.py in the layout of 2.1 or 3.0."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
VIEWS = {"observation.images.image": "image", "observation.images.image2": "wrist_image"}
PI_VIEWS = {"image": "image", "wrist_image": "wrist_image"}


def decode(encoded: bytes) -> np.ndarray:
    """The pixels of an image file."""
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


@contextlib.contextmanager
def _same_scheduling() -> Iterator[None]:
    """Undo what SVT-AV1 does when root encodes: the thread, and all threads and processes it starts from then on, are
    real-time ones. Two of them that wait for a spin lock stop a machine of two cores for minutes."""
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)


def _video(path: Path, frames: list[np.ndarray], codec: str) -> None:
    """A video of the frames as LeRobot writes it: 4:2:0, a key frame every second frame."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with _same_scheduling(), av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=FPS, options={"g": "2", "crf": "8"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


class LeRobotFiles:
    """Writes one dataset.

    Args:
        folder: of the dataset.
        version: "v2.1" or "v3.0".
        video: views as videos, else as images inside Parquet.
        pi: the names of physical-intelligence/libero (image, wrist_image, state, actions).
        codec: of the videos.
    """

    def __init__(
        self, folder: Path, version: str, *, video: bool = False, pi: bool = False, codec: str = "libx264"
    ) -> None:
        self.folder, self.version, self.video, self.codec = folder, version, video, codec
        self.views = PI_VIEWS if pi else VIEWS
        self.action, self.state = ("actions", "state") if pi else ("action", "observation.state")

    def write(self, episodes: list[dict[str, Any]], splits: dict[str, str] | None = None, per_file: int = 2) -> Path:
        """Write episodes with the features of tests/helpers/rlds_files.py; version 3.0 puts `per_file` into a file."""
        texts = [features["steps/language_instruction"][0].decode() for features in episodes]
        tasks = list(dict.fromkeys(texts))
        per_file = per_file if self.version == "v3.0" else 1
        rows, first = [], 0
        for begin in range(0, len(episodes), per_file):
            group = range(begin, min(begin + per_file, len(episodes)))
            number = begin // per_file
            tables = []
            for index in group:
                table = self._table(episodes[index], index, tasks.index(texts[index]), first)
                rows.append(self._episode_row(index, texts[index], table.num_rows, number, first))
                first += table.num_rows
                tables.append(table)
            path = self.folder / self._data_path().format(**self._names(number))
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.concat_tables(tables), path, row_group_size=10)
            self._write_videos([episodes[index] for index in group], number, rows[-len(group) :])
        self._write_meta(rows, tasks, episodes[0], splits or {"train": f"0:{len(episodes)}"})
        return self.folder

    def _names(self, number: int) -> dict[str, int]:
        return {"episode_chunk": 0, "episode_index": number, "chunk_index": 0, "file_index": number}

    def _data_path(self) -> str:
        name = "episode_{episode_index:06d}" if self.version == "v2.1" else "file-{file_index:03d}"
        chunk = "episode_chunk" if self.version == "v2.1" else "chunk_index"
        return f"data/chunk-{{{chunk}:03d}}/{name}.parquet"

    def _video_path(self) -> str:
        if self.version == "v2.1":
            return "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        return "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

    def _table(self, features: dict[str, Any], index: int, task: int, first: int) -> pa.Table:
        steps = len(features["steps/action"])
        columns: dict[str, Any] = {
            self.action: pa.array(list(features["steps/action"]), pa.list_(pa.float32(), 7)),
            self.state: pa.array(list(features["steps/observation/state"]), pa.list_(pa.float32())),
            "timestamp": pa.array(np.arange(steps, dtype=np.float32) / FPS),
            "frame_index": pa.array(np.arange(steps)),
            "episode_index": pa.array(np.full(steps, index)),
            "index": pa.array(np.arange(first, first + steps)),
            "task_index": pa.array(np.full(steps, task)),
        }
        if not self.video:
            for column, name in self.views.items():
                images = features[f"steps/observation/{name}"]
                rows = [{"bytes": image, "path": f"frame-{step:06d}.jpg"} for step, image in enumerate(images)]
                columns[column] = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        return pa.table(columns)

    def _episode_row(self, index: int, text: str, steps: int, number: int, first: int) -> dict[str, Any]:
        row = {"episode_index": index, "tasks": [text], "length": steps}
        if self.version == "v2.1":
            return row
        row |= {"data/chunk_index": 0, "data/file_index": number}
        return row | {"dataset_from_index": first, "dataset_to_index": first + steps}

    def _write_videos(self, group: list[dict[str, Any]], number: int, rows: list[dict[str, Any]]) -> None:
        for column, name in self.views.items() if self.video else ():
            frames: list[np.ndarray] = []
            begins = []
            for features in group:
                begins.append(len(frames) / FPS)
                frames += [decode(image) for image in features[f"steps/observation/{name}"]]
            path = self.folder / self._video_path().format(video_key=column, **self._names(number))
            _video(path, frames, self.codec)
            if self.version == "v3.0":
                for row, begin, end in zip(rows, begins, [*begins[1:], len(frames) / FPS]):
                    places = {"chunk_index": 0, "file_index": number, "from_timestamp": begin, "to_timestamp": end}
                    row |= {f"videos/{column}/{key}": value for key, value in places.items()}

    def _write_meta(
        self, rows: list[dict[str, Any]], tasks: list[str], example: dict[str, Any], splits: dict[str, str]
    ) -> None:
        shape = list(decode(example["steps/observation/image"][0]).shape)
        features: dict[str, Any] = {
            self.state: {"dtype": "float32", "shape": [8], "names": None},
            self.action: {"dtype": "float32", "shape": [7], "names": None},
            **{key: {"dtype": "int64", "shape": [1], "names": None} for key in ("frame_index", "task_index")},
        }
        for column in self.views:
            features[column] = {"dtype": "video" if self.video else "image", "shape": shape}
        info = {
            "codebase_version": self.version,
            "total_episodes": len(rows),
            "chunks_size": 1000,
            "fps": FPS,
            "splits": splits,
            "data_path": self._data_path(),
            "video_path": self._video_path() if self.video else None,
            "features": features,
        }
        meta = self.folder / "meta"
        meta.mkdir(parents=True, exist_ok=True)
        (meta / "info.json").write_text(json.dumps(info, indent=4))
        if self.version == "v2.1":
            (meta / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            lines = [{"task_index": number, "task": text} for number, text in enumerate(tasks)]
            (meta / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return
        episodes = meta / "episodes" / "chunk-000"
        episodes.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), episodes / "file-000.parquet")
        table = pa.table({"task_index": list(range(len(tasks))), "__index_level_0__": tasks})
        pq.write_table(table, meta / "tasks.parquet")


def write_columns(folder: Path, columns: dict[str, Any], lengths: tuple[int, ...], **info: Any) -> Path:
    """A dataset of version 2.1 with any columns: arrays (F, w) of numbers, lists of texts, or lists of encoded images.

    Time stamps are on the grid unless `columns` has others. `info` is added to info.json.
    """
    (folder / "meta").mkdir(parents=True)
    features: dict[str, Any] = {}
    table: dict[str, Any] = {
        "timestamp": np.concatenate([np.arange(length) for length in lengths]).astype(np.float32) / FPS,
        "frame_index": np.concatenate([np.arange(length) for length in lengths]),
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "task_index": np.zeros(sum(lengths), np.int64),
    }
    for name, values in columns.items():
        if isinstance(values, np.ndarray):
            table[name] = list(values) if values.ndim > 1 else values
            features[name] = {"dtype": str(values.dtype), "shape": list(values.shape[1:])}
        elif isinstance(values[0], str):
            table[name], features[name] = values, {"dtype": "string", "shape": [1]}
        else:
            table[name] = [{"bytes": image, "path": None} for image in values]
            features[name] = {"dtype": "image", "shape": list(decode(values[0]).shape)}
    paths = {"data_path": "data/episode_{episode_index:06d}.parquet", "chunks_size": 1000}
    description = {"codebase_version": "v2.1", "fps": FPS, "features": features, **paths, **info}
    (folder / "meta" / "info.json").write_text(json.dumps(description))
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "pick it up"}\n')
    rows = [{"episode_index": number, "length": length} for number, length in enumerate(lengths)]
    (folder / "meta" / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data").mkdir()
    whole, first = pa.table(table), 0
    for number, length in enumerate(lengths):
        pq.write_table(whole.slice(first, length), folder / f"data/episode_{number:06d}.parquet")
        first += length
    return folder
