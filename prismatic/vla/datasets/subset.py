"""A part of a dataset's episodes, for studies of how much data a method needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def choose_episodes(instructions: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """A random part of the episodes of every instruction, at least one of each; a smaller fraction is a subset of a
    larger one with the same seed.

    Args:
        instructions: the instruction of every episode (E).
        fraction: in (0, 1].

    Returns:
        the chosen episodes' numbers, ascending.

    Raises:
        ValueError: a fraction out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: {fraction} found; accepted: above 0, at most 1")
    order = np.random.default_rng(seed).permutation(len(instructions))
    chosen: list[int] = []
    for instruction in sorted(set(instructions)):
        episodes = [int(episode) for episode in order if instructions[episode] == instruction]
        # Rounded first: 0.1 * 30 is a hair above 3.
        chosen += episodes[: math.ceil(round(fraction * len(episodes), 9))]
    return np.array(sorted(chosen), dtype=np.int64)


def hold_out_episodes(count: int, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out) of `count` episodes: `part` of them, at least one, at random; both ascending.

    Nothing is held out of a single episode, or when `part` is 0.
    """
    held = min(max(round(part * count), 1), count - 1) if part > 0 else 0
    order = np.random.default_rng((seed, 8)).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])
