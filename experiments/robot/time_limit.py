"""A limit on how long a policy may take to answer: an evaluation goes on, and ends, with a policy that hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

from experiments.robot.policy import Policy, Query


class Asker:
    """A daemon thread that performs one call at a time: a call that hangs does not keep the process from ending."""

    def __init__(self) -> None:
        self._work: tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None = None
        self._wake = threading.Semaphore(0)
        threading.Thread(target=self._run, name="policy", daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """The result to come; submit the next call only when it is there."""
        future: Future[Any] = Future()
        self._work = (future, function, arguments)
        self._wake.release()
        return future

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            assert self._work is not None
            future, function, arguments = self._work
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                # Whatever it is, the thread that waits for the result has to see it.
                future.set_exception(error)


class TimeLimited:
    """`policy`, whose answers come within `seconds` or are exceptions: one for each query of the batch.

    The policy is asked in a thread of its own. While it is still busy with a question that was given up, further ones
    wait for it, within their own limit.
    """

    def __init__(self, policy: Policy, seconds: float) -> None:
        self._policy, self._seconds = policy, seconds
        self._asker = Asker()
        self._last: Future[Any] | None = None

    def act(self, queries: Sequence[Query]) -> Any:
        """What the policy answers, or a TimeoutError for each query."""
        late = TimeoutError(f"the policy did not answer within {self._seconds:g} s")
        if self._last is not None and not wait([self._last], timeout=self._seconds).done:
            return [late] * len(queries)
        self._last = self._asker.submit(self._policy.act, queries)
        if not wait([self._last], timeout=self._seconds).done:
            return [late] * len(queries)
        return self._last.result()
