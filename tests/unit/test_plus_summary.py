"""LIBERO-Plus's numbers: rates by kind, their mean, the task-weighted total, and a paired comparison by kind."""

from __future__ import annotations

import pytest

from experiments.robot.libero.results.summary import compare, comparison_to_markdown, summarize, to_markdown
from experiments.robot.libero.rollouts.result import EpisodeResult

ENDINGS = {
    "camera": "_view_9_0_100_0_0_initstate_0",
    "noise": "_view_0_0_100_0_0_initstate_0_noise_3",
    "layout": "_add_1",
}


def results(kind: str, outcomes: str, suite: str = "libero_plus_object", first: int = 0) -> list[EpisodeResult]:
    """One episode a letter, each of a task of its own: s success, f failure, e error."""
    statuses = {"s": ("success", True), "f": ("failure", False), "e": ("error", None)}
    place = 100 * list(ENDINGS).index(kind) + first
    return [
        EpisodeResult(
            suite=suite,
            task_id=place + number,
            task="pick the milk",
            init_state=0,
            seed=7,
            status=statuses[letter][0],
            success=statuses[letter][1],
            steps=10,
            error=None,
            wall_time=1.0,
            kind=kind,
            level=number % 2 + 1 if kind == "noise" else None,
            task_name=f"pick_up_the_milk{ENDINGS[kind]}",
        )
        for number, letter in enumerate(outcomes)
    ]


def test_mean_of_kinds_and_task_weighted_total() -> None:
    report = summarize(results("camera", "ssss") + results("noise", "sfff") + results("layout", "fe"))
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
    text = to_markdown(summarize(results("camera", "ssf") + results("noise", "f")))
    assert "| camera | 66.7% | 20.8 to 93.9% | 3 | 0 |" in text
    assert "Mean of the 2 kinds: 33.3%" in text and "Not run: robot" in text
    assert "pick the milk" not in text


def test_other_suites_have_no_kinds() -> None:
    plain = [EpisodeResult("libero_object", 0, "pick", 0, 7, "success", True, 10, None, 1.0)]
    assert "perturbations" not in summarize(plain) and "kinds" not in compare(plain, plain)


def test_comparison_by_kind() -> None:
    a = results("camera", "ssff") + results("noise", "ssss")
    b = results("camera", "fsss") + results("noise", "ffff") + results("layout", "s")
    found = compare(a, b)
    assert list(found["kinds"]) == ["camera", "noise"]
    assert (found["kinds"]["camera"]["only_a"], found["kinds"]["camera"]["only_b"]) == (1, 2)
    assert found["kinds"]["noise"]["p_value"] == pytest.approx(0.125)
    assert "| noise | 100.0% | 0.0% | 4 | 4 | 0 | 0.125 |" in comparison_to_markdown(found)
