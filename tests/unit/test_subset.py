from __future__ import annotations

import numpy as np
import pytest

from prismatic.vla.datasets.episodes import choose_episodes

INSTRUCTIONS = ["a"] * 20 + ["b"] * 10 + ["c"]


def test_all_episodes_in_order():
    assert choose_episodes(INSTRUCTIONS, 1.0, 3).tolist() == list(range(31))


@pytest.mark.parametrize(("fraction", "of_each"), [(0.1, (2, 1, 1)), (0.25, (5, 3, 1)), (0.5, (10, 5, 1))])
def test_every_instruction_keeps_its_part(fraction, of_each):
    chosen = choose_episodes(INSTRUCTIONS, fraction, 0)
    counts = [int(np.sum([INSTRUCTIONS[episode] == name for episode in chosen])) for name in "abc"]
    assert tuple(counts) == of_each


def test_smaller_parts_are_nested_and_seeds_differ():
    small, large = (set(choose_episodes(INSTRUCTIONS, fraction, 5).tolist()) for fraction in (0.1, 0.5))
    assert small < large
    assert set(choose_episodes(INSTRUCTIONS, 0.5, 6).tolist()) != large


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_refuses_other_fractions(fraction):
    with pytest.raises(ValueError, match="accepted"):
        choose_episodes(INSTRUCTIONS, fraction, 0)
