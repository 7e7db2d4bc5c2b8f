"""Result files: everything a report may quote about one arm and seed, in one small JSON file; and what they add up to.

Files lie in `results/{profile}/{arm}-seed{seed}.json` and belong to the repository; checkpoints, data and logs do not.
"""

from __future__ import annotations

import io
import json
import os
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.reproduce.jobs import ROOT, Job, logged_arguments
from experiments.reproduce.stages import StudyPaths, is_complete
from experiments.reproduce.studies import Analysis, Arm, Study
from experiments.robot.libero.results.run_folder import load_episodes
from experiments.robot.libero.results.summary import wilson_interval
from experiments.robot.libero.rollouts.result import EpisodeResult
from prismatic.checkpoint.layout import read_record
from prismatic.training.metrics import read_log
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, read_json
from prismatic.util.versions import code_version, package_versions

Record = Mapping[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"
FORMAT_VERSION = 1
_TAIL = 0.2  # of the log lines count as the end of training


def write_record(paths: StudyPaths, arm: Arm, seed: int, jobs: Iterable[Job], results: Path = RESULTS) -> Path:
    """Gather what is on disk about an arm and seed, whichever study asked for it, and write its result file."""
    run_id = paths.run_id(arm, seed)
    path = results / paths.profile.name / f"{run_id}.json"
    checkpoint = paths.checkpoint(arm, seed, paths.profile.final_step)
    earlier = read_json(path) if path.is_file() else {}
    configuration = read_record(checkpoint)
    alignment = configuration.get("alignment") or {}
    # Another study's evaluation may have been stopped halfway.
    evaluated = [
        file.parent for file in sorted((paths.out / "eval").glob(f"{run_id}-step*/summary.json")) if is_complete(file)
    ]
    record = {
        "format_version": FORMAT_VERSION,
        "arm": arm.name,
        "label": arm.label,
        "seed": seed,
        "profile": paths.profile.name,
        "commands": {**earlier.get("commands", {}), **{job.name: _command(paths, job) for job in jobs}},
        # What trained the policy; checkpoints of other code may not say.
        "code": configuration.get("code") or earlier.get("code") or code_version(),
        "versions": configuration.get("versions") or earlier.get("versions") or package_versions(),
        "configuration": portable(paths, configuration),
        "alignment": alignment if alignment.get("student_layers") else {},
        "training": training_curves(paths.out / "runs" / run_id),
        "evaluations": [evaluation_record(folder) for folder in evaluated],
    }
    atomic_write(path, json.dumps(record, indent=1) + "\n")
    return path


def write_analysis_record(
    paths: StudyPaths, study: Study, analysis: Analysis, seed: int, job: Job, results: Path = RESULTS
) -> Path:
    """Copy an analysis's numbers and picture to `{study}-{analysis}[-seed{n}]` beside the other results."""
    folder = paths.analysis_folder(analysis, seed)
    path = results / paths.profile.name / "analyses" / f"{study.name}-{folder.name}.json"
    record = {
        "format_version": FORMAT_VERSION,
        "study": study.name,
        "analysis": analysis.name,
        "seed": seed if analysis.arms else None,
        "profile": paths.profile.name,
        "command": _command(paths, job),
        "code": code_version(),
        "versions": package_versions(),
        "result": portable(paths, json.loads(job.result.read_text(), parse_float=_rounded)),
    }
    atomic_write(path, json.dumps(record) + "\n")
    if seed == paths.profile.seeds[0]:
        atomic_write(path.with_suffix(".png"), _small_picture(job.result.with_suffix(".png")))
    return path


def _small_picture(file: Path) -> bytes:
    """A picture for a page as PNG, at most 1,100 pixels wide; the one for a paper stays with the run."""
    from PIL import Image

    with Image.open(file) as image:
        image.thumbnail((1100, 1600))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _rounded(number: str) -> float:
    """A number to 5 digits: matrices of every block would otherwise fill megabytes."""
    return float(f"{float(number):.5g}")


def training_curves(run_dir: Path) -> dict[str, list[float]]:
    """Column by column what `metrics.jsonl` holds; {} when there is none."""
    rows = [row for row in read_log(run_dir / "metrics.jsonl") if "loss" in row]
    names = sorted({name for row in rows for name in row})
    return {name: [round(float(row.get(name, float("nan"))), 6) for row in rows] for name in names}


def evaluation_record(folder: Path, step: int | None = None) -> dict[str, Any]:
    """One evaluation: its identity, and (task, initial state, status, steps, seconds) of every episode.

    The checkpoint's step is that of the folder's name (ARM-seedN-stepN-SUITE), if none is given.

    A task is its number, or "suite:number" in a suite of several (libero_plus), where numbers occur more than once.
    """
    config = read_json(folder / "config.json")
    episodes = sorted(load_episodes(folder), key=lambda result: result.key)
    suite = config["identity"]["suite"]

    def task(result: EpisodeResult) -> int | str:
        return result.task_id if result.suite == suite else f"{result.suite}:{result.task_id}"

    return {
        "name": folder.name,
        "step": int(folder.name.rpartition("-step")[2].split("-")[0]) if step is None else step,
        "suite": suite,
        "identity": config["identity"],
        "tasks": {str(task(result)): result.task for result in episodes},
        "kinds": {str(task(result)): result.kind for result in episodes if result.kind},
        "columns": ["task_id", "init_state", "status", "steps", "seconds"],
        "episodes": [
            [task(result), result.init_state, result.status, result.steps, round(result.wall_time, 2)]
            for result in episodes
        ],
    }


def _command(paths: StudyPaths, job: Job) -> list[str]:
    """Read what was run: a job that was done already may have had other flags than it would get now."""
    return portable(paths, logged_arguments(paths.logs / f"{job.name}.log") or job.arguments)


def portable(paths: StudyPaths, value: Any) -> Any:
    """The value with this machine's folders cut from paths."""
    text = json.dumps(value)
    for folder in (json.dumps(str(path))[1:-1] for path in (paths.out.resolve(), ROOT)):
        text = text.replace(f"{folder}{os.sep}", "").replace(folder, ".")
    return json.loads(text)


@dataclass(frozen=True)
class Outcome:
    """Success of one arm at one step, over its seeds.

    Attributes:
        episodes: (seed, suite, task, initial state) -> success; errors are left out and counted apart.
    """

    arm: str
    label: str
    episodes: Mapping[tuple[int, str, int | str, int], bool]
    errors: int

    @property
    def successes(self) -> int:
        return sum(self.episodes.values())

    @property
    def rate(self) -> float:
        """Part of the completed episodes that succeeded."""
        return self.successes / len(self.episodes)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval over all episodes: of these trained policies, not of the method."""
        return wilson_interval(self.successes, len(self.episodes))

    @property
    def by_seed(self) -> dict[int, float]:
        """Success rate of each fine-tuning seed."""
        seeds = sorted({key[0] for key in self.episodes})
        return {
            seed: statistics.mean(success for key, success in self.episodes.items() if key[0] == seed) for seed in seeds
        }

    def only_seeds(self, seeds: Collection[int]) -> Outcome:
        return replace(self, episodes={key: success for key, success in self.episodes.items() if key[0] in seeds})

    @property
    def by_task(self) -> dict[int | str, tuple[int, int]]:
        """(successes, episodes) of every task, over all seeds."""
        tasks = dict.fromkeys(key[2] for key in self.episodes)
        results = {task: [success for key, success in self.episodes.items() if key[2] == task] for task in tasks}
        return {task: (sum(successes), len(successes)) for task, successes in results.items()}

    @property
    def seed_interval(self) -> tuple[float, float] | None:
        """Student's 95% interval of the mean rate of fine-tuning runs, cut to [0, 1]; None for a single seed."""
        from scipy.stats import sem, t

        rates = list(self.by_seed.values())
        if len(rates) < 2:
            return None
        # The mean of rates is not `rate`: a seed with errors has fewer episodes.
        low, high = t.interval(0.95, len(rates) - 1, statistics.mean(rates), sem(rates))
        return max(0.0, float(low)), min(1.0, float(high))


def load_records(folder: Path) -> list[Record]:
    """All result files of a profile, by name; raises UsageError for a folder without any."""
    files = sorted(folder.glob("*-seed*.json"))
    if not files:
        raise UsageError(f"{folder}: no result files; accepted: a folder that `run` has written to")
    return [read_json(file) for file in files]


def load_analyses(folder: Path, shown_in: Path) -> list[Record]:
    """All analysis files of a profile; `picture` is added to those that have one, as a path from the report."""
    pictures = {file: file.with_suffix(".png") for file in sorted((folder / "analyses").glob("*.json"))}
    return [
        {**read_json(file), "picture": os.path.relpath(picture, shown_in) if picture.is_file() else ""}
        for file, picture in pictures.items()
    ]


def outcome(records: Iterable[Record], arm: str, step: int, suites: Sequence[str]) -> Outcome | None:
    """An arm's episodes in the given suites; None when none were run."""
    episodes: dict[tuple[int, str, int | str, int], bool] = {}
    label, errors = arm, 0
    for record in records:
        if record["arm"] != arm:
            continue
        label = record["label"]
        for evaluation in record["evaluations"]:
            if evaluation["step"] != step or evaluation["suite"] not in suites:
                continue
            for task, state, status, *_ in evaluation["episodes"]:
                if status == "error":
                    errors += 1
                else:
                    episodes[record["seed"], evaluation["suite"], task, state] = status == "success"
    return Outcome(arm, label, episodes, errors) if episodes else None


def curve(records: Sequence[Record], arm: str, steps: Sequence[int], suites: Sequence[str]) -> list[Outcome | None]:
    """An arm's outcomes along the training, all over the same seeds: those that every evaluated step has."""
    outcomes = [outcome(records, arm, step, suites) for step in steps]
    evaluated = [set(result.by_seed) for result in outcomes if result]
    shared = set.intersection(*evaluated) if evaluated else set()
    return [result.only_seeds(shared) if result and shared else result for result in outcomes]


def late_rates(records: Sequence[Record], arm: str, steps: Sequence[int], suites: Sequence[str]) -> dict[int, float]:
    """Mean success of an arm's checkpoints in the last third of training, for every seed that has all of them.

    One checkpoint of a run that is still learning is chance; a run's mean over several moves less.
    """
    late = [step for step in steps if step > 2 / 3 * max(steps)]
    rates = [result.by_seed if result else {} for result in curve(records, arm, late, suites)]
    seeds = set.intersection(*(set(rate) for rate in rates)) if rates else set()
    return {seed: statistics.mean(rate[seed] for rate in rates) for seed in sorted(seeds)}


def final_value(record: Record, name: str) -> float | None:
    """Mean of a metric over the last fifth of training; None when it was not logged."""
    values = record["training"].get(name)
    if not values:
        return None
    return statistics.mean(values[-max(1, round(_TAIL * len(values))) :])


def final_values(records: Iterable[Record], arm: str, name: str) -> list[float]:
    """:func:`final_value` of every seed that has it."""
    values = (final_value(record, name) for record in records if record["arm"] == arm)
    return [value for value in values if value is not None]


def seconds_per_step(records: Iterable[Record], arm: str) -> float | None:
    """Median time of a training step over all seeds; None when there are no logs."""
    times: list[float] = []
    for record in records:
        if record["arm"] != arm or not record["training"]:
            continue
        steps, seconds = record["training"]["step"], record["training"]["seconds"]
        # The first line holds start-up.
        times += [time / (step - before) for before, step, time in zip(steps, steps[1:], seconds[1:], strict=False)]
    return statistics.median(times) if times else None
