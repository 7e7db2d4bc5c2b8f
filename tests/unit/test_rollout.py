from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.libero.rollouts import rollout
from experiments.robot.libero.rollouts.episode import EpisodeRunner
from experiments.robot.libero.rollouts.protocol import Episode, Protocol
from experiments.robot.libero.rollouts.result import EpisodeResult
from experiments.robot.libero.rollouts.rollout import MAX_ATTEMPTS, Rollouts, RolloutSettings, ask
from experiments.robot.libero.rollouts.workers import LocalWorker, ProcessWorker, make_workers
from experiments.robot.policy import Query
from prismatic.util.errors import UsageError
from tests.helpers.eval_helpers import IMAGE, LineEnv, LineEnvs, LinePolicy, PatientEnvs

PROTOCOL = Protocol(max_steps=20, settle_steps=2, open_loop_steps=8)


def episodes(*init_states: int, tasks: int = 1) -> list[Episode]:
    return [Episode("line", task_id, "reach the end", number, 7) for task_id in range(tasks) for number in init_states]


def roll(
    policy: Any, todo: list[Episode], workers: int = 1, folder: Path | None = None, **settings: Any
) -> dict[tuple[int, int], EpisodeResult]:
    make_runner = functools.partial(EpisodeRunner, PROTOCOL, LineEnvs(str(folder) if folder else None))
    found: list[EpisodeResult] = []
    chosen = RolloutSettings(**{"open_loop_steps": 8, **settings})
    Rollouts(policy, make_workers(workers, make_runner), found.append, chosen).run(todo)
    assert len({result.key for result in found}) == len(found) == len(todo)
    return {(result.task_id, result.init_state): result for result in found}


def test_success_ends_the_episode_inside_a_chunk() -> None:
    result = roll(LinePolicy(speed=0.375), episodes(0))[0, 0]
    assert (result.status, result.success, result.steps, result.error) == ("success", True, 11, None)


def test_the_step_limit_is_a_failure_and_cuts_the_last_chunk() -> None:
    result = roll(LinePolicy(speed=0.0), episodes(0))[0, 0]
    assert (result.status, result.success, result.steps) == ("failure", False, 20)


def test_only_queries_are_rendered_and_one_environment_serves_a_task(tmp_path: Path) -> None:
    policy = LinePolicy(speed=0.0)
    roll(policy, episodes(0, 1, tasks=2), folder=tmp_path)
    counts = {file.name.split(".")[0]: len(file.read_text()) for file in tmp_path.iterdir()}
    # 20 steps are 3 queries; 2 tasks x 2 episodes.
    assert counts == {"created": 2, "closed": 2, "observed": 12}
    assert policy.batches == [1] * 12


def test_processes_give_the_results_of_this_process() -> None:
    todo = episodes(0, 1, 2, tasks=2)
    alone, side_by_side = roll(LinePolicy(0.3), todo), roll(LinePolicy(0.3), todo, workers=3)
    assert {key: (one.status, one.steps) for key, one in alone.items()} == {
        key: (one.status, one.steps) for key, one in side_by_side.items()
    }


@pytest.mark.parametrize("part", ["creation", "reset"])
def test_creation_and_resets_overlap_with_the_steps_of_others(part: str, tmp_path: Path) -> None:
    """The environment of one task waits, in its creation or reset, until another process was asked twice."""
    make_runner = functools.partial(EpisodeRunner, PROTOCOL, PatientEnvs(str(tmp_path), part))
    found: list[EpisodeResult] = []
    workers = make_workers(2, make_runner)
    Rollouts(LinePolicy(0.0), workers, found.append, RolloutSettings(8)).run(episodes(0, tasks=2))
    ends = sorted((result.task_id, result.status, result.error) for result in found)
    assert ends == [(0, "failure", None), (1, "failure", None)]


def test_a_result_says_where_its_time_went() -> None:
    result = roll(LinePolicy(0.0), episodes(0))[0, 0]
    assert set(result.seconds) == {"creation", "reset", "rendering", "physics", "policy", "waiting"}
    assert all(spent >= 0 for spent in result.seconds.values())
    assert sum(result.seconds.values()) == pytest.approx(result.wall_time, abs=0.01)


def test_torch_gets_the_cores_that_the_workers_leave_over(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from experiments.robot.libero.rollouts import workers

    monkeypatch.setattr(workers, "available_cores", lambda: 8)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for count, expected in ((1, 4), (2, 4), (5, 3), (8, 1), (20, 1)):
            with workers.policy_threads(count):
                assert torch.get_num_threads() == expected
            assert torch.get_num_threads() == 4
        with workers.policy_threads(2, shares=2):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_waiting_environments_are_answered_as_one_batch() -> None:
    policy = LinePolicy(0.0)
    roll(policy, episodes(0, 1, 2, 3), workers=2, max_batch=1)
    assert set(policy.batches) == {1}

    make_runner = functools.partial(EpisodeRunner, PROTOCOL, LineEnvs())
    policy = LinePolicy(0.0)
    # In-process workers reply at once, so all of them wait whenever the policy is asked.
    workers = [LocalWorker(make_runner) for _ in range(3)]
    Rollouts(policy, workers, lambda result: None, RolloutSettings(open_loop_steps=8)).run(episodes(0, 1, 2))
    assert policy.batches == [3, 3, 3]


def test_an_episode_that_raises_is_an_error_and_the_next_gets_a_new_environment(tmp_path: Path) -> None:
    found = roll(LinePolicy(), episodes(0, LineEnv.RAISES, 1), folder=tmp_path)
    broken = found[0, LineEnv.RAISES]
    assert (broken.status, broken.success, broken.attempts) == ("error", None, 1)
    assert broken.error is not None and broken.error.startswith("RuntimeError: the arm fell off (eval_helpers.py:")
    assert found[0, 0].status == found[0, 1].status == "success"
    counts = {file.name.split(".")[0]: len(file.read_text()) for file in tmp_path.iterdir()}
    assert counts["created"] == counts["closed"] == 2


def test_a_worker_that_dies_is_replaced_and_its_episode_repeated(tmp_path: Path) -> None:
    found = roll(LinePolicy(), episodes(0, LineEnv.DIES_ONCE, 1), workers=2, folder=tmp_path)
    assert {result.status for result in found.values()} == {"success"}
    assert found[0, LineEnv.DIES_ONCE].attempts == 2


def test_an_episode_that_always_kills_its_worker_becomes_an_error() -> None:
    found = roll(LinePolicy(), episodes(LineEnv.DIES, 0, 1), workers=2)
    deadly = found[0, LineEnv.DIES]
    assert (deadly.status, deadly.attempts) == ("error", MAX_ATTEMPTS)
    assert deadly.error == "environment process died (SIGKILL), 3 times"
    assert found[0, 0].status == found[0, 1].status == "success"


def test_a_worker_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "MAX_ATTEMPTS", 2)  # Each takes the time that the other worker may need to start.
    found = roll(LinePolicy(), episodes(LineEnv.HANGS, 0), workers=2, timeout=12.0)
    assert found[0, LineEnv.HANGS].error == "environment process did not reply for 12 s, 2 times"
    assert found[0, 0].status == "success"


def test_environments_are_closed_when_the_run_is_interrupted(tmp_path: Path) -> None:
    class Interrupted:
        def act(self, queries: Sequence[Query]) -> np.ndarray:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll(Interrupted(), episodes(0, 1), workers=2, folder=tmp_path)
    names = [file.name for file in tmp_path.iterdir()]
    created = {name.split(".")[1] for name in names if name.startswith("created")}
    assert created and created == {name.split(".")[1] for name in names if name.startswith("closed")}


class Picky:
    """Answers queries at the start; the further ones as `answer` says."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def act(self, queries: Sequence[Query]) -> Any:
        return [np.ones((8, 7)) if query.state[0] == 0 else self.answer for query in queries]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.full((8, 7), np.nan), "not finite"),
        (np.ones((4, 7)), r"shape \(4, 7\)"),
        (np.ones((8, 14)), r"shape \(8, 14\)"),
        (TimeoutError("no answer within 2 s"), "^policy: TimeoutError: no answer within 2 s$"),
    ],
)
def test_an_unusable_answer_is_an_error_of_its_episode_alone(answer: object, message: str) -> None:
    queries = [Query(IMAGE, IMAGE, np.full(8, position), "go") for position in (0.0, 1.0, 0.0)]
    good, bad, also_good = ask(Picky(answer), queries, 8)
    assert isinstance(good, np.ndarray) and isinstance(also_good, np.ndarray)
    assert isinstance(bad, str) and re.search(message, bad)


def test_a_query_that_raises_does_not_take_its_batch_along() -> None:
    class Choosy(Picky):
        def act(self, queries: Sequence[Query]) -> Any:
            if any(query.state[0] for query in queries):
                raise ValueError("too far")
            return super().act(queries)

    queries = [Query(IMAGE, IMAGE, np.full(8, position), "go") for position in (0.0, 1.0)]
    good, bad = ask(Choosy(None), queries, 8)
    assert isinstance(good, np.ndarray)
    assert isinstance(bad, str) and bad.startswith("policy: ValueError: too far")


def test_too_few_answers_are_an_error() -> None:
    class Short:
        def act(self, queries: Sequence[Query]) -> np.ndarray:
            return np.zeros((0, 8, 7))

    (answer,) = ask(Short(), [Query(IMAGE, IMAGE, np.zeros(8), "go")], 8)
    assert isinstance(answer, str) and "0 chunks to 1 queries" in answer


def test_videos_are_written_for_the_chosen_episodes_only(tmp_path: Path) -> None:
    videos = {1: tmp_path / "one.mp4"}
    found = roll(LinePolicy(0.5), episodes(0, 1), video_path=lambda result: videos.get(result.init_state))
    assert found[0, 1].status == "success"
    assert [file.name for file in tmp_path.iterdir()] == ["one.mp4"]
    import imageio_ffmpeg

    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "one.mp4"))
    assert frames == 5 and seconds == pytest.approx(0.5, abs=0.01)  # start, and steps 2, 4, 6, 8 of 8


def test_what_the_user_has_to_mend_stops_the_run() -> None:
    class NoRenderer(LineEnvs):
        def __call__(self, episode: Episode, protocol: Protocol) -> LineEnv:
            raise UsageError("no off-screen renderer found")

    make_runner = functools.partial(EpisodeRunner, PROTOCOL, NoRenderer())
    with pytest.raises(UsageError, match="no off-screen renderer"):
        Rollouts(LinePolicy(), [LocalWorker(make_runner)], print, RolloutSettings(open_loop_steps=8)).run(episodes(0))


def test_children_get_one_thread_and_the_parents_settings_stay() -> None:
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    worker = ProcessWorker(functools.partial(EpisodeRunner, PROTOCOL, LineEnvs()))
    worker.close()
    assert os.environ.get("OPENBLAS_NUM_THREADS") == before
