"""Many episodes against one policy: environments step side by side, the policy answers whoever waits as one batch.

A worker is in one of four states: idle, busy (a request is out), waiting (it has a query), or filming. The loop starts
idle workers, collects replies, asks the policy once for all that wait, and never blocks while somebody waits.

An episode ends as success, failure or error. Errors are: the simulator raised, the policy raised or answered something
unusable, or the worker's process died `MAX_ATTEMPTS` times on it. The run goes on after each of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.robot.libero.rollouts.episode import StepResult, WorkerReply, describe_error
from experiments.robot.libero.rollouts.protocol import Episode, EpisodeQueue, checked_chunk
from experiments.robot.libero.rollouts.result import EpisodeResult
from experiments.robot.libero.rollouts.workers import Worker, WorkerDied, close_workers, ready, seconds_left
from experiments.robot.policy import Policy, Query
from prismatic.util.errors import UsageError

MAX_ATTEMPTS = 3
_log = logging.getLogger(__name__)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RolloutSettings:
    """Organization of rollouts; none of it changes what an episode is.

    Attributes:
        open_loop_steps: actions of a chunk that are executed.
        max_batch: most queries the policy gets at once, 0 for no limit. With 1, results do not depend on the number
            of workers: a batch of another size may round differently.
        action_dim: numbers of an action.
        timeout: seconds after which a worker that does not reply counts as dead.
        video_path: file for an episode's video, or None for no video of it.
    """

    open_loop_steps: int
    max_batch: int = 0
    action_dim: int = 7
    timeout: float = 900.0
    video_path: Callable[[EpisodeResult], Path | None] = lambda result: None


@dataclass
class _Slot:
    """A worker and what it is doing."""

    worker: Worker
    episode: Episode | None = None
    state: StepResult | None = None  # set while it waits for the policy
    steps: int = 0
    busy: bool = False
    started: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # where the episode's time went
    deadline: float = 0.0
    task: tuple[str, int] | None = None

    def submit(self, timeout: float, request: str, *arguments: object) -> None:
        self.busy, self.state, self.deadline = True, None, time.monotonic() + timeout
        self.worker.submit(request, *arguments)

    def spend(self, seconds: Mapping[str, float]) -> None:
        for part, more in seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + more


class Rollouts:
    """Runs episodes to their ends. `on_result` is called with each result, in the order in which they finish."""

    def __init__(
        self,
        policy: Policy,
        workers: Sequence[Worker],
        on_result: Callable[[EpisodeResult], None],
        settings: RolloutSettings,
    ) -> None:
        self._policy, self._on_result, self._settings = policy, on_result, settings
        self._slots = [_Slot(worker) for worker in workers]
        self._deaths: dict[tuple[str, int, int], int] = {}
        self._queue = EpisodeQueue([])

    def run(self, episodes: Iterable[Episode]) -> None:
        """Run all episodes, then close the workers. Raises UsageError for what the user has to mend (no OpenGL)."""
        self._queue = EpisodeQueue(episodes)
        try:
            while self._round():
                pass
        finally:
            close_workers([slot.worker for slot in self._slots])

    def _round(self) -> bool:
        for slot in self._slots:
            if slot.episode is None and not slot.busy:
                self._start(slot)
        busy = [slot for slot in self._slots if slot.busy]
        if busy:
            self._collect(busy)
        waiting = [slot for slot in self._slots if slot.state is not None]
        if waiting:
            self._answer(waiting[: self._settings.max_batch or None])
        return bool(busy or waiting)

    def _start(self, slot: _Slot) -> None:
        slot.episode = self._queue.take(slot.task)
        if slot.episode is not None:
            slot.task = (slot.episode.suite, slot.episode.task_id)
            slot.started, slot.steps, slot.seconds = time.monotonic(), 0, {}
            slot.submit(self._settings.timeout, "begin", slot.episode)

    def _collect(self, busy: list[_Slot]) -> None:
        """Take in the replies that have come, waiting for one if the policy has nothing to do."""
        nobody_waits = all(slot.state is None for slot in self._slots)
        timeout = seconds_left([slot.deadline for slot in busy]) if nobody_waits else 0.0
        answered = ready([slot.worker for slot in busy], timeout)
        for slot in busy:
            if slot.worker in answered:
                self._receive(slot)
            elif time.monotonic() > slot.deadline:
                self._revive(slot, f"environment process did not reply for {self._settings.timeout:.0f} s")

    def _receive(self, slot: _Slot) -> None:
        try:
            reply = slot.worker.reply()
        except WorkerDied as death:
            self._revive(slot, str(death))
            return
        slot.busy = False
        slot.spend(reply.seconds)
        if reply.usage:
            raise UsageError(str(reply.error))
        if slot.episode is None:
            self._filmed(reply)
        elif reply.value is None:
            self._finish(slot, "error", reply.error)
        else:
            self._take_state(slot, reply.value)

    def _take_state(self, slot: _Slot, state: StepResult) -> None:
        slot.steps = state.steps
        if state.query is not None:
            slot.state = state
        else:
            self._finish(slot, "success" if state.success else "failure")

    def _answer(self, waiting: list[_Slot]) -> None:
        queries = [slot.state.query for slot in waiting if slot.state is not None and slot.state.query is not None]
        started = time.monotonic()
        answers = ask(self._policy, queries, self._settings.open_loop_steps, self._settings.action_dim)
        spent = {"policy": time.monotonic() - started}
        for slot, answer in zip(waiting, answers):
            slot.spend(spent)
            if isinstance(answer, str):
                self._finish(slot, "error", answer)
            else:
                slot.submit(self._settings.timeout, "advance", answer)

    def _finish(self, slot: _Slot, status: str, error: str | None = None) -> None:
        """Record the episode's end; its worker films it or becomes idle."""
        episode = slot.episode
        assert episode is not None
        slot.episode, slot.state = None, None
        wall_time = time.monotonic() - slot.started
        slot.spend({"waiting": max(0.0, wall_time - sum(slot.seconds.values()))})
        result = EpisodeResult(
            suite=episode.suite,
            task_id=episode.task_id,
            task=episode.task,
            init_state=episode.init_state,
            seed=episode.seed,
            status=status,
            success=None if status == "error" else status == "success",
            steps=slot.steps,
            error=error,
            wall_time=round(wall_time, 3),
            attempts=min(self._deaths.get(episode.key, 0) + 1, MAX_ATTEMPTS),
            seconds={part: round(spent, 4) for part, spent in slot.seconds.items()},
            kind=episode.kind,
            level=episode.level,
            task_name=episode.task_name,
        )
        self._on_result(result)
        path = self._settings.video_path(result) if status != "error" else None
        if path is not None:
            slot.submit(self._settings.timeout, "film", path)

    def _filmed(self, reply: WorkerReply) -> None:
        if reply.error is not None:
            _log.warning("a video could not be written: %s", reply.error)

    def _revive(self, slot: _Slot, reason: str) -> None:
        """Restart a dead worker; its episode goes back to the queue, or is an error after `MAX_ATTEMPTS`."""
        slot.worker.restart()
        slot.busy = False
        episode = slot.episode
        if episode is None:
            self._filmed(WorkerReply(error=reason))
            return
        deaths = self._deaths[episode.key] = self._deaths.get(episode.key, 0) + 1
        if deaths >= MAX_ATTEMPTS:
            self._finish(slot, "error", f"{reason}, {deaths} times")
        else:
            _log.warning("%s task %d init state %d: %s; repeating it", *episode.key, reason)
            slot.episode, slot.state = None, None
            self._queue.put_back(episode)


def ask(policy: Policy, queries: Sequence[Query], open_loop_steps: int, action_dim: int = 7) -> list[Array | str]:
    """The policy's chunk (T, A) for each query, or one line saying why there is none.

    When a batch raises, its queries are asked one by one, so that only those that cannot be answered are lost.
    """
    try:
        chunks = policy.act(queries)
        if len(chunks) != len(queries):
            raise ValueError(f"policy answered {len(chunks)} chunks to {len(queries)} queries")
    except UsageError:
        raise
    except Exception as error:
        if len(queries) == 1:
            return [f"policy: {describe_error(error)}"]
        return [ask(policy, [query], open_loop_steps, action_dim)[0] for query in queries]
    answers: list[Array | str] = []
    for chunk in chunks:
        if isinstance(chunk, Exception):
            answers.append(f"policy: {describe_error(chunk)}")
            continue
        try:
            actions_TA = checked_chunk(chunk, open_loop_steps, action_dim)
            answers.append(np.ascontiguousarray(actions_TA[:open_loop_steps]))
        except (ValueError, TypeError) as error:
            answers.append(str(error))
    return answers
