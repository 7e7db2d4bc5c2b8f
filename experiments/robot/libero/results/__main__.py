"""Results of evaluations: one command for tables, comparisons, pages and runs in parts.

python -m experiments.robot.libero.results report RUN [RUN ...]     one table over the runs, one suite each or not
python -m experiments.robot.libero.results compare RUN_A RUN_B     paired test on the episodes both have
python -m experiments.robot.libero.results merge RUN [RUN ...]     is every episode there once? one folder of all
python -m experiments.robot.libero.results page RUN [RUN ...]      one HTML page to look at
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.robot.libero.results import merge, page, summary
from experiments.robot.libero.results.run_folder import differing_conditions, load_episodes, read_identity
from experiments.robot.libero.rollouts.protocol import protocol_deviations
from experiments.robot.libero.rollouts.result import EpisodeResult
from prismatic.util.cli import CommandParser, exit_code
from prismatic.util.errors import UsageError


def report(arguments: argparse.Namespace) -> int:
    """Success per task and suite over one or several runs."""
    content = summary.summarize(_joined(arguments.runs, map(load_episodes, arguments.runs)))
    deviations = (deviation for run in arguments.runs for deviation in protocol_deviations(read_identity(run)))
    content["deviations"] = list(dict.fromkeys(deviations))
    print(json.dumps(content, indent=2) if arguments.json else summary.to_markdown(content))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Paired test of two runs on the episodes both have."""
    content = summary.compare(*map(load_episodes, arguments.runs))
    content["protocols_differ"] = differing_conditions(*map(read_identity, arguments.runs))
    print(json.dumps(content, indent=2) if arguments.json else summary.comparison_to_markdown(content))
    return 0


def _joined(runs: Sequence[Path], episodes: Iterable[list[EpisodeResult]]) -> list[EpisodeResult]:
    """Episodes of several runs, refused where two runs have the same one."""
    owner: dict[tuple[str, int, int], Path] = {}
    joined = []
    for run, results in zip(runs, episodes):
        for result in results:
            if result.key in owner:
                raise UsageError(
                    f"{run}: episode {result.key} is also in {owner[result.key]}; use `compare` for two runs"
                )
            owner[result.key] = run
            joined.append(result)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m experiments.robot.libero.results", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for function, names in ((report, {"nargs": "+"}), (compare, {"nargs": 2, "metavar": "RUN"})):
        command = commands.add_parser(function.__name__, help=(function.__doc__ or "").lower().rstrip("."))
        command.add_argument("runs", type=Path, **names)
        command.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
        command.set_defaults(function=function)
    for module in (merge, page):
        name, text = module.__name__.rpartition(".")[2], (module.__doc__ or "").split("\n")[0]
        command = commands.add_parser(name, help=text, parents=[module.parser()])
        command.set_defaults(function=module.run)
    return parser


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return arguments.function(arguments)


if __name__ == "__main__":
    sys.exit(main())
