"""The main job on a laptop: collect demonstrations, fine-tune with and without ROCKET, look inside, roll out, report.

    make demo            (or: python -m experiments.reproduce.demo)

Two arms at the mini scale, twice. In a scene where space limits (docs/confirmation.md), depth is read out of the
policies' tokens. In two tasks of LIBERO, where a short training is enough, the policies act. Every stage is a command
of this repository that a researcher would run with other paths; each is printed in its log and skipped when its result
is already there, so an interrupted demo goes on where it stopped. Demonstrations start from object placements drawn by
the simulator; evaluation uses LIBERO's official initial states, which none of them had.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.report import Table, percent, percent_range
from experiments.report.html import render
from experiments.reproduce.demo_tokens import (
    LABELS,
    TokenResults,
    data_job,
    read_tokens,
    run_tokens,
    statement,
    tokens_paths,
)
from experiments.reproduce.jobs import ROOT, Chain, Job, JobFailed, JobRunner
from experiments.reproduce.profiles import MINI
from experiments.reproduce.records import Outcome, Record, evaluation_record, outcome, training_curves
from experiments.reproduce.stages import StudyPaths, arm_jobs, collect_job, rollouts_job
from experiments.reproduce.studies import BASELINE, ROCKET, Arm, Study
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, refuse_no_folder
from prismatic.util.flags import check, limited, numbers, split_numbers

UNTOUCHED = Arm("untouched", "before fine-tuning", {})
DEMO = Study(
    "demo", "what alignment changes, and what not", (replace(BASELINE, label=LABELS[0]), ROCKET)
)  # no table of the paper, so not in STUDIES
CAUTION = "One seed of each; fresh seeds and the tests registered for them: docs/confirmation.md."
_VIDEO_SECONDS = 40.0
_UNTOUCHED_TRIALS = 5


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
    moved_episodes: int = limited(60, least=2)  # Demonstrations with the object anywhere on the table
    moved_steps: int = limited(600, least=1)  # Fine-tuning steps on these
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

    def tokens_paths(self) -> StudyPaths:
        """Folders and budget of the part on tokens, which has the first seed."""
        seed = split_numbers("--seeds", self.seeds)[0]
        return tokens_paths(self.out.resolve(), seed, self.moved_episodes, self.moved_steps, self.commands_at_a_time)


def untouched_job(paths: StudyPaths) -> Job:
    """Rollouts of the shipped student as it is; a few, since they take the longest and all fail."""
    trials = min(_UNTOUCHED_TRIALS, int(str(paths.profile.evaluate["num_trials_per_task"])))
    flags = {"num_trials_per_task": trials}
    return rollouts_job(paths, UNTOUCHED.name, paths.profile.vla_path, paths.profile.suites[0], flags)


def video_job(paths: StudyPaths, seed: int, init_state: int = 0) -> Job:
    """One rollout of ROCKET per task on video."""
    name, checkpoint = f"video-{paths.run_id(ROCKET, seed)}", paths.checkpoint(ROCKET, seed, paths.profile.final_step)
    flags = {"num_trials_per_task": 1, "first_init_state": init_state, "save_videos": "all"}
    return replace(rollouts_job(paths, name, checkpoint, paths.profile.suites[0], flags), name=name)


def solved_state(paths: StudyPaths, seed: int) -> int:
    """The initial state from which ROCKET solved most tasks."""
    folder = paths.evaluation(ROCKET, seed, paths.profile.final_step, paths.profile.suites[0])
    episodes = evaluation_record(paths.out / "eval" / folder, paths.profile.final_step)["episodes"]
    solved = Counter(state for _, state, status, *_ in episodes if status == "success")
    return min(solved, key=lambda state: (-solved[state], state), default=0)


def seconds_of_a_seed(seconds: dict[str, float]) -> float:
    """Estimate one more seed's time from the commands that ran: methods are trained, then evaluated, side by side."""
    stages = (
        [
            value
            for name, value in seconds.items()
            if name.startswith(f"{stage}-") and not name.endswith(UNTOUCHED.name) and "-moved-" not in name
        ]
        for stage in ("train", "evaluate")
    )
    return sum(max(values, default=0.0) for values in stages)


def run_stages(
    paths: StudyPaths, tokens: StudyPaths, runner: JobRunner, parallel: int, minutes: float
) -> tuple[int, ...]:
    """Run everything; returns the seeds that were run. Raises JobFailed when a command ends with an error."""
    started = time.monotonic()
    runner.console.rule("1/4 demonstrations")
    runner.run([data_job(tokens), collect_job(paths)], 1)
    runner.console.rule("2/4 object anywhere, camera moved: fine-tuning, and what the tokens tell")
    run_tokens(tokens, runner, parallel)
    done: list[int] = []
    for seed in paths.profile.seeds:
        expected = time.monotonic() - started + seconds_of_a_seed(runner.seconds) + _VIDEO_SECONDS
        if done and expected > 60 * minutes:
            runner.console.print(f"seed {seed} is left out: it would not end within {minutes:g} minutes")
            continue
        runner.console.rule(f"3/4 two tasks of LIBERO: fine-tuning and rollouts, seed {seed}")
        chains = [Chain(arm_jobs(paths, DEMO, arm, seed)) for arm in DEMO.arms(paths.profile)]
        failures = runner.run_chains(
            chains if done else [*chains, Chain((untouched_job(paths),))], parallel, keep_going=False
        )
        if failures:
            raise failures[0]
        done.append(seed)
    runner.console.rule("4/4 video")
    runner.run([video_job(paths, done[0], solved_state(paths, done[0]))], 1)
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


def write_report(
    paths: StudyPaths, tokens: TokenResults, seeds: Sequence[int], minutes: float
) -> tuple[str, Table, dict[str, Path]]:
    """Write report.md, .png and .html below `paths.out`; returns the statement, the success, where everything lies."""
    from experiments.reproduce.pictures import draw_demo
    from experiments.reproduce.training_page import build_page

    profile, out = paths.profile, paths.out
    records = read_results(paths, seeds)
    names = dict.fromkeys(record["arm"] for record in records)
    results = {name: outcome(records, name, profile.final_step, profile.suites) for name in names}
    outcomes = [result for result in results.values() if result is not None]  # None: its episodes all ended in errors.
    said = statement(tokens, results[BASELINE.name], results[ROCKET.name])
    table = success_table(outcomes)
    eval_dir, videos = out / "eval", out / "eval" / f"video-{paths.run_id(ROCKET, seeds[0])}" / "videos"
    draw_demo(tokens, outcomes, videos, out / "report.png")
    places = {
        "report": out / "report.md",
        "picture": out / "report.png",
        "page to look at": out / "report.html",
        "what the tokens tell": out / "readout",
        "demonstrations": paths.data_root_dir,
        "checkpoints and loss logs": out / "runs",
        "results, one line an episode": eval_dir,
        "videos": videos,
        "logs of every command": paths.logs,
    }
    values = {"profile": profile, "seeds": seeds, "minutes": minutes, "caution": CAUTION, "places": places}
    tables = {"table": table, "tasks": task_table(records, outcomes), "tokens": tokens.table}
    atomic_write(out / "report.md", render("demo.md", statement=said, **tables, **values))
    runs = [out / "runs" / paths.run_id(arm, seed) for seed in seeds for arm in DEMO.arms(profile)]
    picture = {"path": "report.png", "text": said}
    build_page(
        runs, out / "report.html", eval_dir, "Demo: fine-tuning with and without ROCKET", CAUTION, picture=picture
    )
    return said, table, places


def main(config: DemoConfig) -> int:
    """Run the stages and print the report; returns 1 when a stage failed."""
    refuse_no_folder("--out", config.out)
    paths, tokens = config.paths(), config.tokens_paths()
    from rich import table as rich_table
    from rich.console import Console

    console, started = Console(), time.monotonic()
    try:
        runner = JobRunner(paths.logs, console)
        seeds = run_stages(paths, tokens, runner, config.commands_at_a_time, config.minutes)
    except JobFailed as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    minutes = (time.monotonic() - started) / 60
    said, table, places = write_report(paths, read_tokens(tokens), seeds, minutes)
    shown = rich_table.Table(title=f"{config.suite}, tasks {config.tasks}, {config.trials} unseen initial states each")
    for column in table.header:
        shown.add_column(column, justify="left" if column == "policy" else "right")
    for row in table.rows:
        shown.add_row(*row)
    for line in (said, CAUTION):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(shown)
    for name, path in places.items():
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    run(DemoConfig, main)
