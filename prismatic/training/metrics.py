"""Metrics: averaged on the device, fetched once a log line, written as JSONL and to whatever trackers a user chose."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from prismatic.checkpoint.layout import LOG_FILE
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, storage_errors

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor


# Columns that differ from run to run of the same training.
PACE = ("seconds", "samples_per_second", "seconds_left", "memory_gb")


class MetricAverager:
    """Running means of device scalars: `add` never waits for the device; `pop` waits once, for all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add one step's scalars; each name is averaged over the calls that gave it."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last call, over all processes; starts anew."""
        import torch  # Late: reading a log takes none, so commands that report answer at once.

        names = sorted(self._sums)
        if not names:
            return {}
        means = torch.stack([self._sums[name].to(accelerator.device) / self._counts[name] for name in names])
        values = accelerator.reduce(means, reduction="mean").tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, values, strict=True))


class MetricLog:
    """Appends one JSON object a line to `metrics.jsonl` and passes scalars on to accelerate's trackers.

    Args:
        folder: the run's folder.
        accelerator: only its main process writes.
        last_step: lines of later steps, left by a run that went on after its last checkpoint, are removed.

    Raises:
        UsageError: another process is writing there.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, last_step: int = 0) -> None:
        self._accelerator = accelerator
        self._path = folder / LOG_FILE
        self._lock: int | None = None
        if accelerator.is_main_process:
            self._lock = _lock(folder)
            with storage_errors("log", folder):
                atomic_write(self._path, _lines_until(self._path, last_step) if last_step else b"")

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line: the step and its values."""
        if self._accelerator.is_main_process:
            with storage_errors(f"log line of step {step}", self._path.parent), self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log(values, step=step)

    def close(self) -> None:
        """Let another process train in the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def used_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU since the last call; on a CPU, this process's resident memory."""
    import torch

    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return int(psutil.Process().memory_info().rss)


def _lock(folder: Path) -> int:
    """Descriptor of the folder, which is locked while it is open."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(f"--run_id_override: {folder} is being written; accepted: another name") from None
    except OSError:
        pass  # A file system without locks.
    return descriptor


def read_log(path: Path) -> list[dict[str, float]]:
    """The numbers of a metrics file, line by line; what is no such line, as one cut off by a crash, is left out."""
    lines = path.read_bytes().splitlines() if path.is_file() else ()
    return [
        {name: value for name, value in row.items() if type(value) in (int, float)}
        for line in lines
        if (row := _row(line)) is not None
    ]


def _row(line: bytes) -> dict[str, Any] | None:
    """The object on a line, or None where it is none or has no step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _lines_until(path: Path, last_step: int) -> bytes:
    """The lines of a log as they are, but for those of later steps and an end that a crash cut off."""
    if not path.is_file():
        return b""
    *lines, end = path.read_bytes().split(b"\n")
    if _row(end):
        lines.append(end)
    return b"".join(line + b"\n" for line in lines if (row := _row(line)) is None or row["step"] <= last_step)
