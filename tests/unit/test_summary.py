from __future__ import annotations

import pytest

from experiments.robot.libero.results.summary import compare, summarize, to_markdown, wilson_interval
from experiments.robot.libero.rollouts.result import EpisodeResult
from prismatic.util.errors import UsageError


def results(outcomes: str, task_id: int = 0, suite: str = "libero_spatial") -> list[EpisodeResult]:
    """One episode a letter: s success, f failure, e error."""
    kinds = {"s": ("success", True), "f": ("failure", False), "e": ("error", None)}
    return [
        EpisodeResult(suite, task_id, f"task {task_id}", number, 7, *kinds[letter], 10 * (number + 1), None, 2.0)
        for number, letter in enumerate(outcomes)
    ]


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    # 493 of 500: the interval of a published 98.6%. Closed form of Wilson's score interval, z = 1.959964.
    [(0, 0, (0.0, 1.0)), (0, 10, (0.0, 0.277533)), (10, 10, (0.722467, 1.0)), (493, 500, (0.971387, 0.993202))],
)
def test_wilson_interval(successes: int, trials: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=1e-5)


def test_errors_are_counted_beside_the_rate() -> None:
    report = summarize(results("ssfe") + results("ff", task_id=1))
    spatial = report["suites"]["libero_spatial"]
    assert (spatial["successes"], spatial["failures"], spatial["errors"]) == (2, 3, 1)
    assert spatial["success_rate"] == pytest.approx(0.4)
    assert spatial["tasks"]["0"]["success_rate"] == pytest.approx(2 / 3)
    assert spatial["tasks"]["1"]["success_rate"] == 0.0
    assert spatial["mean_steps_of_successes"] == 15.0


def test_the_average_is_over_suites_not_episodes() -> None:
    report = summarize(results("ssss") + results("f", suite="libero_goal"))
    assert report["total"]["success_rate"] == pytest.approx(0.8)
    assert report["total"]["mean_of_suites"] == pytest.approx(0.5)
    assert "Mean of the 2 suites: 50.0%" in to_markdown(report)


def test_nothing_but_errors_has_no_rate() -> None:
    report = summarize(results("ee"))
    assert report["total"]["success_rate"] is None
    assert "| - | - | 0 | 2 |" in to_markdown(report)


def test_an_empty_run_has_a_table() -> None:
    assert to_markdown(summarize([])).startswith("| suite")


def test_paired_comparison_counts_discordant_episodes_only() -> None:
    # 1 against 6 discordant pairs: 2 * (C(7,0) + C(7,1)) / 2**7 = 0.125
    found = compare(results("s" * 5 + "s" + "f" * 6 + "e"), results("s" * 5 + "f" + "s" * 6 + "s"))
    assert (found["episodes"], found["only_a"], found["only_b"], found["left_out"]) == (12, 1, 6, 1)
    assert found["p_value"] == pytest.approx(0.125)
    assert found["difference_b_minus_a"] == pytest.approx(5 / 12)


def test_equal_runs_do_not_differ() -> None:
    assert compare(results("sf"), results("sf"))["p_value"] == 1.0


def test_runs_without_common_episodes_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="no completed episode in common"):
        compare(results("s"), results("s", suite="libero_goal"))
