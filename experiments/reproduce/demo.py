"""The main job on a laptop: collect demonstrations, fine-tune with and without ROCKET, roll out, report.

    make demo            (or: python -m experiments.reproduce.demo)

A study of two arms at the mini scale. Every stage is a command of this repository that a researcher would run with
other paths; each is printed in its log and skipped when its result is already there, so an interrupted demo goes on
where it stopped. Demonstrations start from object placements drawn by the simulator; evaluation uses LIBERO's official
initial states, which none of them had.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.report import Table, percent, percent_range
from experiments.report.html import render
from experiments.reproduce.jobs import ROOT, Chain, Job, JobFailed, JobRunner
from experiments.reproduce.profiles import MINI
from experiments.reproduce.records import Outcome, Record, evaluation_record, outcome, training_curves
from experiments.reproduce.stages import StudyPaths, arm_jobs, collect_job, rollouts_job
from experiments.reproduce.studies import BASELINE, ROCKET, Arm, Study
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write
from prismatic.util.flags import check, limited, numbers, split_numbers

UNTOUCHED = Arm("untouched", "before fine-tuning", {})
DEMO = Study(
    "demo", "does everything work together", (replace(BASELINE, label="without alignment"), ROCKET)
)  # no table of the paper, so not in STUDIES
CAUTION = (
    "The demo checks that everything works together; it does not rank methods: at this size, seeds differ more than "
    "methods do."
)
_VIDEO_SECONDS = 40.0


@dataclass
class DemoConfig:
    """The demo's settings; the defaults take about 15 minutes on two cores."""

    out: Path = Path("demo")  # Everything goes here
    suite: str = "libero_object"  # Task suite
    tasks: str = numbers("7,9", some=True, least=0)  # Tasks, comma list; the shipped student saw none of these
    episodes: int = limited(25, least=1)  # Demonstrations per task
    max_steps: int = limited(200, least=1)  # Fine-tuning steps of each run
    batch_size: int = limited(32, least=1)  # Samples per step
    learning_rate: float = limited(2e-3, above=0)  # Peak learning rate
    seeds: str = numbers("0,1", some=True, least=0)  # Fine-tuning seeds, comma list
    trials: int = limited(20, least=1)  # Evaluation episodes per task
    minutes: float = limited(15.0, least=0)  # Later seeds start only if they are expected to end within this time
    parallel: int = limited(0, least=0)  # Commands at a time; 0: one per core, at most 4

    @property
    def commands_at_a_time(self) -> int:
        """Number of commands that run side by side."""
        return self.parallel or min(4, os.cpu_count() or 1)

    def paths(self) -> StudyPaths:
        """The mini profile with these flags, and its folders; raises UsageError for wrong values."""
        check(self)
        data = {"suite": self.suite, "tasks": self.tasks, "episodes": self.episodes, "workers": self.commands_at_a_time}
        budget = {"batch_size": self.batch_size, "learning_rate": self.learning_rate, "max_steps": self.max_steps}
        profile = replace(
            MINI,
            vla_path=str(ROOT / MINI.vla_path),
            teacher_path=str(ROOT / MINI.teacher_path),
            dataset_name=f"{self.suite}_no_noops",
            train={**MINI.train, **budget, "lr_warmup_steps": 20},
            final_step=self.max_steps,
            curve_steps=(),
            seeds=split_numbers("--seeds", self.seeds),
            suites=(self.suite,),
            evaluate={**MINI.evaluate, "task_ids": self.tasks, "num_trials_per_task": self.trials},
            plus_suite="",
            collect={**MINI.collect, **data},
        )
        for model in (profile.vla_path, profile.teacher_path):
            if not (Path(model) / "model.safetensors").is_file():
                raise UsageError(f"{model}: no model.safetensors; the mini models belong to the repository")
        out = self.out.resolve()
        return StudyPaths(profile, out, out / "data", evaluated_once=True)


def untouched_job(paths: StudyPaths) -> Job:
    """Rollouts of the shipped student as it is."""
    return rollouts_job(paths, UNTOUCHED.name, paths.profile.vla_path, paths.profile.suites[0])


def video_job(paths: StudyPaths, seed: int) -> Job:
    """One rollout of ROCKET per task on video."""
    name, checkpoint = f"video-{paths.run_id(ROCKET, seed)}", paths.checkpoint(ROCKET, seed, paths.profile.final_step)
    flags = {"num_trials_per_task": 1, "save_videos": "all"}
    return replace(rollouts_job(paths, name, checkpoint, paths.profile.suites[0], flags), name=name)


def seconds_of_a_seed(seconds: dict[str, float]) -> float:
    """Estimate one more seed's time from the commands that ran: methods are trained, then evaluated, side by side."""
    stages = (
        [value for name, value in seconds.items() if name.startswith(f"{stage}-") and not name.endswith(UNTOUCHED.name)]
        for stage in ("train", "evaluate")
    )
    return sum(max(values, default=0.0) for values in stages)


def run_stages(paths: StudyPaths, runner: JobRunner, parallel: int, minutes: float) -> tuple[int, ...]:
    """Run everything; returns the seeds that were run. Raises JobFailed when a command ends with an error."""
    started = time.monotonic()
    runner.console.rule("1/3 demonstrations")
    runner.run([collect_job(paths)], 1)
    done: list[int] = []
    for seed in paths.profile.seeds:
        expected = time.monotonic() - started + seconds_of_a_seed(runner.seconds) + _VIDEO_SECONDS
        if done and expected > 60 * minutes:
            runner.console.print(f"seed {seed} is left out: it would not end within {minutes:g} minutes")
            continue
        runner.console.rule(f"2/3 fine-tuning and rollouts, seed {seed}")
        chains = [Chain(arm_jobs(paths, DEMO, arm, seed)) for arm in DEMO.arms(paths.profile)]
        failures = runner.run_chains(
            chains if done else [*chains, Chain((untouched_job(paths),))], parallel, keep_going=False
        )
        if failures:
            raise failures[0]
        done.append(seed)
    runner.console.rule("3/3 video")
    runner.run([video_job(paths, done[0])], 1)
    return tuple(done)


def read_results(paths: StudyPaths, seeds: Sequence[int]) -> list[Record]:
    """Training curves and episodes of every policy."""
    step, suite = paths.profile.final_step, paths.profile.suites[0]
    runs = [(arm, seed, paths.evaluation(arm, seed, step, suite)) for seed in seeds for arm in DEMO.arms(paths.profile)]
    return [
        {
            "arm": arm.name,
            "label": arm.label,
            "seed": seed,
            "training": training_curves(paths.out / "runs" / evaluation),
            "evaluations": [evaluation_record(paths.out / "eval" / evaluation, step)],
        }
        for arm, seed, evaluation in [(UNTOUCHED, seeds[0], UNTOUCHED.name), *runs]
    ]


def success_table(outcomes: Sequence[Outcome]) -> Table:
    """Success of every policy with its interval over episodes."""
    header = ("policy", "success", "95% interval", "episodes", "seeds")
    rows = (
        (
            result.label,
            percent(result.rate, 0),
            percent_range(result.interval),
            f"{result.successes}/{len(result.episodes)}",
            "-" if result.arm == UNTOUCHED.name else ", ".join(map(str, result.by_seed)),
        )
        for result in outcomes
    )
    return Table(header, tuple(rows))


def task_table(records: Sequence[Record], outcomes: Sequence[Outcome]) -> Table:
    """Successes of every policy in every task."""
    names: dict[str, str] = records[0]["evaluations"][0]["tasks"]
    counts = [result.by_task for result in outcomes]
    rows = (
        (name, *("{}/{}".format(*count.get(int(task), (0, 0))) for count in counts)) for task, name in names.items()
    )
    return Table(("task", *(result.label for result in outcomes)), tuple(rows))


def write_report(paths: StudyPaths, seeds: Sequence[int], minutes: float) -> tuple[Table, dict[str, Path]]:
    """Write report.md, .png and .html below `paths.out`; returns the table of success, and where everything lies."""
    from experiments.reproduce.pictures import draw_demo
    from experiments.reproduce.training_page import build_page

    profile, out = paths.profile, paths.out
    records = read_results(paths, seeds)
    names = dict.fromkeys(record["arm"] for record in records)
    results = (outcome(records, name, profile.final_step, profile.suites) for name in names)
    outcomes = [result for result in results if result is not None]  # None: its episodes all ended in errors.
    table = success_table(outcomes)
    eval_dir, videos = out / "eval", out / "eval" / f"video-{paths.run_id(ROCKET, seeds[0])}" / "videos"
    draw_demo(records, outcomes, videos, out / "report.png")
    places = {
        "report": out / "report.md",
        "picture": out / "report.png",
        "page to look at": out / "report.html",
        "demonstrations": paths.data_root_dir,
        "checkpoints and loss logs": out / "runs",
        "results, one line an episode": eval_dir,
        "videos": videos,
        "logs of every command": paths.logs,
    }
    values = {"profile": profile, "seeds": seeds, "minutes": minutes, "caution": CAUTION, "places": places}
    text = render("demo.md", table=table, tasks=task_table(records, outcomes), **values)
    atomic_write(out / "report.md", text)
    runs = [out / "runs" / paths.run_id(arm, seed) for seed in seeds for arm in DEMO.arms(profile)]
    build_page(runs, out / "report.html", eval_dir, "Demo: fine-tuning with and without ROCKET", CAUTION)
    return table, places


def main(config: DemoConfig) -> int:
    """Run the stages and print the report; returns 1 when a stage failed."""
    paths = config.paths()
    from rich import table as rich_table
    from rich.console import Console

    console, started = Console(), time.monotonic()
    try:
        runner = JobRunner(paths.logs, console)
        seeds = run_stages(paths, runner, config.commands_at_a_time, config.minutes)
    except JobFailed as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    table, places = write_report(paths, seeds, minutes=(time.monotonic() - started) / 60)
    shown = rich_table.Table(title=f"{config.suite}, tasks {config.tasks}, {config.trials} unseen initial states each")
    for column in table.header:
        shown.add_column(column, justify="left" if column == "policy" else "right")
    for row in table.rows:
        shown.add_row(*row)
    console.print(CAUTION)
    console.print(shown)
    for name, path in places.items():
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    run(DemoConfig, main)
