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
from collections.abc import Sequence
from pathlib import Path

from experiments.robot.libero.results.planned import Completeness, check, describe, planned_episodes, write_plan
from experiments.robot.libero.results.run_folder import differing_values, later_unless_error, read_episode_lines
from experiments.robot.libero.results.summary import Report, summarize, to_markdown
from experiments.robot.libero.rollouts.protocol import protocol_deviations
from experiments.robot.libero.rollouts.result import EpisodeResult
from prismatic.util.cli import CommandParser, exit_code
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, read_json

EXIT_INCOMPLETE, EXIT_ERRORS = 1, 3


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
    configs = [read_json(folder / "config.json") for folder in folders]
    for folder, config in zip(folders, configs):
        if differing := differing_values(configs[0].get("identity", {}), config.get("identity", {})):
            raise UsageError(f"{folder}: not the same evaluation as {folders[0]}: {'; '.join(differing[:4])}")
    return configs[0]


def _write(
    out: Path, config: Report, planned: set[tuple[str, int, int]], lines: Sequence[tuple[EpisodeResult, bytes]]
) -> Report:
    chosen: dict[tuple[str, int, int], tuple[EpisodeResult, bytes]] = {}
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
    """Arguments of the command."""
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
