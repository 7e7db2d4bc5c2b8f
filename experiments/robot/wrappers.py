"""Policies around a policy: one that answers the same bits in any company, and one that answers within a time limit.

Matrix products round differently for different shapes, so an answer from a batch of 3 and one from a batch of 4 differ
in the last bits, and a rollout may amplify that. With every forward of one shape it matters neither how many
environments run nor in which order they ask.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import ParamSpec, TypeAlias, TypeVar

import numpy as np

from experiments.robot.policy import Array, Policy, Query
from prismatic.util.errors import UsageError

P = ParamSpec("P")
T = TypeVar("T")
Answers: TypeAlias = Array | Sequence[Array | Exception]
FIXED_TEXT_TOKENS = 64  # All prompts of LIBERO fit.


class FixedShape:
    """`policy`, asked with exactly `batch` queries at a time; a batch that is not full is padded with copies.

    With a batch of more than one, the first call checks that an answer depends neither on its place nor on its
    companions, which holds for the usual kernels but is promised by none.

    Args:
        policy: if it has an attribute `text_tokens`, its prompts are padded to one length, too.

    Raises:
        UsageError: by :meth:`act`, when the check fails.
    """

    def __init__(self, policy: Policy, batch: int = 1) -> None:
        self._policy, self._batch, self._checked = policy, batch, batch == 1
        if batch > 1 and hasattr(policy, "text_tokens"):
            policy.text_tokens = FIXED_TEXT_TOKENS

    def act(self, queries: Sequence[Query]) -> list[Array | Exception]:
        """One answer for each query; see :class:`Policy`."""
        if not self._checked:
            self._check(queries[0])
            self._checked = True
        answers: list[Array | Exception] = []
        for start in range(0, len(queries), self._batch):
            part = queries[start : start + self._batch]
            answers += self._ask([*part, *[part[-1]] * (self._batch - len(part))])[: len(part)]
        return answers

    def _ask(self, queries: Sequence[Query]) -> list[Array | Exception]:
        answers = list(self._policy.act(queries))
        if len(answers) != len(queries):
            raise ValueError(f"policy answered {len(answers)} chunks to {len(queries)} queries")
        return answers

    def _check(self, query: Query) -> None:
        turned = [
            dataclasses.replace(
                query,
                image=np.rot90(query.image, 1 + place % 3).copy(),
                instruction=" ".join([query.instruction, *["now"] * place]),
                seed=query.seed + place,
            )
            for place in range(self._batch - 1)
        ]
        expected = np.asarray(self._ask([query] * self._batch)[0])
        for place in range(self._batch):
            answer = np.asarray(self._ask([*turned[:place], query, *turned[place:]])[place])
            if not np.array_equal(answer, expected):
                raise UsageError(
                    f"--deterministic: on this machine an answer depends on its place in a batch of {self._batch}; "
                    "accepted: --max_batch 1"
                )


def use_deterministic_kernels() -> None:
    """Ask torch for kernels that repeat themselves; to be called before CUDA is first used.

    On CPUs, with one thread: how many there are to share a sum changes its last bits.
    """
    import torch

    torch.set_num_threads(1)

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


class DaemonCall:
    """A daemon thread that performs one call at a time: a call that hangs does not keep the process from ending."""

    def __init__(self) -> None:
        self._work: Callable[[], None] | None = None
        self._wake = threading.Semaphore(0)
        threading.Thread(target=self._run, name="policy", daemon=True).start()

    def submit(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> Future[T]:
        """The result to come; submit the next call only when it is there."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(function(*arguments, **named))
            except BaseException as error:
                # Whatever it is, the thread that waits for the result has to see it.
                future.set_exception(error)

        self._work = work
        self._wake.release()
        return future

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            assert self._work is not None
            self._work()


class TimeLimited:
    """`policy`, whose answers come within `seconds` or are exceptions: one for each query of the batch.

    The policy is asked in a thread of its own. While it is still busy with a question that was given up, further ones
    wait for it, within their own limit.
    """

    def __init__(self, policy: Policy, seconds: float) -> None:
        self._policy, self._seconds = policy, seconds
        self._calls = DaemonCall()
        self._last: Future[Answers] | None = None

    def act(self, queries: Sequence[Query]) -> Answers:
        """The policy's answers, or a TimeoutError for each query."""
        late = TimeoutError(f"the policy did not answer within {self._seconds:g} s")
        if self._last is not None and not wait([self._last], timeout=self._seconds).done:
            return [late] * len(queries)
        self._last = self._calls.submit(self._policy.act, queries)
        if not wait([self._last], timeout=self._seconds).done:
            return [late] * len(queries)
        return self._last.result()
