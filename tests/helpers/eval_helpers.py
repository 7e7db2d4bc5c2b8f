"""A point on a line in place of the simulator, and policies for it: for what the real one does too slowly or never.

In a module of its own, on the import path, because environment processes import it by name.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from experiments.robot.libero.rollouts.protocol import Episode, Protocol
from experiments.robot.policy import Query

GOAL = 4.0
IMAGE = np.zeros((16, 16, 3), dtype=np.uint8)


class LineEnv:
    """Starts at 0; each action adds its first number; done at GOAL. Init state numbers 10 and up misbehave."""

    RAISES, DIES, DIES_ONCE, HANGS = 10, 11, 12, 13

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self.instruction = "reach the end"
        self.init_states = np.arange(20.0)[:, None]
        self.closed = False
        self._note("created")

    def _note(self, word: str) -> None:
        if self.folder:
            with (Path(self.folder) / f"{word}.{os.getpid()}").open("a") as stream:
                stream.write("x")

    def reset(self, init_state: np.ndarray, seed: int = 0) -> None:
        self.number, self.position, self.actions = int(init_state[0]), 0.0, 0

    def step(self, action: np.ndarray) -> bool:
        settling = self.actions < 2
        self.actions += 1
        if settling:
            return True  # Ignored by the protocol.
        if self.number == self.RAISES:
            raise RuntimeError("the arm fell off")
        first_time = self.folder and not list(Path(self.folder).glob("died.*"))
        if self.number == self.DIES or (self.number == self.DIES_ONCE and first_time):
            self._note("died")
            os.kill(os.getpid(), signal.SIGKILL)
        if self.number == self.HANGS:
            time.sleep(60)
        self.position += action[0]
        return self.position >= GOAL

    def observe(self) -> SimpleNamespace:
        self._note("observed")
        return SimpleNamespace(image=IMAGE, wrist_image=IMAGE, state=np.full(8, self.position))

    def close(self) -> None:
        self.closed = True
        self._note("closed")


@dataclass(frozen=True)
class LineEnvs:
    """Makes :class:`LineEnv`; `folder` collects notes of what happened in which process."""

    folder: str | None = None

    def __call__(self, episode: Episode, protocol: Protocol) -> LineEnv:
        return LineEnv(self.folder)


class LinePolicy:
    """Moves by `speed`; remembers the batch sizes it was asked for."""

    def __init__(self, speed: float = 0.5) -> None:
        self.speed = speed
        self.batches: list[int] = []

    def act(self, queries: Sequence[Query]) -> np.ndarray:
        self.batches.append(len(queries))
        chunk = np.zeros((len(queries), 8, 7))
        chunk[..., 0] = self.speed
        return chunk


class NoisePolicy:
    """Random motions that depend on each query's seed alone."""

    def act(self, queries: Sequence[Query]) -> np.ndarray:
        chunks = [np.random.default_rng(query.seed).uniform(-1, 1, (8, 7)) for query in queries]
        return np.stack(chunks)


class Misbehaving:
    """Of the questions it is asked, answers one each with NaN, too few numbers, too late, not at all; then well."""

    def __init__(self) -> None:
        self.asked = 0

    def act(self, queries: Sequence[Query]) -> np.ndarray:
        self.asked += len(queries)
        if self.asked == 1:
            return np.full((len(queries), 8, 7), np.nan)
        if self.asked == 2:
            return np.zeros((len(queries), 8, 6))
        if self.asked == 3:
            time.sleep(1.5)
        if self.asked == 4:
            raise RuntimeError("out of memory")
        return np.zeros((len(queries), 8, 7))


class RecordedLibero:
    """LIBERO's simulator that notes its state after every step of an episode: one array (S, nq + nv) an episode."""

    def __init__(self, folder: str, episode: Episode, protocol: Protocol) -> None:
        from experiments.robot.libero.rollouts.episode import make_libero_env

        self._folder, self._settle = Path(folder), protocol.settle_steps
        self._env = make_libero_env(episode, protocol)
        self.init_states, self.observe, self.close = self._env.init_states, self._env.observe, self._env.close

    def reset(self, init_state: np.ndarray, seed: int = 0) -> None:
        self._env.reset(init_state, seed)
        number = int(np.flatnonzero((self.init_states == init_state).all(axis=1))[0])
        self._file, self._states = self._folder / f"{self._env.task.task_id}-{number}.npy", []

    def step(self, action: np.ndarray) -> bool:
        done = self._env.step(action)
        data = self._env.domain.sim.data
        self._states.append(np.concatenate([data.qpos, data.qvel]))
        np.save(self._file, np.array(self._states[self._settle :]))
        return done


@dataclass(frozen=True)
class RecordedLiberos:
    """Makes :class:`RecordedLibero`."""

    folder: str

    def __call__(self, episode: Episode, protocol: Protocol) -> RecordedLibero:
        return RecordedLibero(self.folder, episode, protocol)


@dataclass(frozen=True)
class PatientEnvs(LineEnvs):
    """Environments of task 1 that are not made (or not reset) before another process has moved."""

    patient_in: str = "creation"

    def __call__(self, episode: Episode, protocol: Protocol) -> LineEnv:
        env = super().__call__(episode, protocol)
        if episode.task_id == 1 and self.patient_in == "creation":
            self._wait()
        if episode.task_id == 1 and self.patient_in == "reset":
            reset = env.reset
            env.reset = lambda *arguments, **named: (self._wait(), reset(*arguments, **named))  # type: ignore[method-assign]
        return env

    def _wait(self) -> None:
        assert self.folder
        deadline = time.monotonic() + 300
        while sum(len(file.read_text()) for file in Path(self.folder).glob("observed.*")) < 2:
            if time.monotonic() > deadline:
                raise TimeoutError("nobody moved meanwhile")
            time.sleep(0.01)
