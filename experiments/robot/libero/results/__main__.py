"""Report one or several result folders, or compare two.

python -m experiments.robot.libero.results report RUN [RUN ...]     one table over the runs, one suite each or not
python -m experiments.robot.libero.results compare RUN_A RUN_B     paired test on the episodes both have
python -m experiments.robot.libero.results.merge RUN [RUN ...]     is every episode there once? one folder of all
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.robot.libero.results import summary
from experiments.robot.libero.results.run_folder import (
    EpisodeResult,
    deviations,
    differing_conditions,
    load_episodes,
    read_identity,
)
from prismatic.util.cli import CommandParser, exit_code
from prismatic.util.errors import UsageError


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module; see its docstring."""
    parser = CommandParser(prog="python -m experiments.robot.libero.results", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="success per task and suite over one or several runs")
    report.add_argument("runs", type=Path, nargs="+")
    compare = commands.add_parser("compare", help="paired test of two runs on the episodes both have")
    compare.add_argument("runs", type=Path, nargs=2, metavar="RUN")
    for command in (report, compare):
        command.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    arguments = parser.parse_args(argv)
    episodes = [load_episodes(run) for run in arguments.runs]
    identities = [read_identity(run) for run in arguments.runs]
    if arguments.command == "compare":
        content = summary.compare(episodes[0], episodes[1])
        content["protocols_differ"] = differing_conditions(*identities)
        text = summary.comparison_to_markdown(content)
    else:
        content = summary.summarize(_merge(arguments.runs, episodes))
        found = (deviation for identity in identities for deviation in deviations(identity))
        content["deviations"] = list(dict.fromkeys(found))
        text = summary.to_markdown(content)
    print(json.dumps(content, indent=2) if arguments.json else text)
    return 0


def _merge(runs: Sequence[Path], episodes: Iterable[list[EpisodeResult]]) -> list[EpisodeResult]:
    """Episodes of several runs, refused where two runs have the same one."""
    owner: dict[tuple[str, int, int], Path] = {}
    merged = []
    for run, results in zip(runs, episodes):
        for result in results:
            if result.key in owner:
                raise UsageError(
                    f"{run}: episode {result.key} is also in {owner[result.key]}; use `compare` for two runs"
                )
            owner[result.key] = run
            merged.append(result)
    return merged


if __name__ == "__main__":
    sys.exit(main())
