"""From result files to the numbers of a report: success over seeds with intervals, paired tests, losses, times."""

from __future__ import annotations

import os
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.robot.libero.results.summary import wilson_interval
from prismatic.util.errors import UsageError
from prismatic.util.files import read_json

Record = Mapping[str, Any]
_TAIL = 0.2  # of the log lines count as the end of training


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
        """The part of some seeds."""
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
        from scipy.stats import t

        rates = list(self.by_seed.values())
        if len(rates) < 2:
            return None
        half = float(t.ppf(0.975, len(rates) - 1)) * statistics.stdev(rates) / len(rates) ** 0.5
        mean = statistics.mean(rates)  # Not `rate`: a seed with errors has fewer episodes.
        return max(0.0, mean - half), min(1.0, mean + half)


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
