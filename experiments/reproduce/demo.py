"""The main job on a laptop: collect demonstrations, fine-tune with and without ROCKET, roll out, report.

    make demo            (or: python -m experiments.reproduce.demo)

Every stage is a command of this repository that a researcher would run with other paths; each is printed in its log and
skipped when its result is already there, so an interrupted demo goes on where it stopped. Demonstrations start from
object placements drawn by the simulator; evaluation uses LIBERO's official initial states, which none of them had.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.reproduce.jobs import Job, JobFailed, JobRunner, as_arguments, start_or_resume
from prismatic.util.cli import run
from prismatic.util.errors import UsageError

WEIGHTS = Path(__file__).resolve().parents[1] / "mini" / "weights"
METHODS = ("baseline", "rocket")
UNTOUCHED = "untouched"
IMAGE_SIZE = 128
_VIDEO_SECONDS = 40.0


@dataclass
class DemoConfig:
    """What to run and where; the defaults take about 15 minutes on two cores."""

    out: Path = Path("demo")  # Everything goes here
    suite: str = "libero_object"  # Task suite
    tasks: str = "7,9"  # Tasks, comma list; the shipped student saw none of these
    episodes: int = 25  # Demonstrations per task
    max_steps: int = 200  # Fine-tuning steps of each run
    batch_size: int = 32  # Samples per step
    learning_rate: float = 2e-3  # Peak learning rate
    seeds: str = "0,1"  # Fine-tuning seeds, comma list
    trials: int = 20  # Evaluation episodes per task
    minutes: float = 15.0  # Later seeds start only if they are expected to end within this time
    parallel: int = 0  # Commands at a time; 0: one per core, at most 4

    def validate(self) -> None:
        """Refuse wrong values; raises UsageError."""
        for name in ("episodes", "max_steps", "batch_size", "trials"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name}: {getattr(self, name)} found; accepted: 1 or more")
        _ = self.task_list, self.seed_list
        for part in ("student", "teacher"):
            if not (WEIGHTS / part / "model.safetensors").is_file():
                raise UsageError(f"{WEIGHTS / part}: no model.safetensors; the mini models belong to the repository")

    @property
    def task_list(self) -> tuple[int, ...]:
        """Task numbers."""
        return _numbers("--tasks", self.tasks)

    @property
    def seed_list(self) -> tuple[int, ...]:
        """Fine-tuning seeds."""
        return _numbers("--seeds", self.seeds)

    @property
    def jobs_at_a_time(self) -> int:
        """How many commands run side by side."""
        return self.parallel or min(4, os.cpu_count() or 1)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in str(text).strip("[]() ").split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not numbers:
        raise UsageError(f"{flag}: {text!r} found; accepted: numbers, such as 0,1")
    return numbers


def collect_job(config: DemoConfig) -> Job:
    """Demonstrations of the chosen tasks as an RLDS dataset."""
    name = f"{config.suite}_no_noops"
    flags = {
        "suite": config.suite,
        "tasks": config.tasks,
        "episodes": config.episodes,
        "seed": 1,
        "image_size": IMAGE_SIZE,
        "render": "fast",
        "workers": config.jobs_at_a_time,
        "out": config.out / "data",
        "name": name,
    }
    result = config.out / "data" / name / "1.0.0" / "dataset_info.json"
    return Job("collect", ("-m", "experiments.mini.collect", *as_arguments(flags)), result)


def train_job(config: DemoConfig, method: str, seed: int) -> Job:
    """LoRA fine-tuning of the shipped student; methods differ in the recipe alone."""
    run_id = f"{method}-seed{seed}"
    flags = {
        "recipe": method,
        **start_or_resume(config.out / "runs" / run_id, lambda: WEIGHTS / "student"),
        "vggt_path": WEIGHTS / "teacher",
        "data_root_dir": config.out / "data",
        "dataset_name": f"{config.suite}_no_noops",
        "run_root_dir": config.out / "runs",
        "run_id_override": run_id,
        "num_images_in_input": 2,
        "use_proprio": True,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "scheduler": "CosineAnnealingLR",
        "lr_warmup_steps": 20,
        "max_steps": config.max_steps,
        "save_freq": 100,
        "max_grad_norm": 1.0,
        "seed": seed,
        "num_workers": 0,
    }
    return Job(
        f"train-{run_id}",
        ("vla-scripts/finetune.py", *as_arguments(flags)),
        _checkpoint(config, run_id) / "config.json",
    )


def evaluate_job(config: DemoConfig, run_id: str) -> Job:
    """Rollouts from official initial states."""
    checkpoint = WEIGHTS / "student" if run_id == UNTOUCHED else _checkpoint(config, run_id)
    flags = {
        "pretrained_checkpoint": checkpoint,
        "task_suite_name": config.suite,
        "task_ids": config.tasks,
        "num_trials_per_task": config.trials,
        "env_img_res": IMAGE_SIZE,
        "render": "fast",
        "num_workers": 1,
        "local_log_dir": config.out / "eval",
        "run_name": run_id,
    }
    arguments = ("experiments/robot/libero/run_libero_eval.py", *as_arguments(flags))
    return Job(f"evaluate-{run_id}", arguments, config.out / "eval" / run_id / "summary.json")


def video_job(config: DemoConfig, run_id: str) -> Job:
    """One rollout per task on video."""
    evaluation = evaluate_job(config, run_id)
    arguments = [*evaluation.arguments, *as_arguments({"save_videos": "all"})]
    arguments[arguments.index("--num_trials_per_task") + 1] = "1"
    arguments[arguments.index("--run_name") + 1] = f"video-{run_id}"
    return Job(f"video-{run_id}", tuple(arguments), config.out / "eval" / f"video-{run_id}" / "summary.json")


def _checkpoint(config: DemoConfig, run_id: str) -> Path:
    return config.out / "runs" / f"{run_id}--{config.max_steps}_chkpt"


def seconds_of_a_seed(seconds: dict[str, float]) -> float:
    """What one more seed takes, from the commands that ran: the methods are trained, then evaluated, side by side."""
    stages = (
        [value for name, value in seconds.items() if name.startswith(f"{stage}-") and not name.endswith(UNTOUCHED)]
        for stage in ("train", "evaluate")
    )
    return sum(max(values, default=0.0) for values in stages)


def run_stages(config: DemoConfig, runner: JobRunner) -> tuple[int, ...]:
    """Run everything; returns the seeds that were run."""
    started = time.monotonic()
    parallel = config.jobs_at_a_time
    runner.console.rule("1/3 demonstrations")
    runner.run([collect_job(config)], 1)
    done: list[int] = []
    for number, seed in enumerate(config.seed_list):
        expected = time.monotonic() - started + seconds_of_a_seed(runner.seconds) + _VIDEO_SECONDS
        if number and expected > 60 * config.minutes:
            runner.console.print(f"seed {seed} is left out: it would not end within {config.minutes:g} minutes")
            continue
        runner.console.rule(f"2/3 fine-tuning, seed {seed}")
        runner.run([train_job(config, method, seed) for method in METHODS], parallel)
        runner.console.rule(f"3/3 rollouts, seed {seed}")
        names = [f"{method}-seed{seed}" for method in METHODS] + ([UNTOUCHED] if number == 0 else [])
        runner.run([evaluate_job(config, name) for name in names], parallel)
        done.append(seed)
    runner.run([video_job(config, f"rocket-seed{done[0]}")], parallel)
    return tuple(done)


def main(config: DemoConfig) -> int:
    """Run the stages and print the report; returns 1 when a stage failed."""
    config.validate()
    from rich.console import Console

    from experiments.reproduce.demo_report import write_report

    config.out = config.out.resolve()
    console = Console()
    started = time.monotonic()
    try:
        seeds = run_stages(config, JobRunner(config.out / "logs", console))
    except JobFailed as error:
        console.print(str(error), style="red", markup=False)
        return 1
    write_report(config, seeds, minutes=(time.monotonic() - started) / 60, console=console)
    return 0


if __name__ == "__main__":
    run(DemoConfig, main)
