"""Workers that step episodes: in this process, or in spawned ones that may die without taking the run along."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Protocol

from experiments.robot.libero.rollouts.episode import EpisodeRunner, WorkerReply

MakeRunner = Callable[[], EpisodeRunner]
_BYTES_PER_WORKER = 2.5e9  # resident memory of one rendering simulator, with some room
_MOST_WORKERS = 32
# One thread a library: a simulator gains nothing from more, and many workers would fight.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


class WorkerDied(Exception):
    """The process of a worker ended or hung; the message says how."""


class Worker(Protocol):
    """Takes one request at a time and has its reply ready some time later."""

    def submit(self, request: str, *arguments: object) -> None: ...

    def reply(self) -> WorkerReply:
        """The reply to the last request. Raises WorkerDied when there will be none."""

    def restart(self) -> None: ...

    def close(self) -> None: ...


class LocalWorker:
    """Performs requests in this process, at once."""

    def __init__(self, make_runner: MakeRunner) -> None:
        self._runner = make_runner()
        self._reply = WorkerReply()

    def submit(self, request: str, *arguments: object) -> None:
        self._reply = self._runner.perform(request, *arguments)

    def reply(self) -> WorkerReply:
        return self._reply

    def restart(self) -> None:
        self._runner.close()

    def close(self) -> None:
        self._runner.close()


class ProcessWorker:
    """Performs requests in a spawned process (not forked: CUDA and OpenGL contexts do not survive a fork)."""

    def __init__(self, make_runner: MakeRunner, *, alone_on_core: bool = False) -> None:
        self._make_runner = make_runner
        self._threads = dict.fromkeys(_THREAD_VARIABLES, "1")
        if alone_on_core:
            # Mesa's software renderer draws in the calling thread; helpers would only take turns with other workers.
            self._threads["LP_NUM_THREADS"] = os.environ.get("LP_NUM_THREADS", "0")
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._make_runner), daemon=True)
        with _environment(self._threads):
            self._process.start()
        theirs.close()

    def submit(self, request: str, *arguments: object) -> None:
        # A worker that died meanwhile shows when its reply is read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send((request, arguments))

    def reply(self) -> WorkerReply:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(timeout=10)
            raise WorkerDied(f"environment process died ({_exit_reason(self._process.exitcode)})") from None

    def restart(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()
        self._start()

    def hang_up(self) -> None:
        """Tell the process to end; :meth:`close` waits for it."""
        self.connection.close()

    def close(self) -> None:
        self.connection.close()
        self._process.join(timeout=15)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def make_workers(count: int, make_runner: MakeRunner) -> Sequence[LocalWorker] | Sequence[ProcessWorker]:
    """One worker in this process, or `count` processes."""
    if count == 1:
        return [LocalWorker(make_runner)]
    alone = count >= available_cores()
    return [ProcessWorker(make_runner, alone_on_core=alone) for _ in range(count)]


def close_workers(workers: Sequence[Worker]) -> None:
    """Close all; processes wind down side by side."""
    for worker in workers:
        if isinstance(worker, ProcessWorker):
            worker.hang_up()
    for worker in workers:
        worker.close()


def ready(workers: Sequence[Worker], timeout: float | None) -> list[Worker]:
    """Those workers whose reply (or death) can be read now, waiting up to `timeout` seconds for the first one."""
    local = [worker for worker in workers if not isinstance(worker, ProcessWorker)]
    by_connection = {worker.connection: worker for worker in workers if isinstance(worker, ProcessWorker)}
    if not by_connection:
        return local
    connections = multiprocessing.connection.wait(list(by_connection), 0 if local else timeout)
    return local + [by_connection[connection] for connection in connections]  # type: ignore[index]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def policy_threads(workers: int, shares: int = 1) -> Iterator[None]:
    """Leave torch the cores that the workers leave over, at least one: on all cores they would wait for each other."""
    torch = sys.modules.get("torch")
    if torch is None or workers < 2:  # A remote policy, or the only worker is in this process and takes turns with it.
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, max(1, available_cores() // shares - workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_num_workers(num_episodes: int, shares: int = 1) -> int:
    """As many simulators as this process's share of cores and free memory carries, at most one an episode."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in os.sysconf_names else 16e9
    return max(
        1, min(available_cores() // shares, int(free / _BYTES_PER_WORKER) // shares, num_episodes, _MOST_WORKERS)
    )


def _serve(connection: Connection, make_runner: MakeRunner) -> None:
    """Body of an environment process: requests in, replies out, until the other side hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends us.
    runner = make_runner()
    try:
        while True:
            request, arguments = connection.recv()
            connection.send(runner.perform(request, *arguments))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        runner.close()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a child to be started."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _exit_reason(exit_code: int | None) -> str:
    if exit_code is None:
        return "no exit code"
    if exit_code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"


def seconds_left(deadlines: Sequence[float]) -> float:
    """Seconds until the first of some deadlines on the monotonic clock, at least 0."""
    return max(0.0, min(deadlines) - time.monotonic())
