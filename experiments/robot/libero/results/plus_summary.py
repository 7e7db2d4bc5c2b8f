"""LIBERO-Plus's two numbers, the task-weighted total and the mean of its seven kinds, and what is behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.report import markdown_table, percent
from experiments.robot.libero.rollouts.protocol import PLUS_SUITES
from experiments.robot.libero.suites.plus import KIND_COUNTS, KINDS, parse_name

if TYPE_CHECKING:
    from experiments.robot.libero.results.run_folder import EpisodeResult

Results = Sequence["EpisodeResult"]
_PARTS = ("camera", "robot", "language", "light", "background", "noise", "layout_level", "layout_add")


def of_plus(results: Results) -> list[EpisodeResult]:
    """Those episodes that are LIBERO-Plus's."""
    return [result for result in results if result.suite in PLUS_SUITES and result.kind in KINDS and result.task_name]


def by_kind(results: Results, rate: Callable[[Results], dict[str, Any]]) -> dict[str, Any]:
    """Rates per kind of perturbation and the benchmark's two totals.

    Args:
        results: of LIBERO-Plus (:func:`of_plus`).
        rate: counts, success rate and interval of some episodes (:func:`summary.rate`).

    Returns:
        {"kinds": {kind: {R, "benchmark_tasks", "levels": {level: R}}}, "mean_of_kinds", "task_weighted_total",
        "tasks_run", "benchmark_tasks", "not_run"}. The task-weighted total weighs each kind with its number of tasks in
        the suites that were run, so that a balanced subset estimates what the whole benchmark gives. Both totals are
        over the kinds that were run; "not_run" names the others ("layout_add": layouts, but none with added objects).
    """
    places = [place for place, suite in enumerate(PLUS_SUITES) if any(result.suite == suite for result in results)]
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        mine = [result for result in results if result.kind == kind]
        if not mine:
            continue
        levels = sorted({result.level for result in mine if result.level is not None})
        kinds[kind] = {
            **rate(mine),
            "benchmark_tasks": sum(KIND_COUNTS[kind][place] for place in places),
            "levels": {str(level): rate([result for result in mine if result.level == level]) for level in levels},
        }
    run = {parse_name(result.suite, result.task_id, result.task_name or "").part for result in results}
    rated = [entry for entry in kinds.values() if entry["success_rate"] is not None]
    weight = sum(entry["benchmark_tasks"] for entry in rated)
    weighted = sum(entry["benchmark_tasks"] * entry["success_rate"] for entry in rated)
    return {
        "kinds": kinds,
        "mean_of_kinds": sum(entry["success_rate"] for entry in rated) / len(rated) if rated else None,
        "task_weighted_total": weighted / weight if weight else None,
        "tasks_run": len({(result.suite, result.task_id) for result in results}),
        "benchmark_tasks": sum(KIND_COUNTS[kind][place] for kind in KINDS for place in places),
        "not_run": [part for part in _PARTS if part not in run],
    }


def kind_lines(report: Mapping[str, Any], rate_cells: Callable[[Mapping[str, Any]], Sequence[str]]) -> list[str]:
    """Markdown of :func:`by_kind`."""
    header = ("perturbation", "success", "95% interval", "episodes", "errors")
    lines = ["", *markdown_table(header, ((kind, *rate_cells(entry)) for kind, entry in report["kinds"].items()))]
    mean, total = percent(report["mean_of_kinds"]), percent(report["task_weighted_total"])
    which = "seven" if len(report["kinds"]) == len(KINDS) else str(len(report["kinds"]))
    lines += [
        "",
        f"Mean of the {which} kinds: {mean}. Task-weighted total: {total} "
        f"({report['tasks_run']} of {report['benchmark_tasks']} tasks were run).",
    ]
    if report["not_run"]:
        lines += ["", f"**Not run: {', '.join(report['not_run'])}. Both numbers are over the rest.**"]
    return lines


def compare_kinds(
    results_a: Results, results_b: Results, compare: Callable[[Results, Results], dict[str, Any]]
) -> dict[str, Any]:
    """:func:`summary.compare` for each kind that both runs have completed episodes of."""
    compared = {}
    for kind in KINDS:
        sides = [[r for r in of_plus(results) if r.kind == kind] for results in (results_a, results_b)]
        done_a, done_b = ({r.key for r in side if r.status != "error"} for side in sides)
        if done_a & done_b:
            compared[kind] = compare(*sides)
    return compared


def comparison_lines(kinds: Mapping[str, Any]) -> list[str]:
    """Markdown of :func:`compare_kinds`."""
    rows = (
        (
            kind,
            percent(entry["success_rate_a"]),
            percent(entry["success_rate_b"]),
            *(str(entry[name]) for name in ("episodes", "only_a", "only_b")),
            f"{entry['p_value']:.3g}",
        )
        for kind, entry in kinds.items()
    )
    header = ("perturbation", "A", "B", "episodes", "solved by A alone", "by B alone", "p")
    return ["", *markdown_table(header, rows)]
