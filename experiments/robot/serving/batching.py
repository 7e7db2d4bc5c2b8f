"""Requests of many clients, answered together: one thread owns the policy and takes what is waiting, up to a batch."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from experiments.robot.policy import Array, Query
from experiments.robot.serving.observation import Request

log = logging.getLogger(__name__)


class ServablePolicy(Protocol):
    """B queries in, action chunks (B, T, A) out, un-normalized with the statistics `unnorm_key`."""

    def act(self, queries: Sequence[Query], unnorm_key: str | None = None) -> Array: ...


class Overloaded(RuntimeError):
    """More requests are waiting than the server takes, or it is shutting down."""


class Batcher:
    """Hands requests to `policy` in batches of up to `max_batch`.

    The first request waits up to `max_wait_s` for others, so that one client alone loses only that. A batch that fails
    is repeated one by one: a request that breaks the policy spoils no other's answer.

    Args:
        max_queue: requests that may wait; more are refused at once instead of being answered too late.
    """

    def __init__(
        self, policy: ServablePolicy, *, max_batch: int = 16, max_wait_s: float = 0.003, max_queue: int = 256
    ) -> None:
        self.batch_sizes: dict[int, int] = {}
        self._policy, self._max_batch, self._max_wait_s = policy, max_batch, max_wait_s
        self._waiting: queue.Queue[tuple[Request, Future[Array]] | None] = queue.Queue(max_queue)
        self._closed = threading.Event()
        self._entrance = threading.Lock()  # Nobody gets in behind the back of `close`: it would wait forever.
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Array]:
        """The actions (T, A) to come; cancel the future when nobody waits. Raises Overloaded: full, or closed."""
        future: Future[Array] = Future()
        with self._entrance:
            if self._closed.is_set():
                raise Overloaded("the server is shutting down")
            try:
                self._waiting.put_nowait((request, future))
            except queue.Full:
                raise Overloaded(f"{self._waiting.maxsize} requests are waiting; try again later") from None
        return future

    def close(self) -> None:
        """Finish the batch that is running, refuse the rest and end the thread."""
        with self._entrance:
            self._closed.set()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)  # Wakes a thread that waits for work.
        self._thread.join()
        while not self._waiting.empty():
            left = self._waiting.get_nowait()
            if left is not None and left[1].set_running_or_notify_cancel():
                left[1].set_exception(Overloaded("the server is shutting down"))

    def _run(self) -> None:
        while not self._closed.is_set():
            batch = self._next_batch()
            by_key: dict[str, list[tuple[Request, Future[Array]]]] = {}
            for request, future in batch:
                if future.set_running_or_notify_cancel():
                    by_key.setdefault(request.unnorm_key, []).append((request, future))
            for key, group in by_key.items():
                self._answer(key, group)

    def _next_batch(self) -> list[tuple[Request, Future[Array]]]:
        first = self._waiting.get()
        if first is None:
            return []
        batch = [first]
        deadline = time.monotonic() + self._max_wait_s
        while len(batch) < self._max_batch:
            try:
                more = self._waiting.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if more is None:
                break
            batch.append(more)
        return batch

    def _answer(self, key: str, group: list[tuple[Request, Future[Array]]]) -> None:
        self.batch_sizes[len(group)] = self.batch_sizes.get(len(group), 0) + 1
        try:
            actions_BTA = self._policy.act([request.query for request, _ in group], key)
            answers = list(zip(group, actions_BTA, strict=True))  # A request without an answer would wait forever.
        except Exception as error:
            # Whatever a policy raises, the server goes on.
            if len(group) > 1:
                for member in group:
                    self._answer(key, [member])
                return
            log.exception("the policy failed on a request")
            group[0][1].set_exception(error)
            return
        for (_, future), actions_TA in answers:
            future.set_result(actions_TA)
