"""Evaluate a checkpoint in LIBERO: success per task and suite with 95% intervals, resumable, many environments at once.

    python experiments/robot/libero/run_libero_eval.py --pretrained_checkpoint CKPT --task_suite_name libero_spatial
    accelerate launch --num_processes 8 experiments/robot/libero/run_libero_eval.py ...     one policy on each GPU

    python experiments/robot/libero/run_libero_eval.py --policy http://HOST:PORT ...        a policy server; also ws://

All of OpenVLA-OFT's flags are accepted. Results go to {local_log_dir}/{run_name}/ (see `results.py`); the same command
again continues a run that was stopped and repeats episodes that ended in an error.

Exit codes: 0 all episodes ran; 1 some did not run; 2 wrong flags or files; 3 some ended in an error; 130 interrupted.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from experiments.robot.policy import Gripper, PolicyFlags, Render
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.flags import limited, numbers

if TYPE_CHECKING:
    from experiments.robot.libero.results.run_folder import EpisodeResult, RunFolder
    from experiments.robot.libero.rollouts.plan import Plan
    from experiments.robot.libero.rollouts.protocol import Episode
    from experiments.robot.policy import Policy

EXIT_MISSING, EXIT_ERRORS = 1, 3
# Aliases, since draccus finds no help beside a field whose annotation has quotes.
Views = Literal[1, 2]
RobotStart = Literal["perturbed", "package"]
Instructions = Literal["bddl", "base", "name"]
SaveVideos = Literal["none", "failures", "all"]


@dataclass
class GenerateConfig(PolicyFlags):
    """OpenVLA-OFT's evaluation flags, and ours."""

    # What is evaluated
    num_images_in_input: Views = 2  # Camera views: the third-person one, then the wrist camera
    unnorm_key: str = ""  # Dataset whose statistics un-normalize actions; default: the suite, then suite_no_noops
    policy: str = ""  # Instead of a checkpoint: http://HOST:PORT or ws://HOST:PORT of a server, or MODULE:FACTORY
    # Gripper of a server's actions; policy: 1 = open; libero: -1 = open; auto: as it says
    policy_gripper: Gripper = "auto"
    # Seconds an answer may take, then the episode is an error; 0: 60 of servers, else any
    policy_timeout: float = limited(0.0, least=0)

    # The protocol
    task_suite_name: str = "libero_spatial"  # libero_spatial, _object, _goal, _10, _90, or another installed suite
    # In LIBERO-Plus (libero_plus, libero_plus_object, ...) 50 means 1, its protocol
    num_trials_per_task: int = limited(50, least=1)
    num_open_loop_steps: int = limited(8, least=1)  # Actions of a chunk to execute before the policy is asked again
    num_steps_wait: int = limited(10, least=0)  # Steps for objects to settle before an episode
    env_img_res: int = limited(256, least=16, most=4096)  # Side of the rendered images in pixels
    initial_states_path: str = "DEFAULT"  # DEFAULT, or a JSON file of initial states
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
    perturbations: str = "all"  # LIBERO-Plus: kinds, as in camera,robot; available: what installed assets allow
    # LIBERO-Plus: only perturbations of these tasks of LIBERO's suite, as in 0,3,7
    base_task_ids: str = numbers("", least=0)
    # LIBERO-Plus: so many tasks, balanced over kinds, then over base tasks; 0: all
    task_subset: int = limited(0, least=0)
    subset_seed: int = limited(0, least=0)  # LIBERO-Plus: which ones
    # LIBERO-Plus: perturbed: the arm rests in the new pose; package: still moves there
    robot_start: RobotStart = "perturbed"
    # LIBERO-Plus: bddl; base: LIBERO's wording; name: as its package has it, with a leak
    instruction_source: Instructions = "bddl"
    max_batch: int = limited(0, least=0)  # Most queries the policy answers at once; 0: no limit
    deterministic: bool = False  # Same bits for any number of workers: every forward asks max_batch queries (0: 1)
    save_videos: SaveVideos = "none"  # none, failures or all
    run_name: str = ""  # Folder within local_log_dir; default: from suite, checkpoint and settings
    overwrite: bool = False  # Discard results in that folder
    resume: bool = True  # Continue from results in that folder


def eval_libero(config: GenerateConfig, policy: Policy | None = None, make_env: Any = None) -> dict[str, Any]:
    """Run an evaluation and return its summary (also written to summary.json).

    Args:
        policy: acts instead of `config.pretrained_checkpoint`.
        make_env: (episode, protocol) -> environment, a picklable function, instead of LIBERO's simulator.

    Raises:
        UsageError: anything wrong that the user can mend; most of it before anything is loaded.
    """
    from experiments.robot.libero.rollouts.plan import default_run_name, make_plan, run_environment, run_identity
    from experiments.robot.wrappers import use_deterministic_kernels

    plan = make_plan(config, with_checkpoint=policy is None and not config.policy)
    if config.policy:
        from experiments.robot.external_policy import open_policy

        external = open_policy(config)
        policy, identity = external.policy, {**run_identity(config, plan, ()), **external.identity}
    else:
        identity = run_identity(config, plan, _numerics(config) if policy is None else (type(policy).__name__,))
    if config.deterministic:
        use_deterministic_kernels()
        identity["fixed_batch"] = max(config.max_batch, 1)
    folder = Path(config.local_log_dir).expanduser() / (config.run_name or default_run_name(config, identity))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # Neighbors stay together: they are of one task, and every task costs a process an environment.
    mine = plan.episodes[len(plan.episodes) * rank // world : len(plan.episodes) * (rank + 1) // world]
    from experiments.robot.libero.results.run_folder import RunFolder

    _refuse_existing(config, folder)
    shard = f".rank{rank}-of-{world}" if world > 1 else ""
    with RunFolder(folder, identity, run_environment(config), overwrite=config.overwrite, shard=shard) as results:
        results.plan(plan.episodes)
        done = {result.key: result for result in results.finished()}
        open_episodes = [episode for episode in mine if episode.key not in done or done[episode.key].status == "error"]
        if open_episodes:
            _run_episodes(config, plan, _ready_policy(config, plan, policy), open_episodes, results, make_env)
        summary = results.write_summary()
        there = {result.key for result in results.finished()}
    summary["episodes_missing"] = sum(episode.key not in there for episode in plan.episodes)
    summary["own_episodes_missing"] = sum(episode.key not in there for episode in mine)
    summary["folder"] = str(folder)
    return summary


def _refuse_existing(config: GenerateConfig, folder: Path) -> None:
    # Another process of this run may have created its file already; it is empty.
    held = any(file.stat().st_size for file in folder.glob("episodes*.jsonl"))
    if not config.resume and not config.overwrite and held:
        raise UsageError(
            f"--resume: {folder} holds results; accepted: --resume true, --overwrite true or another --run_name"
        )


def _numerics(config: GenerateConfig) -> tuple[str, str]:
    from experiments.robot.openvla_utils import quantization, resolve_device, resolve_dtype

    quantization(config)
    device = resolve_device(config.device)
    return device.type, str(resolve_dtype(config.dtype, device)).removeprefix("torch.")


def _ready_policy(config: GenerateConfig, plan: Plan, given: Policy | None) -> Policy:
    """The policy to ask: `given`, else the checkpoint's within --policy_timeout; of one batch shape if asked for."""
    from experiments.robot.wrappers import FixedShape, TimeLimited

    policy = given or _load_policy(config, plan)
    if config.deterministic:
        policy = FixedShape(policy, max(config.max_batch, 1))
    return TimeLimited(policy, config.policy_timeout) if config.policy_timeout and given is None else policy


def _load_policy(config: GenerateConfig, plan: Plan) -> Policy:
    from experiments.robot.openvla_utils import OpenVLAPolicy
    from experiments.robot.robot_utils import set_seed_everywhere

    assert plan.checkpoint is not None
    set_seed_everywhere(config.seed)
    return OpenVLAPolicy.from_checkpoint(plan.checkpoint, config, plan.unnorm_key)


def _run_episodes(
    config: GenerateConfig, plan: Plan, policy: Policy, episodes: list[Episode], results: RunFolder, make_env: Any
) -> None:
    from experiments.robot.libero.rollouts.episode import EpisodeRunner, make_libero_env
    from experiments.robot.libero.rollouts.progress import EvalProgress
    from experiments.robot.libero.rollouts.rollout import Rollouts, RolloutSettings
    from experiments.robot.libero.rollouts.workers import default_num_workers, make_workers, policy_threads

    views = config.num_images_in_input if plan.checkpoint is not None else 2  # Policies of others may look at both.
    make_runner = functools.partial(EpisodeRunner, plan.protocol, make_env or make_libero_env, views=views)
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = min(config.num_workers or default_num_workers(len(episodes), on_this_machine), len(episodes))
    settings = RolloutSettings(
        open_loop_steps=plan.protocol.open_loop_steps,
        max_batch=config.max_batch,
        video_path=_video_path(config.save_videos, results.folder / "videos"),
    )
    with policy_threads(count, on_this_machine), EvalProgress(len(episodes), results.finished()) as progress:

        def on_result(result: EpisodeResult) -> None:
            results.append(result)
            progress.update(result)

        Rollouts(policy, make_workers(count, make_runner), on_result, settings).run(episodes)


def _video_path(save_videos: SaveVideos, folder: Path) -> Callable[[EpisodeResult], Path | None]:
    def path(result: EpisodeResult) -> Path | None:
        if save_videos == "none" or (save_videos == "failures" and result.status != "failure"):
            return None
        return folder / f"{result.suite}--task{result.task_id:02d}--init{result.init_state:02d}--{result.status}.mp4"

    return path


def _log_to_wandb(config: GenerateConfig, summary: dict[str, Any]) -> None:
    import wandb

    name = Path(summary["folder"]).name
    with wandb.init(
        entity=config.wandb_entity, project=config.wandb_project, name=name, config=vars(config)
    ) as tracker:
        for suite, of_suite in summary["suites"].items():
            tracker.summary[f"success_rate/{suite}"] = of_suite["success_rate"]
            for of_task in of_suite["tasks"].values():
                tracker.summary[f"success_rate/{suite}/{of_task['task']}"] = of_task["success_rate"]


def main(config: GenerateConfig) -> int:
    """Evaluate and print the table; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if int(os.environ.get("RANK", "0")) == 0:
        from experiments.robot.libero.rollouts.plus_plan import left_out_notice

        print(left_out_notice(config), end="", file=sys.stderr)
    summary = eval_libero(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print((Path(summary["folder"]) / "summary.md").read_text())
        if summary["episodes_missing"]:
            where = "the summary above lacks them; when those have ended, check with"
            command = f"python -m experiments.robot.libero.results.merge {summary['folder']}"
            print(f"{summary['episodes_missing']} episodes are left to other processes: {where} {command}")
        print(f"results: {summary['folder']}")
        if config.use_wandb:
            _log_to_wandb(config, summary)
    if summary["own_episodes_missing"]:
        print(f"error: {summary['own_episodes_missing']} episodes have not run", file=sys.stderr)
        return EXIT_MISSING
    return EXIT_ERRORS if summary["total"]["errors"] else 0


if __name__ == "__main__":
    run(GenerateConfig, main)
