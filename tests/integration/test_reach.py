"""Where the hand closes: the moment and the place, in the real simulator, and the command on the shipped student."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import analyze

pytest.importorskip("libero", reason="LIBERO is not installed")

from experiments.analysis.reach import Watch, summarize
from experiments.robot.libero.rollouts.protocol import Episode, Protocol
from experiments.robot.libero.suites.tasks import get_task
from experiments.robot.policy import Query

ROOT = Path(__file__).resolve().parents[2]
SUITE, TASK = "libero_object", 7
OPEN, CLOSE = 1.0, 0.0


class Scripted:
    """Moves forward, and closes the gripper for good at action number `closes`."""

    def __init__(self, closes: int) -> None:
        self._closes, self._asked = closes, 0

    def act(self, queries: Sequence[Query]) -> npt.NDArray[np.float64]:
        chunk = np.zeros((1, 8, 7))
        numbers = 8 * self._asked + np.arange(8)
        self._asked += 1
        chunk[0, :, 0] = 0.5
        chunk[0, :, 6] = np.where(numbers >= self._closes, CLOSE, OPEN)
        return chunk


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    """A watch over one task; episodes of 24 steps at most."""
    watch = Watch(Protocol(max_steps=24, image_size=64, render="fast"), SUITE, [TASK])
    yield watch
    watch.close()


def _episode(number: int = 0) -> Episode:
    return Episode(SUITE, TASK, get_task(SUITE, TASK).instruction, number, seed=0)


def test_an_episode_ends_with_the_first_closing_action(watch: Watch) -> None:
    early, late = watch.run(Scripted(3), _episode()), watch.run(Scripted(11), _episode())
    assert (early[:3], late[:3]) == ([TASK, 0, 4], [TASK, 0, 12])
    # Both start at one place and move at the same pace; the object lies where it lay.
    assert late[3] - early[3] > 0.02
    assert abs(late[4] - early[4]) < 0.005
    assert early[5:] == late[5:]


def test_a_hand_that_stays_open_has_no_step(watch: Watch) -> None:
    assert watch.run(Scripted(1000), _episode(1))[:3] == [TASK, 1, None]


def _rows(*hands: tuple[int, float, float]) -> list[list[object]]:
    """Two tasks, whose objects lie 20 cm apart."""
    objects = {0: (0.0, 0.0), 1: (0.2, 0.0)}
    return [[task, number, 30, x, y, *objects[task]] for number, (task, x, y) in enumerate(hands)]


def test_numbers_of_a_policy() -> None:
    knows = summarize(_rows((0, 0.01, 0.0), (1, 0.2, 0.01)))
    assert knows["miss"] == pytest.approx(0.01) and knows["near_share"] == 1.0
    assert knows["task_ignored"] == pytest.approx(0.05)  # 1 of the 10 cm to the middle, and 0
    ignores = summarize(_rows((0, 0.08, 0.02), (1, 0.08, 0.02)))
    assert ignores["task_ignored"] == pytest.approx((0.8 + 1.2) / 2) and ignores["near_share"] == 0.0
    one_place = summarize(_rows((0, 0.0, 0.0), (0, 0.0, 0.0), (1, 0.0, 0.0)))  # The first task's, in both.
    assert one_place["miss"] == pytest.approx(0.1)
    one_task = summarize(_rows((0, 0.03, 0.04)))
    assert one_task["task_ignored"] is None and one_task["miss"] == pytest.approx(0.05)


def test_open_hands_are_counted_apart() -> None:
    rows = _rows((0, 0.01, 0.0), (1, 0.5, 0.0))
    rows[1][2] = None
    found = summarize(rows)
    assert found["never_closed"] == 1 and found["miss"] == pytest.approx(0.01)
    assert summarize(rows[1:])["miss"] is None


def test_the_command_on_the_shipped_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"""--checkpoint {ROOT}/experiments/mini/weights/student --task_ids {TASK} --num_trials_per_task 1
        --max_steps 60 --env_img_res 128 --render fast --out_dir {tmp_path}"""
    with pytest.raises(SystemExit) as end:
        analyze.main(["reach", *flags.split()])
    assert end.value.code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "reach.json").read_text())
    (subject,) = report["subjects"]
    assert (subject["label"], subject["step"], len(subject["episodes"])) == ("student", 0, 1)
    assert "beside the object" in capsys.readouterr().out
    assert (tmp_path / "reach.png").stat().st_size > 5_000
