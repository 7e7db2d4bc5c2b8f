"""Run commands side by side on the machine's cores: each with its own log, skipped when its result is already there."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
REFRESH_SECONDS = 1.0
_PROMPT = "$ "
PLAIN_REPORT_SECONDS = 20.0


def as_arguments(flags: Mapping[str, object]) -> Iterator[str]:
    """Flags as a command line takes them."""
    for name, value in flags.items():
        yield f"--{name}"
        yield str(value)


class JobFailed(RuntimeError):
    """A command ended with an error; the message names its log."""


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: shown, and the name of the log file.
        arguments: what follows the Python interpreter.
        result: exists once the command has done its work; the job is then skipped.
        check: says of that path whether the work is done, where its existence is not enough.
    """

    name: str
    arguments: tuple[str, ...]
    result: Path
    check: Callable[[Path], bool] = Path.exists

    @property
    def done(self) -> bool:
        return self.check(self.result)


@dataclass(frozen=True)
class Chain:
    """Jobs that need one another, in order; `finish` is called once they are all done."""

    jobs: tuple[Job, ...]
    finish: Callable[[], object] | None = None

    @property
    def done(self) -> bool:
        return all(job.done for job in self.jobs)


@dataclass
class _Running:
    started: float
    log: Path
    process: subprocess.Popen[bytes] | None = None
    shown: str = ""


class JobRunner:
    """Runs jobs, at most `parallel` at a time, and shows the last line of each running one.

    Args:
        logs: folder of the log files.
        console: where progress goes; a console that is no terminal gets plain lines, no line twice in a row.
    """

    def __init__(self, logs: Path, console: Console) -> None:
        self.logs = logs
        self.console = console
        self.seconds: dict[str, float] = {}
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def run(self, jobs: Sequence[Job], parallel: int) -> None:
        """Run what is not done yet. Raises JobFailed when one ends with another code than 0, or without its result."""
        failures = self.run_chains([Chain((job,)) for job in jobs], parallel, keep_going=False)
        if failures:
            raise failures[0]

    def run_chains(self, chains: Sequence[Chain], parallel: int, *, keep_going: bool = True) -> list[JobFailed]:
        """Run chains side by side, the jobs of a chain one after the other; what is done is skipped.

        Args:
            keep_going: a failed job ends its own chain alone; otherwise nothing is started after it.

        Returns:
            the failures.
        """
        todo = sum(not chain.done for chain in chains)
        threads = max(1, (os.cpu_count() or 1) // max(1, min(parallel, todo or 1)))
        failures: list[JobFailed] = []
        self._stopping.clear()
        watcher = threading.Event()
        display = threading.Thread(target=self._show, args=(watcher,), daemon=True)
        display.start()

        def run_chain(chain: Chain) -> None:
            try:
                for job in chain.jobs:
                    if self._stopping.is_set() or (failures and not keep_going):
                        return
                    self._run_one(job, threads)
                if chain.finish is not None:
                    chain.finish()
            except JobFailed as failure:
                failures.append(failure)
                if not keep_going:
                    self._terminate()

        pool = ThreadPoolExecutor(parallel)
        try:
            for outcome in [pool.submit(run_chain, chain) for chain in chains]:
                outcome.result()
        finally:
            # After Ctrl-C, which ends the running commands too, nothing that waits may start in their place.
            self._stopping.set()
            self._terminate()
            pool.shutdown(cancel_futures=True)
            watcher.set()
            display.join()
        return failures

    def _run_one(self, job: Job, threads: int) -> None:
        if job.done:
            self.console.print(f"[dim]{job.name}: already done ({job.result})[/dim]", highlight=False, soft_wrap=True)
            return
        self.logs.mkdir(parents=True, exist_ok=True)
        state = _Running(time.monotonic(), self.logs / f"{job.name}.log")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with state.log.open("wb") as log:
            command = [sys.executable, *job.arguments]
            log.write(f"{_PROMPT}{shlex.join(command)}\n".encode())
            log.flush()
            with self._lock:
                state.process = subprocess.Popen(
                    command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment
                )
                self._running[job.name] = state
                if self._stopping.is_set():
                    state.process.terminate()
            code = state.process.wait()
        with self._lock:
            del self._running[job.name]
        self.seconds[job.name] = time.monotonic() - state.started
        if code != 0 or not job.done:
            raise JobFailed(f"{job.name} ended with code {code}; its log: {state.log}\n{_reason(state.log)}")
        self.console.print(f"{job.name}: done in {self.seconds[job.name]:.0f} s", highlight=False, soft_wrap=True)

    def _terminate(self) -> None:
        with self._lock:
            for state in self._running.values():
                if state.process is not None:
                    state.process.terminate()

    def _show(self, stop: threading.Event) -> None:
        if self.console.is_terminal:
            with Live(self._table(), console=self.console, transient=True, refresh_per_second=2) as live:
                while not stop.wait(REFRESH_SECONDS):
                    live.update(self._table())
            return
        while not stop.wait(PLAIN_REPORT_SECONDS):
            self._print_changes()

    def _print_changes(self) -> None:
        """The last line of every running command whose last line is another than the one printed before."""
        with self._lock:
            for name, state in self._running.items():
                line = _tail(state.log, 1)
                if line != state.shown and not line.startswith(_PROMPT):
                    self.console.print(f"  {name}: {line}", highlight=False, markup=False, soft_wrap=True)
                    state.shown = line

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        with self._lock:
            for name, state in self._running.items():
                table.add_row(name, f"{time.monotonic() - state.started:.0f} s", _tail(state.log, 1))
        return table


def logged_arguments(log: Path) -> tuple[str, ...]:
    """Read what the interpreter was given by the command of a :class:`JobRunner`'s log; () without a log."""
    if not log.is_file():
        return ()
    with log.open(encoding="utf-8", errors="replace") as stream:
        command = stream.readline()
    return tuple(shlex.split(command.removeprefix(_PROMPT))[1:])


def _reason(log: Path) -> str:
    """Why a command failed: the one line that a command of ours ends with, or else the last lines of its log."""
    last = _tail(log, 1)
    return last if last.startswith("error: ") else _tail(log, 15)


def _tail(log: Path, lines: int) -> str:
    """The last lines of a log; a progress bar that rewrites its line counts as its last state."""
    text = log.read_bytes()[-8192:].decode(errors="replace").replace("\r", "\n")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
