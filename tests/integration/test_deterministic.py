"""The deterministic mode on the real simulator with the mini student: the plain loop's trajectories, bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.libero.rollouts.episode import EpisodeRunner
from experiments.robot.libero.rollouts.protocol import Episode, Protocol
from experiments.robot.libero.rollouts.result import EpisodeResult
from experiments.robot.libero.rollouts.rollout import Rollouts, RolloutSettings
from experiments.robot.libero.rollouts.workers import make_workers
from experiments.robot.policy import Query
from experiments.robot.wrappers import FixedShape
from prismatic.util.errors import UsageError
from tests.helpers.eval_helpers import RecordedLiberos
from tests.helpers.plain_rollout import plain_rollouts

pytest.importorskip("libero", reason="LIBERO is not installed")
pytestmark = pytest.mark.sim

PROTOCOL = Protocol(max_steps=12, image_size=64)


@pytest.fixture(scope="module")
def student(repo_root: Path) -> Any:
    from experiments.robot.libero.run_libero_eval import GenerateConfig
    from experiments.robot.openvla_utils import OpenVLAPolicy

    folder = str(repo_root / "experiments" / "mini" / "weights" / "student")
    config = GenerateConfig(pretrained_checkpoint=folder, task_suite_name="libero_object", device="cpu")
    return OpenVLAPolicy.from_checkpoint(folder, config, "")


def fixed_shape(student: Any, batch: int) -> FixedShape:
    """With a padded batch where this machine's kernels allow one (see the class), else with a batch of one."""
    probe = Query(*np.zeros((2, 64, 64, 3), dtype=np.uint8), np.zeros(8), "go")
    policy = FixedShape(student, batch)
    try:
        policy.act([probe])
    except UsageError:
        student.text_tokens = None
        return FixedShape(student, 1)
    return policy


def test_trajectories_are_those_of_the_plain_loop(student: Any, tmp_path: Path) -> None:
    """One worker; two workers and the other order; LIBERO's own environment in a plain loop: the same states."""
    from experiments.robot.libero.suites.tasks import get_task

    words = get_task("libero_object", 2).instruction
    todo = [Episode("libero_object", 2, words, number, 7) for number in range(3)]
    policy = fixed_shape(student, 2)
    expected = {key: np.array(result.states) for key, result in plain_rollouts(policy, todo, PROTOCOL).items()}
    assert all(len(states) == 12 for states in expected.values())
    assert not np.array_equal(*list(expected.values())[:2])
    for name, workers, order in (("alone", 1, todo), ("both", 2, todo[::-1])):
        (tmp_path / name).mkdir()
        make_runner = functools.partial(EpisodeRunner, PROTOCOL, RecordedLiberos(str(tmp_path / name)))
        found: list[EpisodeResult] = []
        Rollouts(policy, make_workers(workers, make_runner), found.append, RolloutSettings(8)).run(order)
        assert sorted((result.init_state, result.status) for result in found) == [(n, "failure") for n in range(3)]
        for (_, task_id, number), states in expected.items():
            assert np.array_equal(np.load(tmp_path / name / f"{task_id}-{number}.npy"), states), (name, number)


def test_the_default_mode_is_within_1e_5(student: Any) -> None:
    """Batches of whoever waits, instructions of several lengths, against a batch of one and a padded one."""
    rng = np.random.default_rng(0)
    words = (
        "pick up the milk and place it in the basket",
        "pick up the alphabet soup and place it in the basket",
        "go",
    )
    queries = [
        Query(*rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8), rng.normal(size=8), words[number % 3])
        for number in range(5)
    ]
    for batch in (1, 2, 4):
        policy = fixed_shape(student, batch)
        fixed = policy.act(queries)
        again = policy.act(queries[::-1])[::-1]
        assert all(np.array_equal(one, other) for one, other in zip(fixed, again))
        for size in (2, 3, 5):
            student.text_tokens = None
            usual = np.concatenate([student.act(queries[start : start + size]) for start in range(0, 5, size)])
            assert np.abs(usual - np.stack(fixed)).max() < 1e-5
    student.text_tokens = None


def test_a_prompt_that_is_too_long_is_said_so(student: Any) -> None:
    rng = np.random.default_rng(0)
    query = Query(*rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8), np.zeros(8), "turn " * 80)
    policy = FixedShape(student, batch=2)
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens; all were to have 64"):
        policy.act([query, dataclasses.replace(query, seed=1)])
    student.text_tokens = None
