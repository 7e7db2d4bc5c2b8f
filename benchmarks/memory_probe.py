"""Memory and time of the phases of this process, sampled from /proc while they run (Linux).

Not obvious: pages of a file that is mapped privately and only read count as "file": the kernel may drop and read them
again, so they are needed in the sense of speed, not of survival. "anonymous" memory is what cannot be dropped.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


def resident_memory() -> dict[str, int]:
    """Bytes of this process in memory: {"anonymous": ..., "file": ...}."""
    values = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            values[name] = int(rest.split()[0]) * 1024
    return {"anonymous": values["RssAnon"], "file": values["RssFile"]}


def major_faults() -> int:
    """Pages that this process had to wait for from the disk."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[9])


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

    def to_dict(self) -> dict[str, Any]:
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
