"""Arms compared seed by seed: numbers by hand, and no comparison where there is none."""

from __future__ import annotations

import pytest

from experiments.reproduce.seeds import paired_by_seed


def test_numbers_by_hand() -> None:
    first = {0: 3.0, 1: 5.0, 2: 4.0, 3: 9.0}
    second = {0: 2.0, 1: 3.0, 2: 1.0, 3: 5.0, 8: 100.0}
    paired = paired_by_seed(first, second)
    assert paired is not None
    assert paired.differences == {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}
    assert (paired.mean, paired.deviation) == (2.5, pytest.approx(1.29099, abs=1e-5))
    # t(3) = 3.182446; all of 16 sign flips but two are nearer to 0.
    assert paired.interval == pytest.approx((2.5 - 3.182446 * 0.6454972, 2.5 + 3.182446 * 0.6454972), abs=1e-5)
    assert paired.p_value == pytest.approx(2 / 16)
    assert paired.text() == "+2.5 (0.4 to 4.6), p 0.12, 4 seeds"


def test_a_difference_of_both_signs_is_none() -> None:
    paired = paired_by_seed({0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0}, {0: 0.0, 1: 1.0, 2: 0.0, 3: 1.0})
    assert paired is not None and (paired.mean, paired.p_value) == (0.0, 1.0)


def test_one_seed_compares_nothing() -> None:
    assert paired_by_seed({0: 1.0, 1: 2.0}, {1: 1.0, 2: 1.0}) is None
