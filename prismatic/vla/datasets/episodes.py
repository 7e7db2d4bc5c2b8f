"""A data set's files as the loader needs them, whichever format they have."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import json
import logging
import math
import os
import zipfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from prismatic.util.files import atomic_write

_MAX_OPEN_FILES = 32
# What is cached of a split's files: arrays by name, and small things that JSON holds.
Index = tuple[dict[str, np.ndarray], dict[str, Any]]


@dataclass
class EpisodeData(ABC):
    """The episodes of one split, all numbers in memory, images read when asked for; E episodes, F frames."""

    action: np.ndarray  # Raw actions (F, A) float32, gripper as the RLDS data have it
    state: np.ndarray  # Raw states (F, S) float32, S = 0 for a robot without
    language: np.ndarray  # Number of the frame's instruction in `instructions` (F,) int32
    instructions: tuple[str, ...]
    episode_start: np.ndarray  # First frame of every episode, and F at the end (E + 1,) int64
    views: tuple[str, ...]  # Names of the views, in the order the policy sees them

    @property
    def num_frames(self) -> int:
        return len(self.action)

    @property
    def num_episodes(self) -> int:
        return len(self.episode_start) - 1

    def episode_of(self, frame: int) -> int:
        """Number of the episode that holds the frame."""
        return int(np.searchsorted(self.episode_start, frame, side="right")) - 1

    def content_hash(self) -> str:
        """SHA-256 of the episodes' numbers and instructions, and of the sizes of their images where those are known.

        A copy of the data has the same hash; the pixels themselves are not read.
        """
        sizes = getattr(self, "image_size", np.empty(0, np.int32))
        digest = hashlib.sha256("\n".join([*self.views, *self.instructions]).encode())
        for array in (self.action, self.state, self.language, self.episode_start, sizes):
            digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @abstractmethod
    def image(self, view: int, frame: int) -> np.ndarray:
        """The image of a frame, uint8 (H, W, 3), rotated by 180 degrees as the policies expect it.

        Raises UsageError: its file is gone or damaged; names file and frame.
        """


def choose_episodes(instructions: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """A random part of the episodes of every instruction, at least one of each; a smaller fraction is a subset of a
    larger one with the same seed.

    Args:
        instructions: the instruction of every episode (E).
        fraction: in (0, 1].

    Returns:
        the chosen episodes' numbers, ascending.

    Raises:
        ValueError: a fraction out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: {fraction} found; accepted: above 0, at most 1")
    order = np.random.default_rng(seed).permutation(len(instructions))
    chosen: list[int] = []
    for instruction in sorted(set(instructions)):
        episodes = [int(episode) for episode in order if instructions[episode] == instruction]
        # Rounded first: 0.1 * 30 is a hair above 3.
        chosen += episodes[: math.ceil(round(fraction * len(episodes), 9))]
    return np.array(sorted(chosen), dtype=np.int64)


def hold_out_episodes(count: int, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out) of `count` episodes: `part` of them, at least one, at random; both ascending.

    Nothing is held out of a single episode, or when `part` is 0.
    """
    held = min(max(round(part * count), 1), count - 1) if part > 0 else 0
    order = np.random.default_rng((seed, 8)).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


class ByteReader:
    """Reads byte ranges of files; keeps a few of them open, none across pickling."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = files
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"files": self.files, "_open": OrderedDict()}

    def read(self, file: int, start: int, size: int) -> bytes:
        """The `size` bytes from `start` on of file number `file`; fewer where it ends."""
        descriptor = self._open.get(file)
        if descriptor is None:
            if len(self._open) >= _MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            descriptor = self._open[file] = os.open(self.files[file], os.O_RDONLY)
        self._open.move_to_end(file)
        # pread has no file position, so forked loader workers may share a descriptor.
        return os.pread(descriptor, size, start)


def code_digest(*modules: ModuleType) -> str:
    """A hash of the modules' source: what older code has cached is not taken for theirs."""
    return hashlib.sha256("".join(inspect.getsource(module) for module in modules).encode()).hexdigest()[:16]


def has_size(path: Path, size: int) -> bool:
    """Tell whether a file of so many bytes is there."""
    return path.is_file() and path.stat().st_size == size


def load_index(path: Path, identity: dict[str, object]) -> Index | None:
    """The index that :func:`save_index` wrote for `identity`; None when absent, damaged or of another one."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            notes = json.loads(bytes(stored["header"]))
            if notes.pop("fingerprint") != identity:
                return None
            return {name: stored[name] for name in stored.files if name != "header"}, notes
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def save_index(path: Path, identity: dict[str, object], index: Index) -> None:
    """Cache an index; on a full or read-only disk nothing is written, which costs the next start some seconds."""
    arrays, notes = index
    header = np.frombuffer(json.dumps({"fingerprint": identity, **notes}).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, header=header, **arrays)  # type: ignore[arg-type]
    with contextlib.suppress(OSError):
        atomic_write(path, buffer.getvalue())


def cache_folder(folder: Path) -> Path:
    """Folder for a dataset's caches: `folder` if it may be written, else one below the user's cache folder."""
    # Mode bits are asked too, since for root every folder is writable.
    if os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222:
        return folder
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    cache = base / "rocket-align" / "datasets" / f"{folder.parent.name}-{digest}"
    _say_once(f"{folder} may not be written: its index and statistics are cached in {cache}")
    return cache


@functools.cache
def _say_once(message: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logging.getLogger(__name__).warning(message)
