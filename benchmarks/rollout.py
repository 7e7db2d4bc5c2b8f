"""Measure LIBERO episodes an hour: the evaluation here against the plain loop, with one policy, in one run.

    python benchmarks/rollout.py [--checkpoint CKPT] [--tasks 2,4] [--out benchmarks/results/rollout.json]
    python benchmarks/rollout.py --earlier CHECKOUT --out earlier.json     against an earlier commit, instead

The plain loop (tests/helpers/plain_rollout.py) is what upstream's script does: LIBERO's own environment, every step
rendered, hard resets, one robot a forward. Every way runs in a process of its own, one after the other, from the same
initial states, with pictures of the protocol (256 pixels) but for the row that says otherwise. About four minutes on
two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory_probe import resident_memory
from benchmarks.workers import commit_of
from experiments.robot.policy import Array, Policy, Query, Render
from prismatic.util.cli import CommandParser, exit_code
from prismatic.util.files import atomic_write

if TYPE_CHECKING:
    from experiments.robot.libero.rollouts.plan import Plan
    from experiments.robot.libero.rollouts.result import EpisodeResult

ROOT = Path(__file__).resolve().parents[1]


class EpisodeRow(TypedDict):
    """An episode: its outcome, and seconds by part."""

    name: str
    success: bool | None
    steps: int
    seconds: dict[str, float]


class Row(TypedDict):
    """One way of running episodes; `outcomes` are success and steps by episode."""

    workers: int
    render: Render
    episodes: int
    seconds_per_episode: float
    creation_seconds_per_environment: float
    whole_run_seconds: float
    cpu_seconds_per_episode: float
    seconds_to_first_step: float
    milliseconds_per_step_of_physics: float
    seconds_per_episode_by_part: dict[str, float]
    resident_megabytes: dict[str, float]
    outcomes: dict[str, list[bool | int | None]]


class Comparison(TypedDict):
    """Ratios by way, and on how many episodes two ways end alike."""

    speedup: dict[str, float]
    speedup_of_whole_runs: dict[str, float]
    speedup_in_cpu_time: dict[str, float]
    same_outcome_as_plain_loop: dict[str, str]
    same_outcome_2_workers_as_1: str
    speedup_of_physics_and_resets_alone: float
    speedup_of_physics_alone: float


# name: (workers, how pictures are drawn); 0 workers: the plain loop
WAYS: dict[str, tuple[int, Render]] = {
    "plain loop": (0, "protocol"),
    "1 worker": (1, "protocol"),
    "2 workers": (2, "protocol"),
    "2 workers, render=fast (not the protocol's pictures)": (2, "fast"),
}


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(ROOT / "experiments/mini/weights/student"))
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--tasks", default="2,4", help="the default policy's training tasks are 1,2,4,5,6,8")
    parser.add_argument("--episodes", type=int, default=10, help="per task")
    parser.add_argument("--plain_episodes", type=int, default=2, help="per task, of the plain loop")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/rollout.json")
    parser.add_argument(
        "--earlier", type=Path, help="checkout of an earlier commit: compare one and two workers with it"
    )
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if Path(arguments.checkpoint).exists():
        arguments.checkpoint = str(Path(arguments.checkpoint).resolve())  # The processes run in a checkout's folder.
    if arguments.way:
        print(json.dumps(measure(arguments)))
        return 0
    if arguments.earlier is not None:
        return compare_with_earlier(arguments)
    rows = {way: run_way(arguments, way, ROOT) for way in WAYS}
    comparison = compare(rows)
    report = {**describe_machine(arguments), "ways": rows, **comparison}
    atomic_write(arguments.out, json.dumps(report, indent=2) + "\n")
    print(table(rows, comparison))
    return 0


def run_way(arguments: argparse.Namespace, way: str, build: Path) -> Row:
    """Measure one way in a process of its own, with the code of a checkout."""
    command = [sys.executable, str(build / "benchmarks/rollout.py"), "--way", way, "--started", str(time.time())]
    for flag in ("checkpoint", "suite", "tasks", "episodes", "plain_episodes"):
        command += [f"--{flag}", str(getattr(arguments, flag))]
    environment = {**os.environ, "PYTHONPATH": str(build)}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=build)
    row: Row = json.loads(run.stdout.strip().splitlines()[-1])
    print(f"{way}: {row['seconds_per_episode']:.2f} s an episode ({build.name})", file=sys.stderr, flush=True)
    return row


def compare_with_earlier(arguments: argparse.Namespace) -> int:
    """Measure one and two workers of an earlier build and of this one, in turns; ratios are the earlier over this."""
    commit = commit_of(str(arguments.earlier))
    ways: dict[str, dict[str, object]] = {}
    for way in ("1 worker", "2 workers"):
        earlier, now = (run_way(arguments, way, build) for build in (arguments.earlier.resolve(), ROOT))
        same = sum(earlier["outcomes"][name] == outcome for name, outcome in now["outcomes"].items())
        ratios = {
            "seconds_per_episode_ratio": round(earlier["seconds_per_episode"] / now["seconds_per_episode"], 3),
            "cpu_seconds_per_episode_ratio": round(
                earlier["cpu_seconds_per_episode"] / now["cpu_seconds_per_episode"], 3
            ),
        }
        ways[way] = {
            **ratios,
            "same_outcome": f"{same}/{len(now['outcomes'])}",
            "this build": now,
            "earlier build": earlier,
        }
        print(way, ratios, ways[way]["same_outcome"], "with the same outcome", flush=True)
    report = {**describe_machine(arguments), "earlier": commit, "ways": ways}
    atomic_write(arguments.out, json.dumps(report, indent=2) + "\n")
    return 0


def measure(arguments: argparse.Namespace) -> Row:
    """Run one way in this process; what it took."""
    from experiments.robot.libero.rollouts.plan import make_plan
    from experiments.robot.libero.run_libero_eval import GenerateConfig
    from experiments.robot.openvla_utils import OpenVLAPolicy

    workers, render = WAYS[arguments.way]
    config = GenerateConfig(
        pretrained_checkpoint=arguments.checkpoint,
        task_suite_name=arguments.suite,
        task_ids=arguments.tasks,
        num_trials_per_task=arguments.episodes if workers else arguments.plain_episodes,
        render=render,
        device="cpu",
    )
    plan = make_plan(config)
    assert plan.checkpoint is not None
    policy = FirstAnswer(OpenVLAPolicy.from_checkpoint(plan.checkpoint, config, plan.unnorm_key))
    cpu, started = _cpu_seconds(), time.perf_counter()
    episodes, memory = run_ours(plan, policy, workers) if workers else run_plain(plan, policy)
    wall, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
    parts = {name for episode in episodes for name in episode["seconds"]}
    busy = sum(sum(episode["seconds"].values()) for episode in episodes)
    creation = sum(episode["seconds"].get("creation", 0.0) for episode in episodes)
    steps = sum(episode["steps"] for episode in episodes)
    return {
        "workers": workers,
        "render": render,
        "episodes": len(episodes),
        "seconds_per_episode": (busy - creation) / len(episodes) / max(workers, 1),
        "creation_seconds_per_environment": creation / sum("creation" in episode["seconds"] for episode in episodes),
        "whole_run_seconds": wall,
        "cpu_seconds_per_episode": cpu / len(episodes),
        "seconds_to_first_step": policy.answered - arguments.started,
        "milliseconds_per_step_of_physics": 1e3 * sum(e["seconds"].get("physics", 0.0) for e in episodes) / steps,
        "seconds_per_episode_by_part": {
            name: sum(episode["seconds"].get(name, 0.0) for episode in episodes) / len(episodes)
            for name in sorted(parts - {"creation"})
        },
        "resident_megabytes": memory,
        "outcomes": {episode["name"]: [episode["success"], episode["steps"]] for episode in episodes},
    }


class FirstAnswer:
    """`policy`, which notes when it first answered."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self.answered = policy, 0.0

    def act(self, queries: Sequence[Query]) -> Array | Sequence[Array | Exception]:
        answers = self._policy.act(queries)
        self.answered = self.answered or time.time()
        return answers


def run_plain(plan: Plan, policy: Policy) -> tuple[list[EpisodeRow], dict[str, float]]:
    from tests.helpers.plain_rollout import plain_rollouts

    rollouts = plain_rollouts(policy, plan.episodes, plan.protocol)
    episodes: list[EpisodeRow] = [
        {
            "name": f"task {key[1]} state {key[2]}",
            "success": rollout.success,
            "steps": rollout.steps,
            "seconds": rollout.seconds,
        }
        for key, rollout in rollouts.items()
    ]
    # Only the first episode of a task made an environment.
    for episode in episodes:
        if episode["seconds"]["creation"] < 0.1:
            del episode["seconds"]["creation"]
    return episodes, {"process": _resident(os.getpid())}


def run_ours(plan: Plan, policy: Policy, workers: int) -> tuple[list[EpisodeRow], dict[str, float]]:
    from experiments.robot.libero.rollouts.episode import EpisodeRunner
    from experiments.robot.libero.rollouts.rollout import Rollouts, RolloutSettings
    from experiments.robot.libero.rollouts.workers import make_workers, policy_threads

    memory: dict[str, float] = {}
    episodes: list[EpisodeRow] = []

    def on_result(result: EpisodeResult) -> None:
        name = f"task {result.task_id} state {result.init_state}"
        seconds = dict(result.seconds)
        episodes.append({"name": name, "success": result.success, "steps": result.steps, "seconds": seconds})
        memory["process"] = max(memory.get("process", 0.0), _resident(os.getpid()))
        for child in multiprocessing.active_children():
            memory["worker"] = max(memory.get("worker", 0.0), _resident(child.pid or 0))

    make_runner = functools.partial(EpisodeRunner, plan.protocol)
    settings = RolloutSettings(plan.protocol.open_loop_steps)
    with policy_threads(workers):
        Rollouts(policy, make_workers(workers, make_runner), on_result, settings).run(plan.episodes)
    return episodes, memory


def _resident(pid: int) -> float:
    """Resident memory of a process in MB."""
    return sum(resident_memory(pid).values()) / 1e6


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def describe_machine(arguments: argparse.Namespace) -> dict[str, object]:
    """Collect what was measured, and where."""
    import mujoco
    import torch

    return {
        "checkpoint": Path(arguments.checkpoint).name,
        "suite": arguments.suite,
        "tasks": arguments.tasks,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "load_before": os.getloadavg()[0],
        "mujoco": mujoco.__version__,
        "torch": torch.__version__,
    }


def compare(rows: dict[str, Row]) -> Comparison:
    """Speeds against the plain loop, and on how many of its episodes the outcome (success and steps) is the same."""
    plain, one_worker = rows["plain loop"], rows["1 worker"]
    parts = one_worker["seconds_per_episode_by_part"]

    def same(left: Row, right: Row) -> str:
        shared = left["outcomes"].keys() & right["outcomes"].keys()
        return f"{sum(left['outcomes'][key] == right['outcomes'][key] for key in shared)}/{len(shared)}"

    return {
        "speedup": {way: plain["seconds_per_episode"] / row["seconds_per_episode"] for way, row in rows.items()},
        "speedup_of_whole_runs": {  # creating environments included, for so few episodes of each
            way: (plain["whole_run_seconds"] / plain["episodes"]) / (row["whole_run_seconds"] / row["episodes"])
            for way, row in rows.items()
        },
        "speedup_in_cpu_time": {
            way: plain["cpu_seconds_per_episode"] / row["cpu_seconds_per_episode"] for way, row in rows.items()
        },
        "same_outcome_as_plain_loop": {way: same(plain, row) for way, row in rows.items()},
        "same_outcome_2_workers_as_1": same(one_worker, rows["2 workers"]),
        "speedup_of_physics_and_resets_alone": plain["seconds_per_episode"] / (parts["physics"] + parts["reset"]),
        "speedup_of_physics_alone": plain["seconds_per_episode"] / parts["physics"],
    }


def table(rows: dict[str, Row], comparison: Comparison) -> str:
    """The rows as Markdown."""
    lines = [
        "| | s/episode | episodes/h | speed | CPU s/episode | first step | memory | same outcome |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for way, row in rows.items():
        memory = ", ".join(f"{name} {megabytes / 1000:.1f} GB" for name, megabytes in row["resident_megabytes"].items())
        lines.append(
            f"| {way} | {row['seconds_per_episode']:.2f} | {3600 / row['seconds_per_episode']:.0f} "
            f"| {comparison['speedup'][way]:.1f}x | {row['cpu_seconds_per_episode']:.1f} "
            f"| {row['seconds_to_first_step']:.0f} s | {memory} | {comparison['same_outcome_as_plain_loop'][way]} |"
        )
    lines += ["", "Seconds an episode of one worker, by part:", ""]
    for way, row in rows.items():
        parts = ", ".join(f"{name} {spent:.2f}" for name, spent in row["seconds_per_episode_by_part"].items())
        lines.append(f"- {way}: {parts}; creating an environment {row['creation_seconds_per_environment']:.1f}")
    physics = comparison["speedup_of_physics_alone"]
    lines += ["", f"Physics alone, with everything else free, would be {physics:.1f}x the plain loop with one worker."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
