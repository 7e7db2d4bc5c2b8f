"""Check that a run split over processes or machines has every episode exactly once, and make one run folder of it.

    python -m experiments.robot.libero.results merge RUN [RUN ...] [--out FOLDER]

Several RUNs are folders of the same evaluation that were written on different machines. The result, RUN/merged unless
--out says otherwise, has the layout of a run of one process: for `results report`, `results compare`, the results page.

Exit codes: 0 complete; 1 episodes missing or double (they are listed, nothing is written); 2 wrong folders; 3 complete,
but some episodes ended in an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.robot.libero.results.run_folder import (
    Key,
    differing_values,
    later_unless_error,
    planned_episodes,
    read_episode_lines,
    read_run_config,
    write_plan,
)
from experiments.robot.libero.results.summary import Report, summarize, to_markdown
from experiments.robot.libero.rollouts.protocol import protocol_deviations
from experiments.robot.libero.rollouts.result import EpisodeResult
from prismatic.util.cli import CommandParser, exit_code
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write

EXIT_INCOMPLETE, EXIT_ERRORS = 1, 3


@dataclass(frozen=True)
class Completeness:
    """Comparison of the episodes there with those planned; each list is sorted.

    Attributes:
        planned: number of episodes that were to run.
        missing: planned, and no process has a line of it.
        doubled: finished (as success or failure) more than once, in one file or in several.
        errors: tried, and never anything but an error.
        unplanned: there, though no plan has it.
    """

    planned: int
    missing: list[Key]
    doubled: list[Key]
    errors: list[Key]
    unplanned: list[Key]

    @property
    def ok(self) -> bool:
        """Every planned episode is there exactly once (possibly as an error)."""
        return not (self.missing or self.doubled)


def check(planned: set[Key], lines: Sequence[tuple[Key, str]]) -> Completeness:
    """Compare a plan with all lines of all files: (episode, status) each."""
    finished: dict[Key, int] = defaultdict(int)
    for key, status in lines:
        finished[key] += status != "error"
    return Completeness(
        planned=len(planned),
        missing=sorted(planned - finished.keys()),
        doubled=sorted(key for key, count in finished.items() if count > 1),
        errors=sorted(key for key, count in finished.items() if count == 0),
        unplanned=sorted(finished.keys() - planned),
    )


def describe(keys: Sequence[Key], most: int = 20) -> str:
    """Episodes in words, task by task: "libero_goal task 3: 0-4, 7; task 4: 0"; at most `most` tasks."""
    by_task: dict[tuple[str, int], list[int]] = defaultdict(list)
    for suite, task_id, init_state in keys:
        by_task[suite, task_id].append(init_state)
    words, last_suite = [], ""
    for suite, task_id in list(by_task)[:most]:
        name = f"task {task_id}" if suite == last_suite else f"{suite} task {task_id}"
        words.append(f"{name}: {_ranges(by_task[suite, task_id])}")
        last_suite = suite
    more = len(by_task) - most
    return "; ".join(words) + (f"; and {more} more tasks" if more > 0 else "")


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def merge(folders: Sequence[Path], out: Path | None = None) -> tuple[Completeness, Report | None]:
    """Check the runs in `folders` together and, when nothing is missing or double, write one run folder.

    Returns:
        What was found, and the summary that was written (None when the runs are incomplete).

    Raises:
        UsageError: a folder without results or plan, runs of different configurations, or `out` is one of them.
    """
    out = out or folders[0] / "merged"
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise UsageError(f"--out: {out} is one of the runs; accepted: another folder")
    config = _common_config(folders)
    planned = set().union(*(planned_episodes(folder) for folder in folders))
    if not planned:
        raise UsageError(
            f"{folders[0]}: no plan*.json, so what is missing cannot be told; accepted: folders of new runs"
        )
    files = [file for folder in folders for file in sorted(folder.glob("episodes*.jsonl"))]
    if not files:
        raise UsageError(f"{folders[0]}: no episodes*.jsonl; accepted: folders written by run_libero_eval.py")
    lines = [line for file in files for line in read_episode_lines(file)]
    completeness = check(planned, [(result.key, result.status) for result, _ in lines])
    if not completeness.ok:
        return completeness, None
    return completeness, _write(out, config, planned, lines)


def _common_config(folders: Sequence[Path]) -> Report:
    """config.json of the runs, whose identities must agree."""
    configs = [read_run_config(folder, needed=True) for folder in folders]
    for folder, config in zip(folders, configs):
        if differing := differing_values(configs[0].get("identity", {}), config.get("identity", {})):
            raise UsageError(f"{folder}: not the same evaluation as {folders[0]}: {'; '.join(differing[:4])}")
    return configs[0]


def _write(out: Path, config: Report, planned: set[Key], lines: Sequence[tuple[EpisodeResult, bytes]]) -> Report:
    chosen: dict[Key, tuple[EpisodeResult, bytes]] = {}
    for line in lines:
        earlier = chosen.get(line[0].key)
        chosen[line[0].key] = line if earlier is None or later_unless_error(earlier[0], line[0]) is line[0] else earlier
    episodes = [chosen[key] for key in sorted(chosen)]
    identity = config.get("identity", {})
    report = {
        **summarize([result for result, _ in episodes]),
        "planned": len(planned),
        "missing": 0,
        "deviations": protocol_deviations(identity),
        "identity": identity,
    }
    atomic_write(out / "config.json", json.dumps(config, indent=2) + "\n")
    write_plan(out, "", planned, anew=True)
    atomic_write(out / "episodes.jsonl", b"".join(line + b"\n" for _, line in episodes))
    atomic_write(out / "summary.json", json.dumps(report, indent=2) + "\n")
    atomic_write(out / "summary.md", to_markdown(report))
    return report


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(add_help=False)
    arguments.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    arguments.add_argument("--out", type=Path, help="folder of the merged run (default: RUN/merged)")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Merge, and say what was found; returns the exit code."""
    out = arguments.out or arguments.runs[0] / "merged"
    completeness, report = merge(arguments.runs, out)
    for what, keys in (
        ("missing", completeness.missing),
        ("double", completeness.doubled),
        ("ended in an error", completeness.errors),
        ("not in the plan", completeness.unplanned),
    ):
        if keys:
            print(f"{len(keys)} of {completeness.planned} episodes {what}: {describe(keys)}")
    if report is None:
        return EXIT_INCOMPLETE
    planned = completeness.planned
    print(f"complete: each of {planned} episodes is there once\n\n{to_markdown(report)}\nresults: {out}")
    return EXIT_ERRORS if completeness.errors else 0


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    """`results merge` as a command of its own."""
    return run(CommandParser(parents=[parser()]).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
