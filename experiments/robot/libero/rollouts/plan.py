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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.robot.libero.rollouts.protocol import (
    TRIALS,
    Episode,
    EvalFlags,
    Protocol,
    max_steps_for,
    protocol_deviations,
)
from experiments.robot.libero.simulator.rendering import choose_renderer
from experiments.robot.libero.suites.task import read_states, states_of
from experiments.robot.libero.suites.tasks import (
    LIBERO_FILES,
    Suite,
    SuiteFlags,
    TaskSpec,
    files_identity,
    find_suite,
    get_task,
    load_init_states,
    refuse_foreign_flags,
    suite_files,
    unnorm_key_for,
)
from prismatic.checkpoint.folder import Checkpoint, check_policy_flags, open_checkpoint
from prismatic.checkpoint.foreign import for_robot
from prismatic.checkpoint.layout import acting_flags
from prismatic.util.errors import UsageError
from prismatic.util.files import fitting_name, longest_name
from prismatic.util.flags import check, choose_numbers
from prismatic.util.versions import package_version, package_versions


@dataclass(frozen=True)
class Plan:
    """A checked evaluation: how episodes run, which ones, and the checkpoint (None when the policy is an object)."""

    protocol: Protocol
    episodes: tuple[Episode, ...]
    checkpoint: Checkpoint | None
    unnorm_key: str


def make_plan(config: EvalFlags, *, with_checkpoint: bool = True) -> Plan:
    """Check the flags and lay out their episodes. Raises UsageError for anything that the user can mend."""
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
    if not with_checkpoint:
        return Plan(protocol, _episodes(config), None, config.unnorm_key)
    checkpoint = open_checkpoint(config.pretrained_checkpoint, config.base_checkpoint or None)
    unnorm_key = unnorm_key_for(checkpoint.statistics, config.unnorm_key, suite)
    checkpoint = for_robot(checkpoint, unnorm_key, config.delta_actions)
    _check_policy(config, checkpoint, unnorm_key)
    return Plan(protocol, _episodes(config), checkpoint, unnorm_key)


def _check_flags(config: EvalFlags) -> None:
    """Checks that need nothing but the flags."""
    check(config)
    _check_suite_flags(config)
    if config.policy and config.pretrained_checkpoint:
        raise UsageError(
            f"--policy: found {config.policy} beside --pretrained_checkpoint {config.pretrained_checkpoint}; "
            "accepted: one of the two"
        )
    if config.policy and config.delta_actions:
        raise UsageError(
            f"--delta_actions: found {config.delta_actions} beside --policy {config.policy}; "
            "accepted: with --pretrained_checkpoint, or as a flag of the server"
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


def _check_policy(config: EvalFlags, checkpoint: Checkpoint, unnorm_key: str) -> None:
    """Checks of the flags against what the checkpoint holds."""
    check_policy_flags(config, checkpoint, unnorm_key)
    robot, taker = checkpoint.platform, find_suite(config.task_suite_name).robot
    widths = {"action": (robot.action_dim, taker.platform.action_dim)}
    if config.use_proprio:
        widths["state"] = (robot.proprio_dim, taker.platform.proprio_dim)
    for kind, (trained, taken) in widths.items():
        if trained != taken:
            raise UsageError(
                f"--pretrained_checkpoint: {checkpoint.path} is a policy of {robot.name}, with {kind}s of {trained} "
                f"numbers; accepted: {taken}, as {taker.name} takes"
            )
    if config.num_open_loop_steps > robot.chunk:
        raise UsageError(
            f"--num_open_loop_steps: found {config.num_open_loop_steps}; accepted: 1 to {robot.chunk}, the chunk length"
        )


def _check_suite_flags(config: EvalFlags) -> None:
    """Refuse flags that the suite does not have, an unknown suite, and one without a known step limit."""
    suite = find_suite(config.task_suite_name)
    if not config.max_steps:
        max_steps_for(suite.name)
    suite.num_tasks()
    refuse_foreign_flags(suite.name, config)
    if config.num_images_in_input > suite.robot.cameras:
        raise UsageError(
            f"--num_images_in_input: found {config.num_images_in_input}; "
            f"accepted: 1 to {suite.robot.cameras}, the cameras of {suite.name}"
        )
    if suite.own_states and config.initial_states_path != "DEFAULT":
        raise UsageError(f"--initial_states_path: {suite.own_states} has initial states of its own; accepted: DEFAULT")


def _episodes(config: EvalFlags) -> tuple[Episode, ...]:
    """The run's episodes, task by task."""
    choose_renderer()
    suite, path = find_suite(config.task_suite_name), config.initial_states_path
    own_states = None if path == "DEFAULT" else read_states(Path(path))
    # The flag's default means the suite's own number.
    trials = suite.trials if config.num_trials_per_task == TRIALS else config.num_trials_per_task
    numbers = range(config.first_init_state, config.first_init_state + trials)
    episodes: list[Episode] = []
    for task_id in suite.choose(config, choose_numbers("--task_ids", config.task_ids, suite.num_tasks())):
        task = suite.task(task_id, config.instruction_source)
        vectors: list[tuple[float, ...] | None] = [None] * numbers.stop
        if own_states is None:
            _check_trials(numbers, task.num_states or len(load_init_states(task)), task)
            chosen = list(numbers)
        else:
            vectors = states_of(own_states, task, path)
            _check_trials(numbers, len(vectors), task)
            chosen = [number for number in numbers if vectors[number] is not None]
        episodes += [_episode(config, task, number, vectors[number]) for number in chosen]
    if not episodes:
        raise UsageError(f"--initial_states_path: {path} marks no initial state as usable")
    return tuple(episodes)


def _episode(config: EvalFlags, task: TaskSpec, number: int, start_vector: tuple[float, ...] | None) -> Episode:
    return Episode(
        suite=task.suite,
        task_id=task.task_id,
        task=task.instruction,
        init_state=number,
        seed=config.seed,
        start_vector=start_vector,
        max_steps=(config.max_steps or max_steps_for(task.suite)) * config.max_steps_factor,
        kind=task.kind,
        level=task.level,
        task_name=task.name if task.kind else None,
        robot_start=config.robot_start,
    )


def _check_trials(numbers: range, available: int, task: TaskSpec) -> None:
    if numbers.stop > available:
        first = f" from --first_init_state {numbers.start}" if numbers.start else ""
        raise UsageError(
            f"--num_trials_per_task: found {len(numbers)}{first}; accepted: at most {available - numbers.start}, since "
            f"{task.name} has {available} initial state{'s' * (available != 1)}"
        )


def run_identity(config: EvalFlags, plan: Plan, numerics: Sequence[str]) -> dict[str, object]:
    """Everything that influences an episode's outcome: two runs with the same identity may share a results folder.

    Args:
        numerics: device type and data type of the policy.
    """
    suite, states = find_suite(config.task_suite_name), config.initial_states_path
    if states != "DEFAULT":
        states = hashlib.sha256(Path(states).read_bytes()).hexdigest()[:16]
    identity = {
        "checkpoint_hash": plan.checkpoint.fingerprint() if plan.checkpoint else None,
        "suite": suite.name,
        "seed": config.seed,
        "protocol": plan.protocol.as_dict(),
        "initial_states": states,
        "task_files": _task_files(suite, plan),
        "renderer": os.environ.get("MUJOCO_GL"),
        "mujoco": package_version("mujoco"),
        "robosuite": package_version("robosuite"),
        "libero": _libero_distribution(),
        "unnorm_key": plan.unnorm_key,
        "policy": acting_flags(config),
        "numerics": list(numerics),
        **_suite_identity(suite, config),
    }
    return {**identity, "standard_protocol": not protocol_deviations(identity)}


def _task_files(suite: Suite[SuiteFlags], plan: Plan) -> dict[str, str]:
    """Hashes of the task files: of the whole suite, since a run may be extended, where the suite's flags do not say."""
    if not suite.own_states:
        return suite_files(suite.name)
    return files_identity(get_task(*task) for task in dict.fromkeys((e.suite, e.task_id) for e in plan.episodes))


def _suite_identity(suite: Suite[SuiteFlags], config: EvalFlags) -> dict[str, object]:
    """Entries that the suite adds: LIBERO's own five, at their defaults, nothing."""
    own = suite.identity(config)
    if not own and suite.base == suite.name and config.instruction_source == "bddl":
        return {}
    subset = {"max_steps_factor": config.max_steps_factor, "task_ids": config.task_ids} if own else {}
    return {"instruction_source": config.instruction_source, **subset, **own}


def run_environment(config: EvalFlags) -> dict[str, object]:
    """Recorded entries that may differ between the parts of a run: where the checkpoint lay, versions, machine."""
    return {"checkpoint": config.pretrained_checkpoint or config.policy, **package_versions()}


def default_run_name(config: EvalFlags, identity: Mapping[str, object], family: str = "openvla") -> str:
    """A name that is the same for the same run, so that repeating the command resumes it; `family` is the policy's."""
    policy = identity["policy"]
    named = Path(config.pretrained_checkpoint).name
    if not named:
        named = str(policy.get("name", "policy")) if isinstance(policy, Mapping) else "policy"
    checkpoint = re.sub(r"[^\w.-]+", "-", named)
    # LIBERO's own files do not show in the name, which earlier versions made without them.
    own_files = identity.get("task_files") == LIBERO_FILES.get(config.task_suite_name)
    named_by = {key: value for key, value in identity.items() if key != "task_files" or not own_files}
    digest = hashlib.sha256(json.dumps(named_by, sort_keys=True).encode()).hexdigest()[:8]
    note = f"--{config.run_id_note}" if config.run_id_note else ""
    start, end = f"EVAL-{config.task_suite_name}-{family}-", f"-{digest}{note}"
    room = longest_name(config.local_log_dir) - len((start + end).encode())
    return start + fitting_name(checkpoint, max(room, 40)) + end


@functools.lru_cache(maxsize=1)
def _libero_distribution() -> str:
    owners = importlib.metadata.packages_distributions().get("libero", [])
    return ", ".join(f"{owner} {package_version(owner)}" for owner in sorted(set(owners)))
