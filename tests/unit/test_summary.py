"""Success rates and comparisons of runs; LIBERO-Plus's by kind, with their mean and the task-weighted total."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.robot.libero.results import summary
from experiments.robot.libero.results.summary import compare, summarize, to_markdown, wilson_interval
from experiments.robot.libero.rollouts.result import EpisodeResult
from prismatic.util.errors import UsageError
from tests.helpers.episode_results import episode_results as results

ENDINGS = {
    "camera": "_view_9_0_100_0_0_initstate_0",
    "noise": "_view_0_0_100_0_0_initstate_0_noise_3",
    "layout": "_add_1",
}


def perturbed(kind: str, outcomes: str) -> list[EpisodeResult]:
    """One episode a letter, each of a task of its own."""
    task = {"suite": "libero_plus_object", "task": "pick the milk", "task_name": f"pick_up_the_milk{ENDINGS[kind]}"}
    first = 100 * list(ENDINGS).index(kind)
    return [
        replace(result, task_id=first + number, init_state=0, level=number % 2 + 1 if kind == "noise" else None)
        for number, result in enumerate(results(outcomes, kind=kind, **task))
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
    spatial = report["suites"]["libero_goal"]
    assert (spatial["successes"], spatial["failures"], spatial["errors"]) == (2, 3, 1)
    assert spatial["success_rate"] == pytest.approx(0.4)
    assert spatial["tasks"]["0"]["success_rate"] == pytest.approx(2 / 3)
    assert spatial["tasks"]["1"]["success_rate"] == 0.0
    assert spatial["mean_steps_of_successes"] == 15.0


def test_the_average_is_over_suites_not_episodes() -> None:
    report = summarize(results("ssss") + results("f", suite="libero_10"))
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
        compare(results("s"), results("s", suite="libero_10"))


def test_mean_of_kinds_and_task_weighted_total() -> None:
    report = summarize(perturbed("camera", "ssss") + perturbed("noise", "sfff") + perturbed("layout", "fe"))
    found = report["perturbations"]
    assert [entry["success_rate"] for entry in found["kinds"].values()] == [1.0, 0.25, 0.0]
    assert found["kinds"]["layout"]["errors"] == 1
    assert found["mean_of_kinds"] == pytest.approx(1.25 / 3)
    # 396 camera, 422 noise and 403 layout tasks of libero_object.
    assert found["task_weighted_total"] == pytest.approx((396 + 0.25 * 422) / (396 + 422 + 403))
    assert found["kinds"]["noise"]["levels"]["1"]["success_rate"] == 0.5
    assert (found["tasks_run"], found["benchmark_tasks"]) == (10, 2518)
    assert found["not_run"] == ["robot", "language", "light", "background", "layout_level"]


def test_the_tables_name_kinds_not_thousands_of_tasks() -> None:
    text = to_markdown(summarize(perturbed("camera", "ssf") + perturbed("noise", "f")))
    assert "| camera | 66.7% | 20.8 to 93.9% | 3 | 0 |" in text
    assert "Mean of the 2 kinds: 33.3%" in text and "Not run: robot" in text
    assert "pick the milk" not in text


def test_other_suites_have_no_kinds() -> None:
    plain = [EpisodeResult("libero_object", 0, "pick", 0, 7, "success", True, 10, None, 1.0)]
    assert "perturbations" not in summarize(plain) and "kinds" not in compare(plain, plain)


def test_comparison_by_kind() -> None:
    a = perturbed("camera", "ssff") + perturbed("noise", "ssss")
    b = perturbed("camera", "fsss") + perturbed("noise", "ffff") + perturbed("layout", "s")
    found = compare(a, b)
    assert list(found["kinds"]) == ["camera", "noise"]
    assert (found["kinds"]["camera"]["only_a"], found["kinds"]["camera"]["only_b"]) == (1, 2)
    assert found["kinds"]["noise"]["p_value"] == pytest.approx(0.125)
    assert "| noise | 100.0% | 0.0% | 4 | 4 | 0 | 0.125 |" in summary.comparison_to_markdown(found)
