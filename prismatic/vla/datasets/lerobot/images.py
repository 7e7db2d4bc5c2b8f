"""Images of a LeRobot dataset by frame number: out of videos, or out of a file of packed images.

A video frame costs a seek to the key frame before it and the decoding from there on; LeRobot writes a key frame every
second frame. Memory is bounded: a few videos stay open, no frame is kept.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.util.errors import UsageError, one_line
from prismatic.vla.datasets.episodes import ByteReader
from prismatic.vla.datasets.image_transforms import decode_with_pillow
from prismatic.vla.datasets.lerobot.metadata import require

_MAX_OPEN_VIDEOS = 8
TIME_TOLERANCE = 1e-4  # seconds between a row's time stamp and a frame's, as LeRobot has it


def time_tolerance(seconds: np.ndarray) -> np.ndarray:
    """Distance allowed to a time stamp's frame (float32): LeRobot's tolerance, or the rounding in a long episode."""
    return np.maximum(TIME_TOLERANCE, np.spacing(np.abs(seconds).astype(np.float32)))


def frame_times(path: Path) -> np.ndarray:
    """The times (seconds, ascending) of a video's frames, read without decoding them.

    Raises UsageError: the file is damaged.
    """
    av = require("av")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            return np.sort(np.array(times, np.float64)) * float(stream.time_base)
    except (av.FFmpegError, OSError, IndexError) as error:
        raise UsageError(f"{path}: no readable video ({one_line(error)})") from error


class PackedImages:
    """Encoded images in one file; `start` and `size` (F,) say where each frame's lies."""

    def __init__(self, file: Path, start: np.ndarray, size: np.ndarray) -> None:
        self.start, self.size = start, size
        self._reader = ByteReader((file,))

    def image(self, frame: int) -> np.ndarray:
        """The decoded image of a frame, as LeRobot decodes it."""
        try:
            return decode_with_pillow(self._reader.read(0, int(self.start[frame]), int(self.size[frame])))
        except (OSError, ValueError) as error:
            raise UsageError(f"{self._reader.files[0]}: frame {frame}: {one_line(error)}") from error


@dataclass
class VideoImages:
    """Frames of videos."""

    files: tuple[Path, ...]  # The videos
    file: np.ndarray  # Number of each frame's video in `files` (F,)
    seconds: np.ndarray  # Each frame's time in its video (F,) float64
    fps: float  # Frames a second
    _open: OrderedDict[int, Any] = field(default_factory=OrderedDict, init=False, repr=False)
    _owner: int = field(default=0, init=False, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def image(self, frame: int) -> np.ndarray:
        """The decoded frame."""
        av = require("av")
        number, seconds = int(self.file[frame]), float(self.seconds[frame])
        path = self.files[number]
        try:
            image = self._decode(self._container(number), seconds)
        except (av.FFmpegError, OSError) as error:
            raise UsageError(f"{path}: at {seconds:.3f} s: {one_line(error)}") from error
        if image is None:
            raise UsageError(f"{path}: no frame at {seconds:.3f} s (truncated, or not {self.fps:g} frames a second?)")
        if abs(image.time - seconds) > 2 * float(time_tolerance(np.array(seconds))):
            raise UsageError(
                f"{path}: the frame nearest to {seconds:.6g} s is at {image.time:.6g} s; "
                f"accepted: within {TIME_TOLERANCE:g} s"
            )
        return np.asarray(image.to_ndarray(format="rgb24"))

    def _decode(self, container: Any, seconds: float) -> Any:
        """The frame whose time is nearest to `seconds`; None when that is half a frame or more away."""
        stream = container.streams.video[0]
        half = 0.5 / self.fps
        # From a key frame not after the wanted one; a video whose index puts it later is decoded from its beginning.
        for begin in (seconds + half / 2, 0.0):
            container.seek(int(begin / stream.time_base), stream=stream)
            first = True
            for frame in container.decode(stream):
                if frame.time >= seconds + half:
                    if first and begin > 0.0:
                        break
                    return None
                if frame.time > seconds - half:
                    return frame
                first = False
            else:
                return None
        return None

    def _container(self, number: int) -> Any:
        """The opened video; a forked process opens its own, since a file position cannot be shared."""
        if self._owner != os.getpid():
            self._open, self._owner = OrderedDict(), os.getpid()
        container = self._open.get(number)
        if container is None:
            if len(self._open) >= _MAX_OPEN_VIDEOS:
                self._open.popitem(last=False)[1].close()
            container = self._open[number] = require("av").open(str(self.files[number]))
            # Loader workers are the parallelism; decoder threads would only add memory and delay.
            container.streams.video[0].codec_context.thread_count = 1
        self._open.move_to_end(number)
        return container
