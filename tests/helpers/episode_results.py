"""Small evaluations, results of episodes, and run folders that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.robot.libero.results import EpisodeResult, RunFolder
from experiments.robot.libero.run_libero_eval import GenerateConfig

STATUSES = {"s": "success", "f": "failure", "e": "error"}


def small_run(folder: Path, **changes: Any) -> GenerateConfig:
    """Two short episodes of one task in this process, as the run `folder`/run."""
    settings = {"task_suite_name": "libero_object", "task_ids": "2", "num_trials_per_task": 2, "max_steps": 12}
    settings |= {"env_img_res": 64, "num_workers": 1, "local_log_dir": str(folder), "run_name": "run"}
    return GenerateConfig(**{**settings, **changes})


def episode_result(task_id: int, init_state: int, status: str = "success", **changes: Any) -> EpisodeResult:
    """An episode of libero_goal; the reason of an error is "boom"."""
    success = {"success": True, "failure": False}.get(status)
    given = {"suite": "libero_goal", "task": f"task {task_id}", "seed": 7, "steps": 100, "wall_time": 1.5}
    given |= {"success": success, "error": None if success is not None else "boom", **changes}
    return EpisodeResult(task_id=task_id, init_state=init_state, status=status, **given)


def episode_results(outcomes: str, task_id: int = 0, **changes: Any) -> list[EpisodeResult]:
    """One episode a letter: s success, f failure, e error; of 10, 20, 30 ... steps."""
    return [
        episode_result(task_id, number, STATUSES[letter], **{"steps": 10 * (number + 1), **changes})
        for number, letter in enumerate(outcomes)
    ]


def write_episodes(
    folder: Path, results: Iterable[EpisodeResult], identity: Mapping[str, Any], environment: Mapping[str, Any] = {}
) -> Path:
    """A run folder without plan and summary."""
    with RunFolder(folder, identity, environment) as run:
        for result in results:
            run.append(result)
    return folder
