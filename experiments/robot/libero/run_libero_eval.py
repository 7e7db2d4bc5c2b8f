"""Evaluate a checkpoint in LIBERO: success per task and suite with 95% intervals, resumable, many environments at once.

    python experiments/robot/libero/run_libero_eval.py --pretrained_checkpoint CKPT --task_suite_name libero_spatial
    accelerate launch --num_processes 8 experiments/robot/libero/run_libero_eval.py ...     one policy on each GPU

    python experiments/robot/libero/run_libero_eval.py --policy http://HOST:PORT ...        a policy server; also ws://

All of OpenVLA-OFT's flags are accepted. Results go to {local_log_dir}/{run_name}/ (see `results/run_folder.py`); the
same command again continues a run that was stopped and repeats episodes that ended in an error.

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
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from experiments.robot.acting import load_policy
from experiments.robot.external_policy import open_policy
from experiments.robot.libero.results.run_folder import RunFolder
from experiments.robot.libero.results.summary import Report
from experiments.robot.libero.rollouts.episode import EpisodeRunner, MakeEnv, make_simulator
from experiments.robot.libero.rollouts.plan import Plan, default_run_name, make_plan, run_environment, run_identity
from experiments.robot.libero.rollouts.protocol import Episode, EvalFlags, SaveVideos
from experiments.robot.libero.rollouts.result import EpisodeResult, EvalProgress
from experiments.robot.libero.rollouts.rollout import Rollouts, RolloutSettings
from experiments.robot.libero.rollouts.workers import default_num_workers, make_workers, policy_threads
from experiments.robot.libero.suites.tasks import find_suite
from experiments.robot.policy import Policy
from experiments.robot.robot_utils import set_seed_everywhere
from experiments.robot.wrappers import FixedShape, TimeLimited, use_deterministic_kernels
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.files import refuse_long_name

EXIT_MISSING, EXIT_ERRORS = 1, 3


@dataclass
class GenerateConfig(EvalFlags):
    """OpenVLA-OFT's evaluation flags, and ours."""


def eval_libero(config: EvalFlags, policy: Policy | None = None, make_env: MakeEnv = make_simulator) -> Report:
    """Run an evaluation and return its summary (also written to summary.json).

    Args:
        policy: acts instead of `config.pretrained_checkpoint`.
        make_env: (episode, protocol) -> environment, a picklable function, instead of the suite's simulator.

    Raises:
        UsageError: anything wrong that the user can mend; most of it before anything is loaded.
    """
    plan = make_plan(config, with_checkpoint=policy is None and not config.policy)
    if config.policy:
        policy, told = open_policy(config)
        identity = {**run_identity(config, plan, ()), **told}
    else:
        identity = run_identity(config, plan, _numerics(config) if policy is None else (type(policy).__name__,))
    if config.deterministic:
        use_deterministic_kernels()
        identity["fixed_batch"] = max(config.max_batch, 1)
    family = plan.checkpoint.family if plan.checkpoint else config.model_family
    name = config.run_name or default_run_name(config, identity, family)
    folder = Path(config.local_log_dir).expanduser() / name
    refuse_long_name("--run_name" if config.run_name else "--run_id_note", folder)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # Neighbors stay together: they are of one task, and every task costs a process an environment.
    own = plan.episodes[len(plan.episodes) * rank // world : len(plan.episodes) * (rank + 1) // world]
    _refuse_existing(config, folder)
    shard = f".rank{rank}-of-{world}" if world > 1 else ""
    with RunFolder(folder, identity, run_environment(config), overwrite=config.overwrite, shard=shard) as results:
        results.plan(plan.episodes)
        done = {result.key: result for result in results.finished()}
        open_episodes = [episode for episode in own if episode.key not in done or done[episode.key].status == "error"]
        if open_episodes:
            _run_episodes(config, plan, _ready_policy(config, plan, policy), open_episodes, results, make_env)
        summary = results.write_summary()
        run_keys = {result.key for result in results.finished()}
    summary["episodes_missing"] = sum(episode.key not in run_keys for episode in plan.episodes)
    summary["own_episodes_missing"] = sum(episode.key not in run_keys for episode in own)
    summary["folder"] = str(folder)
    return summary


def _refuse_existing(config: EvalFlags, folder: Path) -> None:
    # Another process of this run may have created its file already; it is empty.
    held = any(file.stat().st_size for file in folder.glob("episodes*.jsonl"))
    if not config.resume and not config.overwrite and held:
        raise UsageError(
            f"--resume: {folder} holds results; accepted: --resume true, --overwrite true or another --run_name"
        )


def _loader() -> ModuleType:
    """The loader of checkpoints. It brings torch and transformers, which --help, wrong flags and servers do without."""
    from experiments.robot import openvla_utils

    return openvla_utils


def _numerics(config: EvalFlags) -> tuple[str, str]:
    loader = _loader()
    loader.quantization(config)
    device = loader.resolve_device(config.device)
    return device.type, str(loader.resolve_dtype(config.dtype, device)).removeprefix("torch.")


def _ready_policy(config: EvalFlags, plan: Plan, given: Policy | None) -> Policy:
    """The policy to ask: `given`, else the checkpoint's within --policy_timeout; of one batch shape if asked for."""
    policy = given
    if policy is None:
        assert plan.checkpoint is not None
        set_seed_everywhere(config.seed)
        policy = load_policy(plan.checkpoint, config, plan.unnorm_key)
    if config.deterministic:
        policy = FixedShape(policy, max(config.max_batch, 1))
    return TimeLimited(policy, config.policy_timeout) if config.policy_timeout and given is None else policy


def _run_episodes(
    config: EvalFlags, plan: Plan, policy: Policy, episodes: list[Episode], results: RunFolder, make_env: MakeEnv
) -> None:
    robot = find_suite(config.task_suite_name).robot
    # Policies of others may look through all cameras.
    views = config.num_images_in_input if plan.checkpoint is not None else robot.cameras
    make_runner = functools.partial(EpisodeRunner, plan.protocol, make_env, views=views)
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = min(config.num_workers or default_num_workers(len(episodes), on_this_machine), len(episodes))
    settings = RolloutSettings(
        open_loop_steps=plan.protocol.open_loop_steps,
        max_batch=config.max_batch,
        action_dim=robot.platform.action_dim,
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


def _log_to_wandb(config: EvalFlags, summary: Report) -> None:
    import wandb

    name = Path(summary["folder"]).name
    with wandb.init(
        entity=config.wandb_entity, project=config.wandb_project, name=name, config=vars(config)
    ) as tracker:
        for suite, rates in summary["suites"].items():
            tracker.summary[f"success_rate/{suite}"] = rates["success_rate"]
            for task in rates["tasks"].values():
                tracker.summary[f"success_rate/{suite}/{task['task']}"] = task["success_rate"]


def main(config: GenerateConfig) -> int:
    """Evaluate and print the table; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if int(os.environ.get("RANK", "0")) == 0 and (notice := find_suite(config.task_suite_name).notice(config)):
        print(notice, file=sys.stderr)
    summary = eval_libero(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print((Path(summary["folder"]) / "summary.md").read_text())
        if summary["episodes_missing"]:
            where = "the summary above lacks them; when those have ended, check with"
            command = f"python -m experiments.robot.libero.results merge {summary['folder']}"
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
