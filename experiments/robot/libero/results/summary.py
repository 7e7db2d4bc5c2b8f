"""Success rates with 95% Wilson intervals, by task, suite and kind of perturbation, and the paired comparison of two
runs. Pure functions of episode results."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from experiments.report.html import render
from experiments.robot.libero.rollouts.result import CONFIDENCE, rate, wilson_interval
from experiments.robot.libero.suites.tasks import SUITES
from prismatic.util.errors import UsageError

if TYPE_CHECKING:
    from experiments.robot.libero.rollouts.result import EpisodeResult

__all__ = ["CONFIDENCE", "compare", "comparison_to_markdown", "rate", "summarize", "to_markdown", "wilson_interval"]
Episode = TypeVar("Episode", bound=Hashable)
Report = dict[str, Any]  # What is written as JSON; the functions that return it list its entries.


@dataclass(frozen=True)
class PairedTest:
    """Exact McNemar test on the episodes that two sides share: solved by one side alone, and the two-sided p-value."""

    episodes: int
    only_a: int
    only_b: int
    p_value: float


def paired_test(solved_a: Mapping[Episode, bool], solved_b: Mapping[Episode, bool]) -> PairedTest:
    """Test whether one side solves more of the episodes that both have, given as (suite, task, ...) -> solved.

    Only episodes that one side solved and the other did not tell the sides apart; under the null hypothesis they split
    evenly, so the p-value is that of a binomial test at 0.5.
    """
    from scipy.stats import binomtest

    shared = solved_a.keys() & solved_b.keys()
    only_a = sum(solved_a[key] and not solved_b[key] for key in shared)
    only_b = sum(solved_b[key] and not solved_a[key] for key in shared)
    p_value = float(binomtest(only_b, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return PairedTest(len(shared), only_a, only_b, p_value)


def summarize(results: Sequence[EpisodeResult]) -> Report:
    """Rates per task, per suite and over all episodes.

    Returns:
        {"suites": {suite: S}, "total": {R, "mean_of_suites"}} where R is what :func:`rate` returns and S is {R,
        "mean_steps_of_successes", "seconds_per_episode", "tasks": {id: {"task", R}}}. `mean_of_suites` is what papers
        report as the LIBERO average. With episodes of a suite that has kinds of perturbation also "perturbations", see
        :func:`_by_kind`.
    """
    suites: Report = {}
    for suite in sorted({result.suite for result in results}):
        episodes = [result for result in results if result.suite == suite]
        by_task: dict[int, list[EpisodeResult]] = {}
        for result in episodes:
            by_task.setdefault(result.task_id, []).append(result)
        steps = [result.steps for result in episodes if result.status == "success"]
        suites[suite] = {
            **rate(episodes),
            "mean_steps_of_successes": sum(steps) / len(steps) if steps else None,
            "seconds_per_episode": sum(result.wall_time for result in episodes) / len(episodes),
            "tasks": {str(task): {"task": group[0].task, **rate(group)} for task, group in sorted(by_task.items())},
        }
    perturbed = [result for result in results if _has_kind(result)]
    return {
        "suites": suites,
        "total": {**rate(results), "mean_of_suites": mean(suite["success_rate"] for suite in suites.values())},
        **({"perturbations": _by_kind(perturbed)} if perturbed else {}),
    }


def mean(rates: Iterable[float | None]) -> float | None:
    """Mean of the rates that are known."""
    known = [value for value in rates if value is not None]
    return sum(known) / len(known) if known else None


def _has_kind(result: EpisodeResult) -> bool:
    return result.suite in SUITES and result.kind in SUITES[result.suite].kinds and result.task_name is not None


def _by_kind(results: Sequence[EpisodeResult]) -> Report:
    """Rates per kind of perturbation and the benchmark's two totals.

    Returns:
        {"kinds": {kind: {R, "benchmark_tasks", "levels": {level: R}}}, "mean_of_kinds", "task_weighted_total",
        "tasks_run", "benchmark_tasks", "not_run"}. The task-weighted total weighs each kind with its number of tasks in
        the suites that were run, so that a balanced subset estimates what the whole benchmark gives. Both totals are
        over the kinds that were run; "not_run" names the others ("layout_add": layouts, but none with added objects).
    """
    suites = [SUITES[name] for name in SUITES if any(result.suite == name for result in results)]
    tasks = {kind: sum(suite.kinds.get(kind, 0) for suite in suites) for suite in suites for kind in suite.kinds}
    kinds: Report = {}
    for kind in tasks:
        episodes = [result for result in results if result.kind == kind]
        if episodes:
            levels = sorted({result.level for result in episodes if result.level is not None})
            kinds[kind] = {
                **rate(episodes),
                "benchmark_tasks": tasks[kind],
                "levels": {str(level): rate(entry for entry in episodes if entry.level == level) for level in levels},
            }
    parts = dict.fromkeys(part for suite in suites for part in suite.kind_parts)
    run = {SUITES[result.suite].part_of(result.task_name or "") for result in results}
    rated = [entry for entry in kinds.values() if entry["success_rate"] is not None]
    weight = sum(entry["benchmark_tasks"] for entry in rated)
    weighted = sum(entry["benchmark_tasks"] * entry["success_rate"] for entry in rated)
    return {
        "kinds": kinds,
        "mean_of_kinds": mean(entry["success_rate"] for entry in rated),
        "task_weighted_total": weighted / weight if weight else None,
        "tasks_run": len({(result.suite, result.task_id) for result in results}),
        "benchmark_tasks": sum(tasks.values()),
        "not_run": [part for part in parts if part not in run],
    }


def to_markdown(report: Report) -> str:
    """The table of :func:`summarize`."""
    # Thousands of tasks with one episode each are no table to read; their kinds are, below it.
    listed = [suite for suite in report["suites"] if suite not in SUITES or not SUITES[suite].kinds]
    return render("summary.md", report=report, listed=listed)


def compare(results_a: Sequence[EpisodeResult], results_b: Sequence[EpisodeResult]) -> Report:
    """Exact McNemar test on the episodes that both runs completed (same suite, task and initial state).

    Where results name kinds of perturbation, "kinds" has one such comparison for each. See :func:`paired_test`.

    Raises:
        UsageError: the runs share no completed episode.
    """
    compared = _compare_paired(results_a, results_b)
    if compared is None:
        raise UsageError("compare: the two runs have no completed episode in common")
    kinds: Report = {}
    for kind in dict.fromkeys(kind for suite in SUITES.values() for kind in suite.kinds):
        sides = ([r for r in side if _has_kind(r) and r.kind == kind] for side in (results_a, results_b))
        if comparison := _compare_paired(*sides):
            kinds[kind] = comparison
    return {**compared, "kinds": kinds} if kinds else compared


def _compare_paired(results_a: Sequence[EpisodeResult], results_b: Sequence[EpisodeResult]) -> Report | None:
    by_key_a, by_key_b = (
        {result.key: result.status == "success" for result in results if result.status != "error"}
        for results in (results_a, results_b)
    )
    shared = by_key_a.keys() & by_key_b.keys()
    if not shared:
        return None
    test = paired_test(by_key_a, by_key_b)
    successes_a, successes_b = sum(by_key_a[key] for key in shared), sum(by_key_b[key] for key in shared)
    return {
        **asdict(test),
        "left_out": len(by_key_a.keys() ^ by_key_b.keys()),
        "success_rate_a": successes_a / len(shared),
        "success_rate_b": successes_b / len(shared),
        "difference_b_minus_a": (successes_b - successes_a) / len(shared),
        "interval_95_a": list(wilson_interval(successes_a, len(shared))),
        "interval_95_b": list(wilson_interval(successes_b, len(shared))),
    }


def comparison_to_markdown(content: Report) -> str:
    """The table of :func:`compare`."""
    return render("comparison.md", report=content)
