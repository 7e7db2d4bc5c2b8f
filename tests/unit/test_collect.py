"""Names of a collection and how the work is divided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.mini.collect import CollectConfig, _blocks
from experiments.mini.expert import derive_seed
from experiments.robot.libero.demonstrations import is_no_op


@pytest.mark.parametrize(
    ("tasks", "episodes", "workers"), [((1,), 5, 2), ((1, 4), 3, 2), ((1, 4, 6), 7, 2), ((0,), 1, 8)]
)
def test_work_is_covered_once(tasks: tuple[int, ...], episodes: int, workers: int) -> None:
    pieces = [(task, number) for task, numbers in _blocks(tasks, episodes, workers) for number in numbers]
    assert sorted(pieces) == [(task, number) for task in tasks for number in range(episodes)]


def test_identity_ignores_what_does_not_change_the_bytes(tmp_path: Path) -> None:
    base = CollectConfig(out=tmp_path)
    assert CollectConfig(suite="libero_goal", out=tmp_path).name == "libero_goal_no_noops"
    assert CollectConfig(out=tmp_path, workers=9, tasks="3", episodes=1).staging == base.staging
    assert CollectConfig(out=tmp_path, seed=1).staging != base.staging
    assert CollectConfig(out=tmp_path, image_size=64).staging != base.staging


def test_seeds_are_fixed_forever() -> None:
    assert derive_seed(0, "libero_object", 1, 0, 0) == 4067113132
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_no_op_is_upstreams() -> None:
    still = np.array([5e-5, 0, 0, 0, 0, 0, -1.0])
    assert is_no_op(still, None) and is_no_op(still, still)
    assert not is_no_op(still, np.array([0, 0, 0, 0, 0, 0, 1.0]))
    assert not is_no_op(np.array([2e-4, 0, 0, 0, 0, 0, -1.0]), still)
