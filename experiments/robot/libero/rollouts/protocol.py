"""The LIBERO evaluation protocol as data, and which episodes a run consists of. Needs no simulator.

Behaviors that are easy to miss:
- The settle steps do not count toward the step limit, and "done" during them is ignored (upstream does both).
- Start states are fixed vectors, so the run's `seed` is for the policy's own randomness (diffusion noise). What the
  simulator still draws at a reset, where a cabinet or stove stands to a centimeter or two, depends on `env_seed`.
- Upstream seeds the simulator once a task (with 0), so that every later episode draws from wherever the generator got
  to. Here episode number i is seeded with `env_seed` + i: as varied, and independent of order and of worker count.
- A chunk runs open loop, but the episode ends at once when the simulator reports success inside it.
- LIBERO-PRO's perturbed suites (`libero_goal_swap`, ...) take the step limit of the suite they perturb.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.robot.robot_utils import invert_gripper_action, normalize_gripper_action
from prismatic.util.errors import unknown_name

Array = npt.NDArray[Any]

# Longest demonstration of the suite, rounded up (upstream's table).
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
# LIBERO-Plus perturbs four of them: `libero_plus_object` is libero_object's part, `libero_plus` all four.
PLUS_SUITES = {f"libero_plus_{suite.removeprefix('libero_')}": suite for suite in MAX_STEPS if suite != "libero_90"}
PLUS_ALL = "libero_plus"
DUMMY_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)


@dataclass(frozen=True)
class Protocol:
    """How an episode is run; part of what makes two runs comparable.

    `max_steps` policy steps at most after `settle_steps` steps of :data:`DUMMY_ACTION`; `open_loop_steps` actions of
    each chunk are executed; cameras of `image_size` pixels, drawn as `render` says; `env_seed` seeds the simulator.
    """

    max_steps: int
    settle_steps: int = 10
    open_loop_steps: int = 8
    image_size: int = 256
    render: str = "protocol"
    env_seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def is_standard(self) -> bool:
        """Whether everything but the step limit is as published LIBERO numbers have it."""
        return self == Protocol(max_steps=self.max_steps)


@dataclass(frozen=True)
class Episode:
    """One episode to run: a task of a suite (`task` is its instruction), from its fixed state number `init_state`.

    `start_vector`, when given, replaces the benchmark's own state of that number (`--initial_states_path`);
    `max_steps`, when not 0, the protocol's step limit. A perturbed task has a `kind`, where known a `level` (its
    strength on the generator's scale) and its full `task_name`; for `robot_start` see :mod:`plus_scene`.
    """

    suite: str
    task_id: int
    task: str
    init_state: int
    seed: int
    start_vector: tuple[float, ...] | None = None
    max_steps: int = 0
    kind: str | None = None
    level: int | None = None
    task_name: str | None = None
    robot_start: str = "perturbed"

    @property
    def key(self) -> tuple[str, int, int]:
        """What identifies the episode within a run."""
        return (self.suite, self.task_id, self.init_state)

    def query_seed(self, step: int) -> int:
        """Seed of the policy's randomness at `step`: the same whichever worker runs the episode, and when."""
        return zlib.crc32(f"{self.seed}:{self.suite}:{self.task_id}:{self.init_state}:{step}".encode())


def max_steps_for(suite: str) -> int:
    """The protocol's step limit of `suite`; perturbed ones (`libero_10_swap`, `libero_plus_10`) have their base's.

    For `libero_plus`, whose four parts have limits of their own, it is the largest.

    Raises:
        UsageError: no such suite.
    """
    if suite == PLUS_ALL:
        return max(MAX_STEPS[base] for base in PLUS_SUITES.values())
    base = base_suite(suite)
    if base not in MAX_STEPS:
        raise unknown_name("--task_suite_name", suite, [*MAX_STEPS, PLUS_ALL, *PLUS_SUITES])
    return MAX_STEPS[base]


def base_suite(suite: str) -> str:
    """The suite of LIBERO that `suite` perturbs (`libero_goal` for `libero_goal_swap`), or `suite` itself."""
    bases = [base for base in MAX_STEPS if suite.startswith(base + "_")]
    return PLUS_SUITES.get(suite, bases[0] if bases else suite)


def to_env_action(action_A: Array) -> Array:
    """A policy's action as the simulator takes it: gripper from [0, 1] (1 open) to -1/+1 (-1 open)."""
    return invert_gripper_action(normalize_gripper_action(action_A, binarize=True))


class EpisodeQueue:
    """Hands out episodes so that a worker stays with its task: a new environment costs seconds, a reset far less."""

    def __init__(self, episodes: Iterable[Episode]) -> None:
        self._by_task: dict[tuple[str, int], deque[Episode]] = {}
        self._workers_on: dict[tuple[str, int], int] = {}
        for episode in episodes:
            self._by_task.setdefault((episode.suite, episode.task_id), deque()).append(episode)

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._by_task.values())

    def take(self, current: tuple[str, int] | None = None) -> Episode | None:
        """The next episode for a worker whose environment is of task `current`, or None when nothing is left.

        With its own task finished, a worker goes where the most episodes wait for each worker that is already there.
        """
        if current is not None and self._by_task.get(current):
            return self._by_task[current].popleft()
        if current is not None and self._workers_on.get(current):
            self._workers_on[current] -= 1
        tasks = [task for task, waiting in self._by_task.items() if waiting]
        if not tasks:
            return None
        task = max(tasks, key=lambda task: len(self._by_task[task]) / (1 + self._workers_on.get(task, 0)))
        self._workers_on[task] = self._workers_on.get(task, 0) + 1
        return self._by_task[task].popleft()

    def put_back(self, episode: Episode) -> None:
        """Return an episode whose worker died; it is the next of its task."""
        self._by_task.setdefault((episode.suite, episode.task_id), deque()).appendleft(episode)


def checked_chunk(chunk: Any, open_loop_steps: int, action_dim: int) -> Array:
    """One episode's answer of the policy as (T, A) floats, or a ValueError that says what is wrong with it."""
    actions_TA = np.asarray(chunk)
    if actions_TA.ndim != 2 or actions_TA.shape[0] < open_loop_steps or actions_TA.shape[1] != action_dim:
        wanted = f"(at least {open_loop_steps}, {action_dim})"
        raise ValueError(f"policy answered shape {actions_TA.shape}; the protocol needs {wanted}")
    if not np.issubdtype(actions_TA.dtype, np.number) or not np.isfinite(actions_TA).all():
        raise ValueError("policy answered values that are not finite numbers")
    return actions_TA.astype(np.float64)
