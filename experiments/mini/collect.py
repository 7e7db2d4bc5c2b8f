"""Collect demonstrations of the scripted expert in LIBERO, or of gym-aloha's two arms, as an RLDS dataset.

    python -m experiments.mini.collect --suite libero_object --tasks 1,2 --episodes 30 --out data
    python -m experiments.mini.collect --suite gym_aloha --tasks 0 --episodes 150 --out data

Object placements come from each task's own sampler, seeded by (seed, suite, task, episode): no official initial state
is used, so all of them stay unseen for evaluation. The bytes do not depend on the number of workers. An interrupted run
continues where it stopped: finished episodes wait in `<out>/<name>/.staging-*` until the dataset is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.mini import SCENES
from experiments.robot.aloha import GYM_ALOHA
from experiments.robot.policy import Render
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, refuse_long_name, refuse_no_folder
from prismatic.util.flags import check, choose_numbers, limited, numbers

# Part of what identifies a collection: raise it when the expert, the noise or the rendering changes.
RECIPE_VERSION = 2
_POLL_SECONDS = 0.5


@dataclass
class CollectConfig:
    """Flags of the collection."""

    suite: str = "libero_object"  # task suite, or gym_aloha
    tasks: str = numbers("all", least=0)  # task numbers, such as 1,2,5-7, or all
    episodes: int = limited(30, least=1)  # successful episodes a task
    seed: int = limited(0, least=0)  # of placements and noise
    image_size: int = limited(128, least=16, most=4096)  # pixels; the published datasets have 256
    render: Render = "fast"  # fast or protocol
    scene: str = limited("task", choices=SCENES)  # task, or moved: one object anywhere, the third-person camera moved
    noise: bool = True  # perturb the executed action and the start; labels stay clean
    workers: int = limited(2, least=1)  # processes
    max_attempts: int = limited(4, least=1)  # placements tried for one episode before it is given up
    out: Path = Path("data")  # folder of datasets
    name: str = ""  # dataset name; default <suite>_no_noops, or gym_aloha

    def __post_init__(self) -> None:
        check(self)
        self.out = Path(self.out).expanduser()
        self.name = self.name or (self.suite if self.suite == GYM_ALOHA else f"{self.suite}_no_noops")
        if self.suite == GYM_ALOHA and self.scene != "task":
            raise UsageError(f"--scene: {self.scene} found; accepted for {GYM_ALOHA}: task")

    def identity(self) -> dict[str, object]:
        """Settings that the bytes of an episode depend on, beside its task and number."""
        fields = ("suite", "seed", "image_size", "render", "noise", "max_attempts")
        scene = {"scene": self.scene} if self.scene != "task" else {}  # Data from before there were others have none.
        return {"recipe_version": RECIPE_VERSION, **{name: getattr(self, name) for name in fields}, **scene}

    @property
    def folder(self) -> Path:
        """The dataset's folder, without the version."""
        return self.out / self.name

    @property
    def staging(self) -> Path:
        """Folder of finished episodes that are in no dataset yet."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        return self.folder / f".staging-{digest[:12]}"

    def staged(self, task: int, episode: int) -> Path:
        """File of one finished episode; a `.json` beside it tells how it went, also if it was given up."""
        return self.staging / f"task{task:02d}-episode{episode:05d}.example"


def _expert(config: CollectConfig, task: int) -> tuple[Any, Callable[..., Any], Callable[..., bytes]]:
    """The task's scene, the expert that demonstrates in it, and how its episodes are stored."""
    looks: dict[str, Any] = {"image_size": config.image_size, "render": config.render}
    if config.suite == GYM_ALOHA:
        from experiments.mini import transfer

        return transfer.AlohaEnv(task, **looks), transfer.demonstrate, transfer.serialize_episode
    from experiments.mini.expert import demonstrate
    from experiments.mini.moved_scene import make_scene
    from prismatic.vla.datasets.rlds_writer import serialize_episode

    return make_scene(config.scene, config.suite, task, **looks), demonstrate, serialize_episode


def _collect_block(config: CollectConfig, task: int, episodes: range) -> None:
    """Work of one process: the given episodes of one task, each stored when it is finished."""
    from experiments.mini.expert import derive_seed

    todo = [number for number in episodes if not config.staged(task, number).with_suffix(".json").exists()]
    if not todo:
        return
    parent = multiprocessing.parent_process()
    scene, demonstrate, serialize_episode = _expert(config, task)
    with scene as env:
        for number in todo:
            if parent is not None and not parent.is_alive():
                os._exit(1)  # Nobody else would end this process: a pool's worker waits for work for ever.
            start, failures = time.perf_counter(), []
            report: dict[str, object] = {"task": task, "episode": number, "steps": 0}
            for attempt in range(config.max_attempts):
                seed = derive_seed(config.seed, config.suite, task, number, attempt)
                source = f"{config.suite}/task{task}/episode{number}/seed{seed}"
                result = demonstrate(env, seed, source, config.noise)
                if result.episode is not None:
                    atomic_write(config.staged(task, number), serialize_episode(result.episode))
                    report["steps"] = result.steps
                    break
                failures.append(result.ended_in)
            report |= {"failures": failures, "seconds": round(time.perf_counter() - start, 2)}
            atomic_write(config.staged(task, number).with_suffix(".json"), json.dumps(report))


def _blocks(tasks: tuple[int, ...], episodes: int, workers: int) -> list[tuple[int, range]]:
    """Pieces of work: whole tasks where they divide evenly among the workers (making a simulator takes seconds)."""
    parts = 1 if len(tasks) % workers == 0 else min(workers, episodes)
    size = math.ceil(episodes / parts)
    return [(task, range(first, min(first + size, episodes))) for task in tasks for first in range(0, episodes, size)]


def _check_tasks(config: CollectConfig) -> tuple[int, ...]:
    """Refuse what cannot be collected before anything is started."""
    from experiments.mini.expert import read_goal
    from experiments.robot.libero.simulator.rendering import choose_renderer
    from experiments.robot.libero.suites.tasks import get_task, num_tasks

    choose_renderer()
    tasks = choose_numbers("--tasks", config.tasks, num_tasks(config.suite))
    for task in tasks if config.suite != GYM_ALOHA else ():
        read_goal(get_task(config.suite, task))
    return tasks


def _run_blocks(config: CollectConfig, blocks: list[tuple[int, range]], total: int) -> None:
    """Run all blocks, showing progress by counting what lies in the staging folder."""
    from prismatic.util.progress import progress_bar

    # Workers read these when they start; every core is used by another worker already.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(config.workers, len(blocks)), mp_context=context)
    pending: set[Future[None]] = {pool.submit(_collect_block, config, task, numbers) for task, numbers in blocks}
    try:
        with progress_bar(hidden=not sys.stdout.isatty()) as progress:
            bar, shown = progress.add_task("collect", total=total, info=""), 0
            while pending:
                done, pending = wait(pending, timeout=_POLL_SECONDS)
                for future in done:
                    future.result()
                finished = min(total, len(list(config.staging.glob("*.json"))))
                progress.update(bar, completed=finished)
                if progress.disable and finished > shown:
                    print(f"{finished}/{total} episodes", flush=True)
                    shown = finished
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a collection process died (out of memory? try --workers 1); run again to continue"
        ) from error
    finally:
        pool.shutdown(wait=not pending, cancel_futures=True)


def _summarize(config: CollectConfig, tasks: tuple[int, ...]) -> dict[str, Any]:
    """Per task: episodes kept, attempts, failures, mean length and time."""
    per_task = {}
    for task in tasks:
        files = [config.staged(task, number).with_suffix(".json") for number in range(config.episodes)]
        reports = [json.loads(file.read_text()) for file in files]
        kept = [report for report in reports if report["steps"]]
        failures = [phase for report in reports for phase in report["failures"]]
        per_task[str(task)] = {
            "episodes": len(kept),
            "attempts": len(kept) + len(failures),
            "failures": failures,
            "mean_steps": round(sum(report["steps"] for report in kept) / max(1, len(kept)), 1),
            "mean_seconds": round(sum(report["seconds"] for report in reports) / max(1, len(reports)), 2),
        }
    return {"identity": config.identity(), "episodes_asked": config.episodes, "tasks": per_task}


def _existing(config: CollectConfig) -> dict[str, Any] | None:
    """Summary of the dataset that is there; raises UsageError when it came from another recipe."""
    summary = config.folder / "1.0.0" / "collection.json"
    if not (config.folder / "1.0.0" / "dataset_info.json").exists():
        return None
    recorded: dict[str, Any] = json.loads(summary.read_text()) if summary.exists() else {}
    if recorded.get("identity") != config.identity():
        raise UsageError(f"--name: {config.folder} holds another dataset; choose another --name or --out, or remove it")
    return recorded


def collect(config: CollectConfig) -> Path:
    """Collect what is missing, write the dataset, return its folder. Raises UsageError when that cannot be."""
    from prismatic.vla.datasets.rlds_writer import RLDSWriter, aloha_schema

    refuse_no_folder("--out", config.out)
    refuse_long_name("--name", config.folder)
    existing = _existing(config)
    tasks = _check_tasks(config)
    schema = aloha_schema(config.image_size, config.image_size) if config.suite == GYM_ALOHA else None
    writer = RLDSWriter(config.out, config.name, image_size=config.image_size, schema=schema)
    if (
        existing
        and list(existing["tasks"]) == [str(task) for task in tasks]
        and existing["episodes_asked"] == config.episodes
    ):
        print(f"{writer.folder} is complete already")
        return writer.folder
    config.staging.mkdir(parents=True, exist_ok=True)
    _run_blocks(config, _blocks(tasks, config.episodes, config.workers), len(tasks) * config.episodes)
    summary = _summarize(config, tasks)
    never = [task for task, row in summary["tasks"].items() if not row["episodes"]]
    if never:
        raise UsageError(f"--tasks: the expert never solved task {', '.join(never)} of {config.suite}; leave it out")
    paths = [config.staged(task, number) for task in tasks for number in range(config.episodes)]
    folder = writer.write_payloads([path for path in paths if path.exists()])
    atomic_write(folder / "collection.json", json.dumps(summary, indent=2))
    for report in config.staging.glob("*.json"):  # First, lest a stop leaves reports of episodes that are gone.
        report.unlink()
    shutil.rmtree(config.staging)
    for task, row in summary["tasks"].items():
        counts = f"{row['episodes']} episodes in {row['attempts']} attempts"
        print(f"task {task}: {counts}, {row['mean_steps']} steps on average")
    print(f"wrote {folder}")
    return folder


def main(config: CollectConfig) -> None:
    collect(config)


if __name__ == "__main__":
    run(CollectConfig, main)
