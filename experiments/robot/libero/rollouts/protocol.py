"""The LIBERO evaluation protocol as data: its flags, its numbers, and what an episode is. Needs no simulator.

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
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from experiments.robot.libero.suites.task import MAX_STEPS, TRIALS, Instructions, Robot
from experiments.robot.libero.suites.tasks import LIBERO_FILES, SuiteFlags, find_suite
from experiments.robot.policy import Gripper, PolicyFlags, Render
from experiments.robot.robot_utils import invert_gripper_action, normalize_gripper_action
from prismatic.util.errors import UsageError
from prismatic.util.flags import limited, numbers

__all__ = [
    "DUMMY_ACTION", "MAX_STEPS", "Episode", "EpisodeQueue", "EvalFlags", "Protocol", "checked_chunk", "max_steps_for",
    "protocol_deviations", "to_env_action",
]  # fmt: skip
Array = npt.NDArray[np.float64]
Views = Literal[1, 2, 3]
SaveVideos = Literal["none", "failures", "all"]
DUMMY_ACTION = Robot().idle


@dataclass
class _CommonFlags(PolicyFlags):
    """Flags for every suite: OpenVLA-OFT's, and ours."""

    # What is evaluated
    num_images_in_input: Views = 2  # Camera views: the third-person one, then the wrist camera, or two of gym_aloha's
    unnorm_key: str = ""  # Dataset whose statistics un-normalize actions; default: the suite, then suite_no_noops
    policy: str = ""  # Instead of a checkpoint: http://HOST:PORT or ws://HOST:PORT of a server, or MODULE:FACTORY
    # Gripper of a server's actions; policy: 1 = open; libero: -1 = open; auto: as it says
    policy_gripper: Gripper = "auto"
    # Seconds an answer may take, then the episode is an error; 0: 60 of servers, else any
    policy_timeout: float = limited(0.0, least=0)

    # The protocol
    task_suite_name: str = "libero_spatial"  # libero_spatial, _object, _goal, _10, _90, or another installed suite
    # In LIBERO-Plus (libero_plus, libero_plus_object, ...) 50 means 1, its protocol
    num_trials_per_task: int = limited(TRIALS, least=1)
    num_open_loop_steps: int = limited(8, least=1)  # Actions of a chunk to execute before the policy is asked again
    num_steps_wait: int = limited(10, least=0)  # Steps for objects to settle before an episode
    env_img_res: int = limited(256, least=16, most=4096)  # Side of the rendered images in pixels
    # DEFAULT, or a file of initial states: .json, .npz, .npy, .init, .pruned_init, .pt, .hdf5
    initial_states_path: str = "DEFAULT"
    seed: int = limited(7, least=0)  # Of the policy's randomness (diffusion noise)

    # Where results go
    local_log_dir: str = "./runs/eval"  # Folder of all results
    run_id_note: str | None = None  # Appended to the default run name
    use_wandb: bool = False
    wandb_entity: str | None = None
    wandb_project: str | None = None

    # Ours
    task_ids: str = numbers("", least=0)  # Tasks to run, as in 0,3,7 or 0-4; default: all
    # Simulator processes; 1: in this process, one episode at a time; 0: as the machine carries
    num_workers: int = limited(0, least=0)
    # protocol; fast: no antialiasing and shadows, thinned meshes (not for published numbers)
    render: Render = "protocol"
    first_init_state: int = limited(0, least=0)  # Number of the first initial state
    env_seed: int = limited(0, least=0)  # Where the simulator places cabinets and stoves (0 in the protocol)
    max_steps: int = limited(0, least=0)  # Step limit of an episode; 0: the suite's
    max_steps_factor: int = limited(1, least=1)  # Multiplies that limit (3 in some reports on LIBERO-Plus)
    # bddl: the sentence of the task's file; base: LIBERO's wording; name: the task's name in words
    instruction_source: Instructions = "bddl"
    max_batch: int = limited(0, least=0)  # Most queries the policy answers at once; 0: no limit
    deterministic: bool = False  # Same bits for any number of workers: every forward asks max_batch queries (0: 1)
    save_videos: SaveVideos = "none"  # none, failures or all
    run_name: str = ""  # Folder within local_log_dir; default: from suite, checkpoint and settings
    overwrite: bool = False  # Discard results in that folder
    resume: bool = True  # Continue from results in that folder


@dataclass
class EvalFlags(SuiteFlags, _CommonFlags):
    """All flags of an evaluation; those of single suites come last."""


@dataclass(frozen=True)
class Protocol:
    """Rules of an episode; part of what makes two runs comparable.

    `max_steps` policy steps at most after `settle_steps` idle steps; `open_loop_steps` actions of
    each chunk are executed; cameras of `image_size` pixels, drawn as `render` says; `env_seed` seeds the simulator.
    """

    max_steps: int
    settle_steps: int = 10
    open_loop_steps: int = 8
    image_size: int = 256
    render: str = "protocol"
    env_seed: int = 0

    def as_dict(self) -> dict[str, int | str]:
        return asdict(self)

    @property
    def is_standard(self) -> bool:
        """True when everything but the step limit is as published LIBERO numbers have it."""
        return self == Protocol(max_steps=self.max_steps)


@dataclass(frozen=True)
class Episode:
    """One episode to run: a task of a suite (`task` is its instruction), from its fixed state number `init_state`.

    `start_vector`, when given, replaces the benchmark's own state of that number (`--initial_states_path`);
    `max_steps`, when not 0, the protocol's step limit. A perturbed task has a `kind`, where known a `level` (its
    strength on the generator's scale) and its full `task_name`; for `robot_start` see :mod:`perturbations`.
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
        """Key of the episode within a run."""
        return (self.suite, self.task_id, self.init_state)

    def query_seed(self, step: int) -> int:
        """Seed of the policy's randomness at `step`: the same whichever worker runs the episode, and when."""
        return zlib.crc32(f"{self.seed}:{self.suite}:{self.task_id}:{self.init_state}:{step}".encode())


def max_steps_for(suite: str) -> int:
    """The protocol's step limit of `suite`; perturbed ones (`libero_10_swap`, `libero_plus_10`) have their base's.

    For `libero_plus`, whose four parts have limits of their own, it is the largest.

    Raises:
        UsageError: no such suite, or none with a known limit.
    """
    record = find_suite(suite)
    if not record.max_steps:
        record.num_tasks()  # Refuses an unknown suite.
        raise UsageError(
            f"--max_steps: no step limit is known for {suite}; accepted: the limit of its tasks, 1 or more"
        )
    return record.max_steps


def protocol_deviations(identity: Mapping[str, object]) -> list[str]:
    """In what a run of this :func:`plan.run_identity` differs from the published protocol: ["render fast", ...]."""
    protocol, suite = identity.get("protocol"), str(identity.get("suite"))
    standard = Protocol(max_steps=find_suite(suite).max_steps).as_dict()
    values = {**standard, **(protocol if isinstance(protocol, Mapping) else {})}
    if not standard["max_steps"]:
        standard.pop("max_steps")  # No protocol has a limit for this suite.
    deviations = [f"{name} {values[name]}" for name, usual in standard.items() if values[name] != usual]
    if identity.get("initial_states", "DEFAULT") != "DEFAULT":
        deviations.append("initial states of a file")
    if identity.get("instruction_source", "bddl") != "bddl":
        deviations.append(f"instruction_source {identity['instruction_source']}")
    files, usual_files = identity.get("task_files"), LIBERO_FILES.get(suite, {})
    for kind, digest in files.items() if isinstance(files, Mapping) else ():
        if usual_files.get(kind, digest) != digest:
            deviations.append(f"{kind.replace('_', ' ')} that are not LIBERO's")
    if not deviations and identity.get("standard_protocol") is False:
        return ["step limit, initial states or instructions"]
    return deviations


def to_env_action(action_A: Array) -> Array:
    """A policy's action as LIBERO's simulator takes it: gripper from [0, 1] (1 open) to -1/+1 (-1 open)."""
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


def checked_chunk(chunk: npt.ArrayLike, open_loop_steps: int, action_dim: int) -> Array:
    """One episode's answer of the policy as (T, A) floats, or a ValueError that says what is wrong with it."""
    actions_TA = np.asarray(chunk)
    if actions_TA.ndim != 2 or actions_TA.shape[0] < open_loop_steps or actions_TA.shape[1] != action_dim:
        wanted = f"(at least {open_loop_steps}, {action_dim})"
        raise ValueError(f"policy answered shape {actions_TA.shape}; the protocol needs {wanted}")
    if not np.issubdtype(actions_TA.dtype, np.number) or not np.isfinite(actions_TA).all():
        raise ValueError("policy answered values that are not finite numbers")
    return actions_TA.astype(np.float64)
