"""Success rates with 95% Wilson intervals, and the paired comparison of two runs. Pure functions of episode results."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from experiments.report import markdown_table, percent, percent_range
from experiments.robot.libero.results import plus_summary
from experiments.robot.libero.rollouts.protocol import PLUS_SUITES
from prismatic.util.errors import UsageError

if TYPE_CHECKING:
    from experiments.robot.libero.results.run_folder import EpisodeResult

CONFIDENCE = 0.95
Episode = TypeVar("Episode", bound=Hashable)


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Two-sided p-value of the exact McNemar test, from the episodes that one run solved and the other did not."""
    from scipy.stats import binomtest

    discordant = only_a + only_b
    return float(binomtest(only_b, discordant, 0.5).pvalue) if discordant else 1.0


@dataclass(frozen=True)
class PairedTest:
    """Exact McNemar test on the episodes that two sides share: solved by one side alone, and the two-sided p-value."""

    episodes: int
    only_a: int
    only_b: int
    p_value: float


def paired_test(solved_a: Mapping[Episode, bool], solved_b: Mapping[Episode, bool]) -> PairedTest:
    """Whether one side solves more of the episodes that both have, given as (suite, task, ...) -> solved.

    Only episodes that one side solved and the other did not tell the sides apart; under the null hypothesis they split
    evenly, so the p-value is that of a binomial test at 0.5.
    """
    shared = solved_a.keys() & solved_b.keys()
    only_a = sum(solved_a[key] and not solved_b[key] for key in shared)
    only_b = sum(solved_b[key] and not solved_a[key] for key in shared)
    return PairedTest(len(shared), only_a, only_b, mcnemar_p_value(only_a, only_b))


def wilson_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval of a success rate (Wilson 1927), without continuity correction; (0, 1) without trials."""
    from scipy.stats import binomtest

    if trials == 0:
        return (0.0, 1.0)
    interval = binomtest(successes, trials).proportion_ci(confidence_level=confidence, method="wilson")
    return (float(interval.low), float(interval.high))


def rate(results: Iterable[EpisodeResult]) -> dict[str, Any]:
    """Counts, success rate and interval of some episodes. Errors are counted beside the rate, not in it."""
    statuses = [result.status for result in results]
    successes, errors = statuses.count("success"), statuses.count("error")
    completed = len(statuses) - errors
    low, high = wilson_interval(successes, completed)
    return {
        "successes": successes,
        "failures": completed - successes,
        "errors": errors,
        "success_rate": successes / completed if completed else None,
        "interval_95": [low, high],
    }


def summarize(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Rates per task, per suite and over all episodes.

    Returns:
        {"suites": {suite: S}, "total": {R, "mean_of_suites"}} where R is what :func:`rate` returns and S is {R,
        "mean_steps_of_successes", "seconds_per_episode", "tasks": {id: {"task", R}}}. `mean_of_suites` is what papers
        report as the LIBERO average. With episodes of LIBERO-Plus also "perturbations"; see :mod:`plus_summary`.
    """
    suites: dict[str, Any] = {}
    for suite in sorted({result.suite for result in results}):
        mine = [result for result in results if result.suite == suite]
        tasks = {}
        for task_id in sorted({result.task_id for result in mine}):
            of_task = [result for result in mine if result.task_id == task_id]
            tasks[str(task_id)] = {"task": of_task[0].task, **rate(of_task)}
        steps = [result.steps for result in mine if result.status == "success"]
        suites[suite] = {
            **rate(mine),
            "mean_steps_of_successes": sum(steps) / len(steps) if steps else None,
            "seconds_per_episode": sum(result.wall_time for result in mine) / len(mine),
            "tasks": tasks,
        }
    rates = [suite["success_rate"] for suite in suites.values() if suite["success_rate"] is not None]
    perturbed = plus_summary.of_plus(results)
    return {
        "suites": suites,
        "total": {**rate(results), "mean_of_suites": sum(rates) / len(rates) if rates else None},
        **({"perturbations": plus_summary.by_kind(perturbed, rate)} if perturbed else {}),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The table of :func:`summarize`."""
    rows = []
    for suite, suite_rates in report["suites"].items():
        # Thousands of tasks with one episode each are no table to read; their kinds are, below.
        for task_id, task_rates in suite_rates["tasks"].items() if suite not in PLUS_SUITES else ():
            rows.append((suite, f"{task_id} {task_rates['task']}", *rate_cells(task_rates)))
        rows.append((f"**{suite}**", "**all tasks**", *rate_cells(suite_rates)))
    if len(report["suites"]) > 1:
        rows.append(("**all**", "**all episodes**", *rate_cells(report["total"])))
    lines = markdown_table(("suite", "task", *RATE_HEADER), rows, text_columns=2)
    if len(report["suites"]) > 1:
        lines += ["", f"Mean of the {len(report['suites'])} suites: {percent(report['total']['mean_of_suites'])}"]
    if "perturbations" in report:
        lines += plus_summary.kind_lines(report["perturbations"], rate_cells)
    if report.get("deviations"):
        lines += ["", f"Not the protocol of published numbers: {', '.join(report['deviations'])}."]
    if report.get("missing"):
        lines += ["", f"**Incomplete: {report['missing']} of {report['planned']} episodes have not run.**"]
    if report["total"]["errors"]:
        lines += [
            "",
            "Episodes with errors are not counted as failures; run again with the same --run_name to repeat them.",
        ]
    return "\n".join(lines) + "\n"


RATE_HEADER = ("success", "95% interval", "episodes", "errors")


def rate_cells(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """What :func:`rate` returns as the cells of a table, see `RATE_HEADER`."""
    completed = entry["successes"] + entry["failures"]
    interval = percent_range(entry["interval_95"], 1) if completed else "-"
    return percent(entry["success_rate"]), interval, str(completed), str(entry["errors"])


def compare(results_a: Sequence[EpisodeResult], results_b: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Exact McNemar test on the episodes that both runs completed (same suite, task and initial state).

    With LIBERO-Plus, "kinds" has one such comparison for each kind of perturbation. See :func:`paired_test`.

    Raises:
        UsageError: the runs share no completed episode.
    """
    compared = _compare_paired(results_a, results_b)
    kinds = plus_summary.compare_kinds(results_a, results_b, _compare_paired)
    return {**compared, "kinds": kinds} if kinds else compared


def _compare_paired(results_a: Sequence[EpisodeResult], results_b: Sequence[EpisodeResult]) -> dict[str, Any]:
    by_key_a, by_key_b = (
        {(r.suite, r.task_id, r.init_state): r.status == "success" for r in results if r.status != "error"}
        for results in (results_a, results_b)
    )
    shared = sorted(by_key_a.keys() & by_key_b.keys())
    if not shared:
        raise UsageError("compare: the two runs have no completed episode in common")
    test = paired_test(by_key_a, by_key_b)
    successes_a, successes_b = sum(by_key_a[key] for key in shared), sum(by_key_b[key] for key in shared)
    return {
        "episodes": len(shared),
        "left_out": len(by_key_a.keys() ^ by_key_b.keys()),
        "success_rate_a": successes_a / len(shared),
        "success_rate_b": successes_b / len(shared),
        "difference_b_minus_a": (successes_b - successes_a) / len(shared),
        "interval_95_a": list(wilson_interval(successes_a, len(shared))),
        "interval_95_b": list(wilson_interval(successes_b, len(shared))),
        "only_a": test.only_a,
        "only_b": test.only_b,
        "p_value": test.p_value,
    }


def comparison_to_markdown(content: dict[str, Any]) -> str:
    """The table of :func:`compare`."""
    sides = (
        (
            name.upper(),
            percent(content[f"success_rate_{name}"]),
            percent_range(content[f"interval_95_{name}"], 1),
            str(content[f"only_{name}"]),
        )
        for name in ("a", "b")
    )
    lines = markdown_table(("run", "success", "95% interval", "solved by it alone"), sides)
    if content.get("kinds"):
        lines += plus_summary.comparison_lines(content["kinds"])
    lines += [
        "",
        f"B minus A: {100 * content['difference_b_minus_a']:+.1f} points on {content['episodes']} shared episodes "
        f"({content['left_out']} left out); exact McNemar test, two-sided: p = {content['p_value']:.4g}",
    ]
    if content.get("protocols_differ"):
        lines += ["", f"The runs differ in their protocol: {'; '.join(content['protocols_differ'])}."]
    return "\n".join(lines) + "\n"
