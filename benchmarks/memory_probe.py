"""The machine, memory and time of the phases of this process, sampled while they run (Linux), and results files.

Not obvious: pages of a file that is mapped privately and only read count as "file": the kernel may drop and read them
again, so they are needed in the sense of speed, not of survival. "anonymous" memory is what cannot be dropped.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from prismatic.util.files import atomic_write

_FLAGS_OF_PLACES = ("work_dir", "out", "keep_weights", "data_root_dir")


def machine() -> dict[str, object]:
    """Collect what numbers depend on, without names or paths."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }


def write_results(
    path: str | Path, benchmark: str, flags: Mapping[str, object], content: Mapping[str, object], *, say: bool = True
) -> None:
    """Write a results file: the benchmark's name, the flags that shape its numbers, and `content`; `say` where."""
    shaping = {name: value for name, value in flags.items() if name not in _FLAGS_OF_PLACES}
    atomic_write(path, json.dumps({"benchmark": benchmark, "flags": shaping, **content}, indent=2) + "\n")
    if say:
        print(f"results: {path}")


def resident_memory(pid: int | None = None) -> dict[str, int]:
    """Bytes of a process (default: this one) in memory: {"anonymous": ..., "file": ...}."""
    usage = psutil.Process(pid).memory_info()
    return {"anonymous": usage.rss - usage.shared, "file": usage.shared}


def major_faults() -> int:
    """Pages that this process had to wait for from the disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


@dataclass
class Phase:
    """One phase: its wall time and the most memory seen in it, in bytes."""

    seconds: float = 0.0
    anonymous_at_start: int = 0
    peak_anonymous: int = 0
    peak_file: int = 0
    peak_total: int = 0
    pages_read: int = 0


@dataclass
class MemoryProbe:
    """Attributes memory and time to whatever phase was entered last.

    with MemoryProbe() as probe: probe.enter("forward"); ...; probe.enter("backward"); ...
    """

    interval: float = 0.02
    suffix: str = ""  # Put after the names of phases, to tell steps apart
    phases: dict[str, Phase] = field(default_factory=dict)

    def __enter__(self) -> MemoryProbe:
        self._current: Phase | None = None
        self._entered, self._faults = time.perf_counter(), major_faults()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enter(None)
        self._stop.set()
        self._thread.join()

    def enter(self, name: str | None) -> None:
        """Close the phase that is open and open `name`; None opens none."""
        self._sample()
        with self._lock:
            now, faults = time.perf_counter(), major_faults()
            if self._current is not None:
                self._current.seconds += now - self._entered
                self._current.pages_read += faults - self._faults
            self._current = None if name is None else self.phases.setdefault(name + self.suffix, Phase())
            self._entered, self._faults = now, faults
            if self._current is not None and not self._current.anonymous_at_start:
                self._current.anonymous_at_start = resident_memory()["anonymous"]
        self._sample()

    def to_dict(self) -> dict[str, object]:
        """The phases, for a results file."""
        return {name: asdict(phase) for name, phase in self.phases.items()}

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            phase = self._current
            if phase is None:
                return
            now = resident_memory()
            phase.peak_anonymous = max(phase.peak_anonymous, now["anonymous"])
            phase.peak_file = max(phase.peak_file, now["file"])
            phase.peak_total = max(phase.peak_total, now["anonymous"] + now["file"])
