"""Everything an evaluation needs to know before anything heavy is loaded, with every mistake found here.

`make_plan` reads flags, the checkpoint's small files and LIBERO's task lists; it loads neither weights nor simulator.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.robot.libero.rollouts.plus_plan import check_plus_flags, plus_episodes, plus_identity, unnorm_key_for
from experiments.robot.libero.rollouts.protocol import Episode, Protocol, max_steps_for
from experiments.robot.libero.simulator.rendering import choose_renderer
from experiments.robot.libero.suites import tasks
from experiments.robot.libero.suites.plus import is_plus
from prismatic.checkpoint.folder import Checkpoint, check_policy_flags, open_checkpoint
from prismatic.checkpoint.layout import ACTING_FLAGS
from prismatic.util.errors import UsageError
from prismatic.util.files import read_json
from prismatic.util.flags import check, choose_numbers
from prismatic.util.versions import package_version, package_versions


@dataclass(frozen=True)
class Plan:
    """A checked evaluation: how episodes run, which ones, and the checkpoint (None when the policy is an object)."""

    protocol: Protocol
    episodes: tuple[Episode, ...]
    checkpoint: Checkpoint | None
    unnorm_key: str


def make_plan(config: Any, *, with_checkpoint: bool = True) -> Plan:
    """Check a `GenerateConfig` and lay out its episodes.

    Raises:
        UsageError: anything the user can mend, naming the flag and what is accepted.
    """
    _check_flags(config)
    suite = config.task_suite_name
    protocol = Protocol(
        max_steps=(config.max_steps or max_steps_for(suite)) * config.max_steps_factor,
        settle_steps=config.num_steps_wait,
        open_loop_steps=config.num_open_loop_steps,
        image_size=config.env_img_res,
        render=config.render,
        env_seed=config.env_seed,
    )
    tasks.num_tasks(suite)
    if not with_checkpoint:
        return Plan(protocol, _episodes(config), None, config.unnorm_key)
    checkpoint = open_checkpoint(config.pretrained_checkpoint, config.base_checkpoint or None)
    unnorm_key = unnorm_key_for(checkpoint.statistics, config.unnorm_key, suite)
    _check_policy(config, checkpoint, unnorm_key)
    return Plan(protocol, _episodes(config), checkpoint, unnorm_key)


def _check_flags(config: Any) -> None:
    """Checks that need nothing but the flags."""
    check(config)
    max_steps_for(config.task_suite_name)
    check_plus_flags(config)
    if config.policy and config.pretrained_checkpoint:
        raise UsageError(
            f"--policy: found {config.policy} beside --pretrained_checkpoint {config.pretrained_checkpoint}; "
            "accepted: one of the two"
        )
    if config.use_l1_regression and config.use_diffusion:
        raise UsageError("--use_diffusion: both heads are on; accepted: with --use_l1_regression false")
    if config.load_in_8bit and config.load_in_4bit:
        raise UsageError("--load_in_4bit: both quantizations are on; accepted: one of load_in_8bit, load_in_4bit")
    if config.num_diffusion_steps_inference > config.num_diffusion_steps_train:
        raise UsageError(
            f"--num_diffusion_steps_inference: found {config.num_diffusion_steps_inference}; "
            f"accepted: at most --num_diffusion_steps_train ({config.num_diffusion_steps_train})"
        )
    if config.use_wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError('--use_wandb: needs the package wandb: pip install "rocket-vla[wandb]"')


def _check_policy(config: Any, checkpoint: Checkpoint, unnorm_key: str) -> None:
    """Checks of the flags against what the checkpoint holds."""
    check_policy_flags(config, checkpoint, unnorm_key)
    robot = checkpoint.platform
    if config.num_open_loop_steps > robot.chunk:
        raise UsageError(
            f"--num_open_loop_steps: found {config.num_open_loop_steps}; accepted: 1 to {robot.chunk}, the chunk length"
        )


def _episodes(config: Any) -> tuple[Episode, ...]:
    """The run's episodes, task by task."""
    suite, seed = config.task_suite_name, config.seed
    choose_renderer()
    if is_plus(suite):
        return plus_episodes(config)
    task_ids = choose_numbers("--task_ids", config.task_ids, tasks.num_tasks(suite))
    own_states = None if config.initial_states_path == "DEFAULT" else _read_states(Path(config.initial_states_path))
    episodes: list[Episode] = []
    for task_id in task_ids:
        task = tasks.get_task(suite, task_id)
        numbers = range(config.first_init_state, config.first_init_state + config.num_trials_per_task)
        if own_states is None:
            _check_trials(config, len(tasks.load_init_states(task)), task.name)
            episodes += [Episode(suite, task_id, task.instruction, number, seed) for number in numbers]
            continue
        vectors = _states_of(own_states, task, config.initial_states_path)
        _check_trials(config, len(vectors), task.name)
        chosen = [(number, vectors[number]) for number in numbers if vectors[number] is not None]
        episodes += [Episode(suite, task_id, task.instruction, number, seed, vector) for number, vector in chosen]
    if not episodes:
        raise UsageError(f"--initial_states_path: {config.initial_states_path} marks no initial state as usable")
    return tuple(episodes)


def _check_trials(config: Any, available: int, task: str) -> None:
    if config.first_init_state + config.num_trials_per_task > available:
        first = f" from --first_init_state {config.first_init_state}" if config.first_init_state else ""
        raise UsageError(
            f"--num_trials_per_task: found {config.num_trials_per_task}{first}; "
            f"accepted: at most {available - config.first_init_state}, since {task} has {available} initial states"
        )


def _read_states(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"--initial_states_path: no such file: {path}; accepted: DEFAULT or a JSON file")
    return read_json(path)


def _states_of(content: dict[str, Any], task: tasks.TaskSpec, path: str) -> list[tuple[float, ...] | None]:
    """Start vectors of a task from upstream's JSON layout; None where the demonstration is marked as failed.

    Layout: {instruction_with_underscores: {"demo_0": {"initial_state": [...], "success": true}, ...}}. Where scenes of
    libero_90 share an instruction, regenerate_libero_dataset.py names the second and third by the task's whole name.
    """
    key = task.name if task.name in content else task.instruction.replace(" ", "_")
    if key not in content:
        raise UsageError(
            f"--initial_states_path: {path} has no entry {key!r}; it has: {', '.join(sorted(content))[:300]}"
        )
    demos = content[key]
    try:
        entries = [demos[f"demo_{number}"] for number in range(len(demos))]
        return [
            tuple(float(value) for value in entry["initial_state"]) if entry.get("success", True) else None
            for entry in entries
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"--initial_states_path: {path}, {key}: expected demo_0, demo_1, ... each with initial_state ({error!r})"
        ) from error


def run_identity(config: Any, plan: Plan, numerics: Sequence[str]) -> dict[str, Any]:
    """Everything that influences an episode's outcome: two runs with the same identity may share a results folder.

    Args:
        numerics: device type and data type of the policy.
    """
    states = config.initial_states_path
    if states != "DEFAULT":
        states = hashlib.sha256(Path(states).read_bytes()).hexdigest()[:16]
    return {
        "checkpoint_hash": plan.checkpoint.fingerprint() if plan.checkpoint else None,
        "suite": config.task_suite_name,
        "seed": config.seed,
        "protocol": plan.protocol.as_dict(),
        "standard_protocol": plan.protocol.is_standard
        and (config.max_steps, config.max_steps_factor, config.instruction_source, states) == (0, 1, "bddl", "DEFAULT"),
        "initial_states": states,
        "renderer": os.environ.get("MUJOCO_GL"),
        "mujoco": package_version("mujoco"),
        "robosuite": package_version("robosuite"),
        "libero": _libero_distribution(),
        "unnorm_key": plan.unnorm_key,
        "policy": {flag: getattr(config, flag) for flag in ACTING_FLAGS},
        "numerics": list(numerics),
        **plus_identity(config),
    }


def run_environment(config: Any) -> dict[str, Any]:
    """What is recorded but may differ between the parts of a run: where the checkpoint lay, versions, machine."""
    return {"checkpoint": config.pretrained_checkpoint or config.policy, **package_versions()}


def default_run_name(config: Any, identity: dict[str, Any]) -> str:
    """A name that is the same for the same run, so that repeating the command resumes it."""
    named = Path(config.pretrained_checkpoint).name or str(identity["policy"].get("name", "policy"))
    checkpoint = re.sub(r"[^\w.-]+", "-", named)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    note = f"--{config.run_id_note}" if config.run_id_note else ""
    return f"EVAL-{config.task_suite_name}-{config.model_family}-{checkpoint}-{digest}{note}"


@functools.lru_cache(maxsize=1)
def _libero_distribution() -> str:
    owners = importlib.metadata.packages_distributions().get("libero", [])
    return ", ".join(f"{owner} {package_version(owner)}" for owner in sorted(set(owners)))
