"""A page of evaluation results that a person would look at: one HTML file from the result files of one or more runs.

    python -m experiments.robot.libero.results page RUN [RUN ...] [--out FILE] [--title TEXT]

It shows success with intervals, every pair of runs compared on the episodes both have, kinds of perturbation where the
results name them (LIBERO-Plus), tasks, videos with failures first, errors, episodes and configurations. Style and
script are inside; videos are referred to by their path relative to the page, so keep it beside the runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from experiments.report import percent
from experiments.report.html import Rate, link, render, setting_rows
from experiments.robot.libero.results import summary
from experiments.robot.libero.results.run_folder import load_episodes, planned_episodes, read_run_config
from experiments.robot.libero.rollouts.result import EpisodeResult
from prismatic.util.cli import CommandParser, exit_code
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, refuse_no_file

MOST_TASKS = 400  # rows of a suite's table; LIBERO-Plus has thousands of tasks of one episode each
MOST_EPISODES = 5000
MOST_VIDEOS = 60  # of failures, and of successes: a browser opens each
ALL_PAIRS_UP_TO = 4  # runs; with more of them each is compared with the first
_VIDEO = re.compile(r"(?P<suite>\w+)--task(?P<task>\d+)--init(?P<init>\d+)--(?P<status>success|failure)\.mp4")


@dataclass(frozen=True)
class Run:
    """The results of one run folder; `series` numbers it, and its color, on the page."""

    name: str
    folder: Path
    series: int
    episodes: tuple[EpisodeResult, ...]
    record: dict[str, Any]
    planned: int
    missing: int  # of the planned episodes: how many have no result

    @property
    def rate(self) -> Rate:
        return Rate.of(summary.rate(self.episodes))

    @property
    def details(self) -> list[tuple[str, str]]:
        """Further lines of a card."""
        report = summary.summarize(self.episodes)
        suites = report["suites"]
        solved = [result.steps for result in self.episodes if result.status == "success"]
        rows = [("episodes", f"{self.rate.successes} of {self.rate.trials} solved")]
        if len(suites) > 1:
            rows.append((f"mean of {len(suites)} suites", percent(report["total"]["mean_of_suites"])))
        rows.append(("errors", str(self.rate.errors)))
        if solved:
            rows.append(("steps of a success", f"{sum(solved) / len(solved):.0f}"))
        rows.append(("suite", ", ".join(suites)))
        if self.record.get("identity", {}).get("standard_protocol") is False:
            rows.append(("protocol", "not the published one"))
        return rows


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the run folders, in the order given. Raises UsageError for a folder without results."""
    names = [folder.resolve().name for folder in folders]
    runs = []
    for series, (folder, name) in enumerate(zip(folders, names)):
        if names.count(name) > 1:
            name = f"{folder.resolve().parent.name}/{name}"
        episodes = tuple(load_episodes(folder))
        content = read_run_config(folder)
        planned = planned_episodes(folder)
        missing = len(planned - {result.key for result in episodes})
        runs.append(Run(name, folder, series, episodes, content, len(planned), missing))
    return runs


def build_page(folders: Sequence[Path], out: Path, title: str = "Evaluation in LIBERO") -> None:
    """Write the page of some runs to `out`. Raises UsageError as :func:`load_runs`."""
    runs = load_runs(folders)
    records = [dict(run.record) for run in runs]
    everything = [(run.series, result) for run in runs for result in run.episodes]
    suites = sorted({result.suite for _, result in everything})
    named = ", ".join(suites[:4]) + (f" and {len(suites) - 4} more" if len(suites) > 4 else "")
    videos = _videos(runs, out)
    failures, successes = ([video for video in videos if video["status"] == kind] for kind in ("failure", "success"))
    ordered = sorted(everything, key=lambda entry: (_URGENCY[entry[1].status], entry[1].key, entry[0]))
    page = render(
        "libero_results.html",
        title=title,
        subtitle=f"{len(runs)} run{'s' * (len(runs) > 1)}, {len(everything)} episodes, {named}",
        runs=runs,
        comparisons=_comparisons(runs),
        kinds=_kinds(runs),
        suites=[_suite(runs, suite) for suite in suites],
        failures=failures[:MOST_VIDEOS],
        successes=successes[:MOST_VIDEOS],
        left_out=sum(max(0, len(clips) - MOST_VIDEOS) for clips in (failures, successes)),
        errors=[_entry(series, result) for series, result in ordered if result.status == "error"],
        episodes=[_entry(series, result) for series, result in ordered[:MOST_EPISODES]],
        num_episodes=len(everything),
        configuration=setting_rows([{**record.pop("identity", {}), **record} for record in records]),
    )
    atomic_write(out, page)


_URGENCY = {"error": 0, "failure": 1, "success": 2}


def _entry(series: int, result: EpisodeResult) -> dict[str, object]:
    return {"series": series, **vars(result)}


def _comparisons(runs: Sequence[Run]) -> list[dict[str, object]]:
    """Every pair of runs, or each against the first where there are many."""
    pairs = itertools.combinations(range(len(runs)), 2)
    comparisons: list[dict[str, object]] = []
    for a, b in pairs if len(runs) <= ALL_PAIRS_UP_TO else ((0, other) for other in range(1, len(runs))):
        try:
            content: dict[str, Any] | None = summary.compare(runs[a].episodes, runs[b].episodes)
        except UsageError:
            content = None
        verdict = _verdict(runs[a].name, runs[b].name, content)
        comparisons.append({"a": a, "b": b, "content": content, "verdict": verdict})
    return comparisons


def _verdict(name_a: str, name_b: str, content: dict[str, Any] | None) -> str:
    if content is None:
        return "no episode in common"
    if content["p_value"] >= 0.05:
        return "no difference shown"
    return f"{name_b if content['difference_b_minus_a'] > 0 else name_a} is better"


class _Row(TypedDict):
    labels: list[int | str]
    rates: list[Rate]


def _row(runs: Sequence[Run], labels: Sequence[int | str], chosen: Callable[..., bool]) -> _Row:
    """A row of a table of rates: for each run, that of the episodes for which `chosen` holds."""
    rates = [Rate.of(summary.rate(result for result in run.episodes if chosen(result))) for run in runs]
    return {"labels": list(labels), "rates": rates}


def _suite(runs: Sequence[Run], suite: str) -> dict[str, object]:
    results = [result for run in runs for result in run.episodes if result.suite == suite]
    tasks = {result.task_id: result.task_name or result.task for result in results}
    rows = [
        _row(runs, entry, lambda result, task=entry[0]: (result.suite, result.task_id) == (suite, task))
        for entry in (sorted(tasks.items()) if len(tasks) <= MOST_TASKS else ())
    ]
    total = _row(runs, ["", "all tasks"], lambda result: result.suite == suite)
    return {"name": suite, "rows": rows, "total": total, "num_tasks": len(tasks)}


def _kinds(runs: Sequence[Run]) -> dict[str, object] | None:
    """Rates by kind of perturbation, or None where no result names one."""
    kinds = sorted({result.kind for run in runs for result in run.episodes if result.kind})
    if not kinds:
        return None
    rows = [_row(runs, [kind], lambda result, kind=kind: result.kind == kind) for kind in kinds]
    means = [summary.mean(row["rates"][run.series].value for row in rows) for run in runs]
    total = _row(runs, ["all episodes"], lambda result: bool(result.kind))
    return {"rows": rows, "totals": [total, {"labels": [f"mean of {len(kinds)} kinds"], "rates": means}]}


def _videos(runs: Sequence[Run], out: Path) -> list[dict[str, object]]:
    """Videos of all runs with what is known of their episodes, paths relative to the page."""
    videos = []
    for run in runs:
        known = {result.key: result for result in run.episodes}
        for file in sorted((run.folder / "videos").glob("*.mp4")):
            match = _VIDEO.fullmatch(file.name)
            if match is None:
                continue
            key = (match["suite"], int(match["task"]), int(match["init"]))
            result = known.get(key)
            if result is None or result.status != match["status"]:
                continue  # Of an episode that was repeated with another end, or of a run that was discarded.
            videos.append({**_entry(run.series, result), "path": link(file, out)})
    return videos


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(add_help=False)
    arguments.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder written by run_libero_eval.py")
    arguments.add_argument(
        "--out", type=Path, help="page to write; default: index.html in the run's folder, or above several"
    )
    arguments.add_argument("--title", default="Evaluation in LIBERO")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Write the page; returns the exit code."""
    runs: list[Path] = arguments.runs
    above = runs[0] if len(runs) == 1 else Path(os.path.commonpath([run.resolve() for run in runs]))
    out: Path = arguments.out or above / "index.html"
    refuse_no_file("--out" if arguments.out else "RUN", out)
    build_page(runs, out, arguments.title)
    print(f"page: {out}")
    return 0


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    """`results page` as a command of its own."""
    return run(CommandParser(parents=[parser()]).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
