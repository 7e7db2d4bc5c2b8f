from __future__ import annotations

import time

import pytest

from experiments.robot.libero.rollouts.result import EvalProgress
from tests.helpers.episode_results import episode_result


def test_a_line_an_episode_with_rate_time_left_and_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two episodes in 60 seconds, eight to go; a success from before counts in the rate of success alone."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with EvalProgress(10, [episode_result(3, 0)]) as shown:
        clock[0] += 30
        shown.update(episode_result(3, 1, "failure", steps=90))
        clock[0] += 30
        shown.update(episode_result(3, 2, "error"))
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "[1/10] libero_goal task 3 init state 1: failure in 90 steps | "
        "success 1/2 = 50.0% (9-91%), 30.0 s/episode, 4:30 left"
    )
    assert second.startswith(
        "[2/10] libero_goal task 3 init state 2: error: boom | success 1/2 = 50.0% (9-91%), 1 errors"
    )
    assert second.endswith("30.0 s/episode, 4:00 left")
