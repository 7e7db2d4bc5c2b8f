"""A data set's files as the loader needs them, whichever format they have."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

_MAX_OPEN_FILES = 32


@dataclass
class EpisodeData(ABC):
    """The episodes of one split, all numbers in memory, images read when asked for; E episodes, F frames.

    Attributes:
        action: raw actions (F, A); state: raw states (F, S), S = 0 for a robot without; both float32, gripper as the
            RLDS data have it.
        language: number of the frame's instruction in `instructions` (F,) int32.
        episode_start: first frame of every episode, and F at the end (E + 1,) int64.
        views: names of the views, in the order the policy sees them.
    """

    action: np.ndarray
    state: np.ndarray
    language: np.ndarray
    instructions: tuple[str, ...]
    episode_start: np.ndarray
    views: tuple[str, ...]

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

        Raises:
            UsageError: its file is gone or damaged; names file and frame.
        """


class DatasetSplit(Protocol):
    """One split of a data set that was found on disk, its schema checked, its episodes not read yet."""

    @property
    def folder(self) -> Path:
        """The data set's folder."""

    @property
    def split(self) -> str:
        """Its name, such as "train"."""

    def fingerprint(self) -> dict[str, object]:
        """Everything the episodes depend on, JSON-ready; two equal fingerprints mean the same table."""

    def load(self) -> EpisodeData:
        """Read the episodes (or their cached index)."""


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
