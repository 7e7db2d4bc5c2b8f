"""Which episodes and samples are chosen and held out, and how a validation's sums become means."""

from __future__ import annotations

import numpy as np
import pytest

from prismatic.training.validation import _means, validation_batches
from prismatic.vla.datasets.dataset import MixturePart
from prismatic.vla.datasets.episodes import choose_episodes, hold_out_episodes

INSTRUCTIONS = ["a"] * 20 + ["b"] * 10 + ["c"]
MIXTURE = (MixturePart("big", 0, 23, 1.0), MixturePart("small", 23, 5, 3.0))


def test_every_frame_once_and_no_batch_mixes_datasets() -> None:
    batches = validation_batches(MIXTURE, 4, seed=1)
    assert [number for number, _, _ in batches] == list(range(6 + 2))
    assert sorted(draw.frame for _, _, frames in batches for draw in frames) == list(range(28))
    for _, dataset, frames in batches:
        assert {draw.frame < 23 for draw in frames} == {dataset == "big"}
        assert {draw.epoch for draw in frames} == {0}
    assert batches == validation_batches(MIXTURE, 4, seed=1) != validation_batches(MIXTURE, 4, seed=2)
    names = [name for _, name, _ in batches]
    assert names.index("small") < names.index("big", 3)  # a time limit cuts off a bit of everything


def test_means_weigh_samples_not_processes() -> None:
    ranks = [
        {"big": {"num_samples": 3.0, "loss": 6.0}, "small": {"num_samples": 1.0, "loss": 10.0}},
        {"big": {"num_samples": 1.0, "loss": 4.0}},
        {},
    ]
    parts = {"big/num_samples": 4.0, "big/loss": 2.5, "small/num_samples": 1.0, "small/loss": 10.0}
    assert _means(ranks) == {"num_samples": 5.0, "loss": 4.0, **parts}
    assert _means([{"big": {"num_samples": 2.0, "loss": 3.0}}]) == {"num_samples": 2.0, "loss": 1.5}


@pytest.mark.parametrize(
    ("count", "part", "held"), [(20, 0.05, 1), (20, 0.5, 10), (2, 0.9, 1), (1, 0.5, 0), (9, 0.0, 0)]
)
def test_held_out_episodes(count: int, part: float, held: int) -> None:
    kept, out = hold_out_episodes(count, part, seed=5)
    assert len(out) == held and sorted([*kept, *out]) == list(range(count))
    again = hold_out_episodes(count, part, seed=5)
    assert kept.tolist() == again[0].tolist() and out.tolist() == again[1].tolist()


def test_all_episodes_in_order() -> None:
    assert choose_episodes(INSTRUCTIONS, 1.0, 3).tolist() == list(range(31))


@pytest.mark.parametrize(("fraction", "of_each"), [(0.1, (2, 1, 1)), (0.25, (5, 3, 1)), (0.5, (10, 5, 1))])
def test_every_instruction_keeps_its_part(fraction: float, of_each: tuple[int, ...]) -> None:
    chosen = choose_episodes(INSTRUCTIONS, fraction, 0)
    counts = [int(np.sum([INSTRUCTIONS[episode] == name for episode in chosen])) for name in "abc"]
    assert tuple(counts) == of_each


def test_smaller_parts_are_nested_and_seeds_differ() -> None:
    small, large = (set(choose_episodes(INSTRUCTIONS, fraction, 5).tolist()) for fraction in (0.1, 0.5))
    assert small < large
    assert set(choose_episodes(INSTRUCTIONS, 0.5, 6).tolist()) != large


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_refuses_other_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match="accepted"):
        choose_episodes(INSTRUCTIONS, fraction, 0)
