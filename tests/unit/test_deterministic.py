from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from experiments.robot.libero import run_libero_eval
from experiments.robot.libero.rollouts.plan import Plan
from experiments.robot.libero.rollouts.protocol import Protocol
from experiments.robot.policy import Query
from experiments.robot.wrappers import FIXED_TEXT_TOKENS, FixedShape, TimeLimited
from prismatic.util.errors import UsageError

IMAGE = np.zeros((4, 4, 3), dtype=np.uint8)


def queries(count: int) -> list[Query]:
    return [Query(IMAGE, IMAGE, np.full(8, float(number)), "go", seed=number) for number in range(count)]


class Echo:
    """Answers with the state; remembers the batch sizes; `drift` is added per place in the batch."""

    def __init__(self, drift: float = 0.0) -> None:
        self.drift, self.sizes = drift, []

    def act(self, asked: Sequence[Query]) -> list[Any]:
        self.sizes.append(len(asked))
        return [np.full((8, 7), query.state[0] + place * self.drift) for place, query in enumerate(asked)]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_every_forward_has_one_shape_and_every_query_its_answer(batch: int) -> None:
    echo = Echo()
    answers = FixedShape(echo, batch).act(queries(5))
    assert [answer[0, 0] for answer in answers] == [0, 1, 2, 3, 4]
    assert set(echo.sizes) == {batch}


def test_an_answer_that_depends_on_its_place_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--deterministic: .* its place in a batch of 3; accepted: --max_batch 1"):
        FixedShape(Echo(drift=1e-9), 3).act(queries(1))
    FixedShape(Echo(drift=1e-9), 1).act(queries(3))


def test_an_exception_for_one_query_stays_with_it() -> None:
    class Choosy(Echo):
        def act(self, asked: Sequence[Query]) -> list[Any]:
            return [
                ValueError("no") if query.state[0] == 1 else answer for query, answer in zip(asked, super().act(asked))
            ]

    first, second, third = FixedShape(Choosy(), 2).act(queries(3))
    assert isinstance(second, ValueError) and first[0, 0] == 0 and third[0, 0] == 2


def test_too_few_answers_are_an_error() -> None:
    class Short(Echo):
        def act(self, asked: Sequence[Query]) -> list[Any]:
            return super().act(asked)[:1]

    with pytest.raises(ValueError, match="1 chunks to 2 queries"):
        FixedShape(Short(), 2).act(queries(2))


def test_a_time_limit_does_not_hide_what_has_to_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of a checkpoint's policy are padded to one length, with --policy_timeout too."""

    class Loaded:
        text_tokens: int | None = None

        def act(self, queries: list[Query]) -> list[np.ndarray]:
            return [np.full((8, 7), query.seed, dtype=float) for query in queries]

    policy = Loaded()
    monkeypatch.setattr(run_libero_eval, "load_policy", lambda checkpoint, config, unnorm_key: policy)
    config = run_libero_eval.GenerateConfig(deterministic=True, max_batch=2, policy_timeout=20.0)
    ready = run_libero_eval._ready_policy(config, Plan(Protocol(220), (), cast(Any, object()), ""), None)
    assert isinstance(ready, TimeLimited) and policy.text_tokens == FIXED_TEXT_TOKENS
    assert len(ready.act(queries(3))) == 3
