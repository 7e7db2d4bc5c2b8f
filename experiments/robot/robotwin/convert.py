"""Make training data of RoboTwin's demonstrations, in LeRobot or RLDS format.

    python -m experiments.robot.robotwin.convert --data_dir RoboTwin/data --out datasets/robotwin

Every task below `--data_dir` becomes a dataset `robotwin_TASK_clean` or `robotwin_TASK_randomized`, which finetune.py
knows. An interrupted conversion goes on with the same command; a finished one is left as it is.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import yaml
from PIL import Image

from experiments.robot.libero.demonstrations import h5py_module
from experiments.robot.robotwin.demonstrations import (
    Demonstration,
    decode_picture,
    episode_files,
    grouped,
    read_demonstration,
    task_of,
)
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, read_json, read_mapping, refuse_long_name, refuse_no_folder
from prismatic.util.flags import limited
from prismatic.util.progress import progress_bar
from prismatic.vla.datasets.dataset_file import fits_as_name
from prismatic.vla.datasets.lerobot.writer import LeRobotWriter, Version
from prismatic.vla.datasets.rlds_schema import Numbers, Schema, load_protocol
from prismatic.vla.datasets.rlds_writer import RLDSWriter, aloha_schema, encode_jpeg
from prismatic.vla.datasets.specs import DATASETS, ROBOTWIN_SPEC
from prismatic.vla.platforms import ALOHA_AGILEX

RECORD = "conversion.json"
_LEROBOT_CAMERAS = {"image": "cam_high", "left_wrist_image": "cam_left_wrist", "right_wrist_image": "cam_right_wrist"}

DataFormat = Literal["lerobot", "rlds"]
Split = Literal["seen", "unseen"]
ImageFormat = Literal["png", "jpeg"]


@dataclass
class ConvertConfig:
    """Flags of the conversion."""

    data_dir: Path = Path("data")  # Folder with RoboTwin's episodes at any depth, of either layout
    out: Path = Path("datasets/robotwin")  # Folder of datasets
    format: DataFormat = "lerobot"
    lerobot_version: Version = "v3.0"  # v3.0 or v2.1
    dataset_name: str = ""  # One dataset of all episodes, by this name; default: one a task
    task_config: str = "demo_clean"  # How files were collected whose folders do not tell
    instructions: Split = "seen"  # Of legacy files; one of an episode's wordings is drawn
    image_format: ImageFormat = "png"  # png: the very pixels; jpeg: smaller, quality 95
    blue_first: bool = True  # Files hold pictures as RoboTwin encodes them, red and blue exchanged
    skip_damaged: bool = False  # Leave out files that cannot be read, and name them at the end
    episodes: int = limited(0, least=0)  # Convert so many of each task; 0: all
    seed: int = limited(0, least=0)  # Of the drawn wordings

    def settings(self) -> dict[str, object]:
        """The flags that the result depends on, beside the files."""
        names = ("format", "lerobot_version", "instructions", "image_format", "blue_first", "seed")
        return {name: asdict(self)[name] for name in names}


class _Output(Protocol):
    """Takes encoded episodes one by one, each whole on disk before the next; `finish` makes a dataset of them."""

    def add(self, episode: _Encoded) -> dict[str, Any]:
        """Write the next episode; returns its record, by which an interrupted run goes on."""

    def finish(self) -> Path: ...


@dataclass(frozen=True)
class _Encoded:
    """An episode to be written; `form` is what all episodes of a dataset have in common: height, width, fps."""

    source: str
    demonstration: Demonstration
    pictures: dict[str, list[bytes]]
    text: str
    form: list[float]


class _LeRobotOutput:
    def __init__(self, staging: Path, config: ConvertConfig, form: list[float], records: list[dict[str, Any]]) -> None:
        version = config.lerobot_version
        self._writer = LeRobotWriter(staging / "dataset", version, form[2], ALOHA_AGILEX.name, records)

    def add(self, episode: _Encoded) -> dict[str, Any]:
        columns: dict[str, Any] = {
            "observation.state": episode.demonstration.state,
            "action": episode.demonstration.action,
            **{f"observation.images.{_LEROBOT_CAMERAS[name]}": views for name, views in episode.pictures.items()},
        }
        return self._writer.add(columns, episode.text)

    def finish(self) -> Path:
        self._writer.finish()
        return self._writer.folder


class _RLDSOutput:
    def __init__(self, staging: Path, name: str, config: ConvertConfig, form: list[float], count: int) -> None:
        self._staging, self._count = staging, count
        base = aloha_schema(int(form[0]), int(form[1]), config.image_format)
        schema = Schema({**base.steps, "reward": Numbers(), "discount": Numbers()}, base.episode)
        self._writer = RLDSWriter(staging, name, schema=schema, notes="Written by experiments.robot.robotwin.convert")

    def add(self, episode: _Encoded) -> dict[str, Any]:
        steps = len(episode.demonstration)
        last = np.arange(steps) == steps - 1
        values: dict[str, Any] = {f"observation/{name}": views for name, views in episode.pictures.items()}
        values |= {"observation/state": episode.demonstration.state, "action": episode.demonstration.action}
        values |= {"language_instruction": [episode.text] * steps, "reward": last, "discount": np.ones(steps)}
        values |= {"is_first": np.arange(steps) == 0, "is_last": last, "is_terminal": last}
        payload = self._writer.schema.serialize(values, {"episode_metadata/file_path": episode.source})
        atomic_write(self._staging / f"{self._count:06d}", payload)
        self._count += 1
        return {}

    def finish(self) -> Path:
        self._writer.write_payloads([self._staging / f"{number:06d}" for number in range(self._count)])
        return self._writer.folder.parent


class _Conversion:
    """One dataset; what is done of it lies in a hidden folder beside its place, with a journal of a line a file."""

    def __init__(self, config: ConvertConfig, name: str, files: Sequence[Path]) -> None:
        refuse_long_name("--dataset_name", config.out / name)
        self.config, self.name, self.files, self.target = config, name, files, config.out / name
        self.staging = config.out / f".{name}.converting"
        self.sources = [[self._source(file), file.stat().st_size] for file in files]
        self.lines: list[dict[str, Any]] = []

    def _source(self, file: Path) -> str:
        return file.relative_to(self.config.data_dir).as_posix()

    def is_done(self) -> bool:
        """Tell whether the same conversion is there. Raises UsageError: something else is."""
        if not self.target.exists():
            return False
        recorded = read_json(self.target / RECORD) if (self.target / RECORD).is_file() else {}
        if (recorded.get("settings"), recorded.get("sources")) != (self.config.settings(), self.sources):
            raise UsageError(f"--out: {self.target} holds other data; accepted: another --out, or remove it")
        return True

    def run(self) -> list[str]:
        """Convert what is missing; returns what is wrong with the files left out.

        Raises UsageError: a damaged file that is not to be left out, or nothing but such files.
        """
        if self.config.format == "rlds":
            load_protocol()
        self._read_journal()
        kept = [line for line in self.lines if "record" in line]
        output = self._open(kept[0]["form"], [line["record"] for line in kept]) if kept else None
        with progress_bar() as progress, ThreadPoolExecutor(max_workers=4) as pool:
            bar = progress.add_task(self.name, total=len(self.files), completed=len(self.lines), info="")
            for file in self.files[len(self.lines) :]:
                try:
                    episode = self._encode(file, kept[0]["form"] if kept else None, pool)
                except UsageError as error:
                    if not self.config.skip_damaged:
                        raise UsageError(f"{error}; --skip_damaged True leaves it out") from error
                    self._note({"damaged": str(error)})
                else:
                    output = output or self._open(episode.form, [])
                    kept.append({"form": episode.form, "record": output.add(episode)})
                    self._note(kept[-1])
                progress.update(bar, advance=1, info=file.name)
        damaged = [line["damaged"] for line in self.lines if "damaged" in line]
        if output is None:
            raise UsageError(f"--data_dir: no episode of {self.name} can be read: {damaged[0]}")
        folder = output.finish()
        record = {"settings": self.config.settings(), "sources": self.sources, "damaged": damaged}
        atomic_write(folder / RECORD, json.dumps(record, indent=2))
        self._journal.unlink()  # First, lest a run stopped below leaves a journal of files that are gone.
        folder.replace(self.target)
        self.remove_staging()
        return damaged

    def remove_staging(self) -> None:
        """Remove what an earlier or this run put beside the dataset's place."""
        if self.staging.exists():
            shutil.rmtree(self.staging)

    def _open(self, form: list[float], records: list[dict[str, Any]]) -> _Output:
        if self.config.format == "lerobot":
            return _LeRobotOutput(self.staging, self.config, form, records)
        return _RLDSOutput(self.staging, self.name, self.config, form, len(records))

    def _encode(self, file: Path, form: list[float] | None, pool: ThreadPoolExecutor) -> _Encoded:
        demonstration, source = read_demonstration(file, self.config.instructions), self._source(file)
        pictures: dict[str, list[bytes]] = {}
        sizes = set()
        for camera, stored in demonstration.pictures.items():
            try:
                recoded = list(pool.map(self._recode, stored))
            except ValueError as error:
                raise UsageError(f"{file}: {camera}: {error}") from error
            pictures[camera] = [data for data, _ in recoded]
            sizes |= {size for _, size in recoded}
        own = [*sizes.pop(), demonstration.fps]
        if sizes or (form is not None and own != form):
            raise UsageError(f"{file}: pictures of {own[:2]} at {own[2]:g} a second; accepted: {form or 'one size'}")
        texts = demonstration.instructions or (task_of(file).replace("_", " "),)
        draw = np.random.default_rng([self.config.seed, zlib.crc32(source.encode())])
        return _Encoded(source, demonstration, pictures, str(draw.choice(texts)), own)

    def _recode(self, stored: bytes | np.ndarray) -> tuple[bytes, tuple[int, int]]:
        """A picture with its colors in order, as a file, and its height and width."""
        image = decode_picture(stored, self.config.blue_first)
        if self.config.image_format == "jpeg":
            return encode_jpeg(image), image.shape[:2]
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=3)
        return buffer.getvalue(), image.shape[:2]

    @property
    def _journal(self) -> Path:
        return self.staging / "journal.jsonl"

    def _read_journal(self) -> None:
        """Take over what an earlier run did. Raises UsageError: it was another conversion."""
        if not self._journal.is_file():
            self.remove_staging()
            atomic_write(self._journal, json.dumps(self.config.settings()) + "\n")
        text = self._journal.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # A torn last line is of an episode that is converted again.
        if whole != text:
            atomic_write(self._journal, whole)
        settings, *self.lines = (json.loads(line) for line in whole.splitlines())
        done = [line["source"] for line in self.lines]
        if settings != self.config.settings() or done != self.sources[: len(done)]:
            raise UsageError(
                f"--out: {self.staging} holds an unfinished conversion of other files or settings; accepted: the same "
                "ones, another --out, or remove it"
            )

    def _note(self, line: dict[str, Any]) -> None:
        """Add what became of the next file to the journal."""
        self.lines.append({"source": self.sources[len(self.lines)], **line})
        with open(self._journal, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(self.lines[-1]) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def convert(config: ConvertConfig) -> list[Path]:
    """Convert all tasks; returns the datasets' folders. Raises UsageError: no or damaged files, or data in the way."""
    h5py_module()  # Missing, it is no fault of a file.
    # Absolute, because folders above tell task and configuration; links keep the names that they have here.
    config.data_dir = Path(os.path.abspath(Path(config.data_dir).expanduser()))
    config.out = Path(config.out).expanduser()
    if not config.data_dir.is_dir():
        raise UsageError(f"--data_dir: no such folder: {config.data_dir}")
    files = episode_files(config.data_dir)
    if not files:
        raise UsageError(f"--data_dir: {config.data_dir} holds no episode*.hdf5; accepted: a folder above RoboTwin's")
    refuse_no_folder("--out", config.out)
    groups = _choose(config, files)
    conversions = [_Conversion(config, name, group) for name, group in groups.items()]
    done = [conversion.is_done() for conversion in conversions]
    for conversion, finished in zip(conversions, done, strict=True):
        if finished:
            conversion.remove_staging()
        damaged = [] if finished else conversion.run()
        print(f"{conversion.target}: {'already there' if finished else f'{len(conversion.files)} files converted'}")
        for reason in damaged:
            print(f"left out: {reason}")
    _describe_others(config, [name for name in groups if name not in DATASETS])
    return [conversion.target for conversion in conversions]


def _choose(config: ConvertConfig, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of every dataset to be made.

    Raises UsageError: two configurations in a task's dataset, or a name that finetune.py could not read it by.
    """
    groups = dict(grouped(files, config.task_config))
    for name, group in groups.items() if not config.dataset_name else ():
        first, *others = dict.fromkeys(file.parents[1] for file in group)
        if others:
            raise UsageError(
                f"--data_dir: {first} and {others[0]} found for {name}; accepted: one folder, or --dataset_name"
            )
    groups = {name: group[: config.episodes or None] for name, group in groups.items()}
    if config.dataset_name:
        groups = {config.dataset_name: [file for group in groups.values() for file in group]}
    for name in groups:
        if not fits_as_name(name) or DATASETS.get(name, ROBOTWIN_SPEC) != ROBOTWIN_SPEC:
            flag = "--dataset_name" if config.dataset_name else "--task_config"
            raise UsageError(
                f"{flag}: dataset {name!r} found; accepted: the name of a folder, without , : /, that is neither a "
                "mixture's nor another robot's"
            )
    return groups


def _describe_others(config: ConvertConfig, names: Sequence[str]) -> None:
    """Describe datasets whose names finetune.py does not know, for --dataset_file."""
    if not names:
        return
    spec = {"images": dict(ROBOTWIN_SPEC.images), "delta": list(ROBOTWIN_SPEC.delta or ())}
    file = config.out / "datasets.yaml"
    known = read_mapping(file) if file.is_file() else {}
    atomic_write(file, yaml.safe_dump({**known, **dict.fromkeys(names, spec)}, sort_keys=False))
    print(f"train with --dataset_file {file}: {', '.join(names)} are not among the known names")


def main(config: ConvertConfig) -> None:
    convert(config)


if __name__ == "__main__":
    run(ConvertConfig, main)
