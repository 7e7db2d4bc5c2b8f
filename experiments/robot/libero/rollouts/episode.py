"""One environment process's side of a rollout: starts an episode, executes chunks of actions, films on request.

Cameras are drawn only when the policy is about to be asked. Videos are made afterward, by replaying the recorded
actions: the simulator repeats an episode bit for bit, so runs that keep only the videos of failures draw nothing twice.
"""

from __future__ import annotations

import contextlib
import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from experiments.robot.aloha import GYM_ALOHA
from experiments.robot.libero.rollouts.protocol import Episode, to_env_action
from experiments.robot.libero.rollouts.protocol import Protocol as EvalProtocol
from experiments.robot.libero.suites.task import Robot
from experiments.robot.libero.suites.tasks import find_suite
from experiments.robot.policy import Query
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_path

if TYPE_CHECKING:
    from experiments.robot.libero.simulator.environment import LiberoEnv, Observation

VIDEO_STRIDE = 2  # simulator steps a video frame: 10 frames a second of LIBERO, in real time

Array = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]


class Environment(Protocol):
    """The simulator, as an episode needs it."""

    @property
    def init_states(self) -> Array: ...
    def reset(self, init_state: Array, seed: int) -> None: ...
    def step(self, action: Array) -> bool: ...
    def observe(self, wrist: bool = True) -> Observation: ...
    def close(self) -> None: ...


MakeEnv = Callable[[Episode, EvalProtocol], Environment]


@dataclass(frozen=True)
class StepResult:
    """State of an episode after some steps: a `query` for the policy, or None when it is over."""

    query: Query | None
    success: bool
    steps: int


@dataclass(frozen=True)
class WorkerReply:
    """Outcome of a request: `value`, or the one-line `error` (`usage`: the user can mend it, so the run stops).

    `seconds` says where its time went: creation, reset (settling included), physics, rendering.
    """

    value: StepResult | None = None
    error: str | None = None
    usage: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)


def make_libero_env(episode: Episode, protocol: EvalProtocol) -> LiberoEnv:
    """LIBERO's simulator for an episode's task; the default of :class:`EpisodeRunner`."""
    from experiments.robot.libero.simulator.environment import LiberoEnv

    env = LiberoEnv(episode.suite, episode.task_id, image_size=protocol.image_size, render=protocol.render)
    env.robot_start = episode.robot_start
    env.observe()  # Opens the renderer, which takes a second or two: part of creation, not of the first episode.
    return env


def make_simulator(episode: Episode, protocol: EvalProtocol) -> Environment:
    """The simulator of an episode's suite."""
    if episode.suite != GYM_ALOHA:
        return make_libero_env(episode, protocol)
    from experiments.robot.aloha.environment import AlohaEnv

    env = AlohaEnv(episode.task_id, image_size=protocol.image_size, render=protocol.render)
    env.observe()  # As above.
    return env


class EpisodeRunner:
    """Runs one episode at a time; keeps the environment while episodes are of the same task.

    `views` is 1 for a policy that looks through the third-person camera alone: the wrist camera is not drawn for it.
    """

    def __init__(self, protocol: EvalProtocol, make_env: MakeEnv = make_libero_env, *, views: int = 2) -> None:
        self.protocol = protocol
        self._looks: Mapping[str, bool] = {} if views > 1 else {"wrist": False}
        self._make_env = make_env
        self._env: Environment | None = None
        self._env_task: tuple[str, int] | None = None
        self._episode: Episode | None = None
        self._actions: list[Array] = []
        self._seconds: dict[str, float] = {}

    def begin(self, episode: Episode) -> StepResult:
        """Reset to the episode's start state, settle, and return the first query."""
        self._episode, self._actions = episode, []
        self._reset()
        return self._ask()

    def advance(self, actions_TA: Array) -> StepResult:
        """Execute the policy's actions until the open-loop limit, success, or the step limit."""
        assert self._episode is not None
        with self._timed("physics"):
            for action_A in actions_TA[: self.protocol.open_loop_steps]:
                self._actions.append(to_env_action(action_A) if self._robot.flips_gripper else action_A)
                if self._simulator.step(self._actions[-1]):
                    return StepResult(None, True, len(self._actions))
                if len(self._actions) >= (self._episode.max_steps or self.protocol.max_steps):
                    return StepResult(None, False, len(self._actions))
        return self._ask()

    def film(self, path: Path) -> None:
        """Replay the episode that ended last and write it to `path` (mp4, all cameras side by side)."""

        def frames() -> Iterator[Image]:
            self._reset()
            yield self._frame()
            for number, action_A in enumerate(self._actions, start=1):
                self._simulator.step(action_A)
                if number % VIDEO_STRIDE == 0 or number == len(self._actions):
                    yield self._frame()

        write_video(path, frames(), self._robot.control_hz / VIDEO_STRIDE)

    def perform(self, request: str, *arguments: object) -> WorkerReply:
        """Call a method by name; an exception becomes an error reply and the environment is built anew next time."""
        self._seconds = {}
        try:
            return WorkerReply(getattr(self, request)(*arguments), seconds=self._seconds)
        except UsageError as error:
            self.close()
            return WorkerReply(error=str(error), usage=True)
        except Exception as error:
            self.close()
            return WorkerReply(error=describe_error(error), seconds=self._seconds)

    def close(self) -> None:
        """Free the environment and its renderer. Closing twice is fine."""
        env, self._env, self._env_task = self._env, None, None
        if env is not None:
            env.close()
            del env
            gc.collect()  # robosuite's objects refer to each other: hundreds of MB would stay until some later time.

    @property
    def _simulator(self) -> Environment:
        assert self._env is not None
        return self._env

    @property
    def _robot(self) -> Robot:
        assert self._episode is not None
        return find_suite(self._episode.suite).robot

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started

    def _reset(self) -> None:
        episode = self._episode
        assert episode is not None
        if self._env_task != (episode.suite, episode.task_id):
            with self._timed("creation"):
                self.close()
                self._env = self._make_env(episode, self.protocol)
                self._env_task = (episode.suite, episode.task_id)
        with self._timed("reset"):
            self._to_start(episode)

    def _to_start(self, episode: Episode) -> None:
        if episode.start_vector is not None:
            start = np.asarray(episode.start_vector)
        else:
            start = self._simulator.init_states[episode.init_state]
        try:
            self._simulator.reset(start, seed=self.protocol.env_seed + episode.init_state)
        except UsageError as error:
            if episode.start_vector is not None:
                raise UsageError(f"--initial_states_path: {error}") from None
            raise ValueError(str(error)) from None  # A state that does not fit is this episode's error, not the run's.
        for _ in range(self.protocol.settle_steps):
            self._simulator.step(np.array(self._robot.idle))

    def _ask(self) -> StepResult:
        assert self._episode is not None
        with self._timed("rendering"):
            seen, steps = self._simulator.observe(**self._looks), len(self._actions)
        seed = self._episode.query_seed(steps)
        query = Query(
            seen.image, seen.wrist_image, seen.state, self._episode.task, seed, extra_images=_extra_images(seen)
        )
        return StepResult(query, False, steps)

    def _frame(self) -> Image:
        seen = self._simulator.observe()
        return np.concatenate([seen.image, seen.wrist_image, *_extra_images(seen)], axis=1)


def _extra_images(seen: Observation) -> tuple[Image, ...]:
    """Further wrist cameras' pictures; an environment of one's own need not name any."""
    return getattr(seen, "extra_images", ())


def describe_error(error: BaseException) -> str:
    """An exception as one line: type, message, and where it was raised."""
    message = " ".join(str(error).split())[:500]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message}{where}"


def write_video(path: Path, frames: Iterable[Image], frames_per_second: float) -> None:
    """Write uint8 (H, W, 3) frames as H.264; the file appears only when it is complete."""
    import imageio_ffmpeg

    writer = None
    with atomic_path(path) as temporary:
        try:
            for frame in frames:
                if writer is None:
                    height, width = frame.shape[:2]
                    writer = imageio_ffmpeg.write_frames(
                        str(temporary),
                        (width, height),
                        fps=frames_per_second,
                        macro_block_size=2,
                        ffmpeg_log_level="error",
                    )
                    writer.send(None)
                writer.send(np.ascontiguousarray(frame))
        finally:
            if writer is not None:
                writer.close()
