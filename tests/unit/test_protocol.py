from __future__ import annotations

import numpy as np
import pytest

from experiments.robot.libero.rollouts import protocol
from experiments.robot.libero.rollouts.protocol import Episode, EpisodeQueue, Protocol, checked_chunk
from prismatic.util.errors import UsageError


def episode(task_id: int, init_state: int, seed: int = 7) -> Episode:
    return Episode("libero_spatial", task_id, "do it", init_state, seed)


def test_step_limits_are_those_of_published_numbers() -> None:
    published = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
    assert dict(protocol.MAX_STEPS) == published
    assert protocol.max_steps_for("libero_10_swap") == 520
    assert protocol.max_steps_for("libero_90") == 400


def test_unknown_suite_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"--task_suite_name.*did you mean 'libero_goal'"):
        protocol.max_steps_for("libero_gaol")


def test_defaults_are_the_standard_protocol() -> None:
    assert Protocol(220).is_standard
    assert (Protocol(220).settle_steps, Protocol(220).open_loop_steps, Protocol(220).image_size) == (10, 8, 256)
    assert not Protocol(220, render="fast").is_standard


def test_gripper_is_binarized_and_flipped() -> None:
    actions = np.array([[0.1, 0, 0, 0, 0, 0, 0.9], [0.1, 0, 0, 0, 0, 0, 0.2]])
    before = actions.copy()
    np.testing.assert_array_equal(protocol.to_env_action(actions)[:, -1], [-1.0, 1.0])
    np.testing.assert_array_equal(protocol.to_env_action(actions)[:, :-1], before[:, :-1])
    np.testing.assert_array_equal(actions, before)


@pytest.mark.parametrize(
    "chunk", [np.zeros((7, 7)), np.zeros((8, 6)), np.zeros(7), np.full((8, 7), np.nan), np.full((8, 7), "a"), None]
)
def test_unusable_chunks_are_refused(chunk: object) -> None:
    with pytest.raises(ValueError, match="policy answered"):
        checked_chunk(chunk, 8, 7)


def test_a_longer_chunk_is_accepted() -> None:
    assert checked_chunk(np.ones((25, 7), dtype=np.float32), 8, 7).dtype == np.float64


def test_query_seeds_depend_on_episode_seed_and_step() -> None:
    others = (episode(0, 0), episode(0, 1), episode(1, 0), episode(0, 0, seed=8))
    assert len({episode(0, 0).query_seed(8), *(other.query_seed(0) for other in others)}) == 5
    assert episode(0, 0).query_seed(8) == episode(0, 0).query_seed(8)


def test_workers_stay_with_their_task_and_spread_over_tasks() -> None:
    queue = EpisodeQueue([episode(task, number) for task in range(2) for number in range(3)])
    first, second = queue.take(None), queue.take(None)
    assert first is not None and second is not None
    assert {first.task_id, second.task_id} == {0, 1}
    assert [queue.take(("libero_spatial", 0)) for _ in range(2)] == [episode(0, 1), episode(0, 2)]
    helped = queue.take(("libero_spatial", 0))
    assert helped is not None and helped.task_id == 1
    assert len(queue) == 1


def test_an_episode_put_back_comes_next() -> None:
    queue = EpisodeQueue([episode(0, 0), episode(0, 1)])
    taken = queue.take(None)
    assert taken is not None
    queue.put_back(taken)
    assert queue.take(("libero_spatial", 0)) == taken
    assert queue.take(("libero_spatial", 0)) == episode(0, 1)
    assert queue.take(("libero_spatial", 0)) is None
