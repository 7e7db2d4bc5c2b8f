"""Platforms: their numbers, and how configurations name them."""

from __future__ import annotations

import pytest

from prismatic.vla import constants
from prismatic.vla.platforms import ALOHA, BRIDGE, LIBERO, NormalizationType, get_platform


def test_numbers_are_upstreams() -> None:
    numbers = [(p.chunk, p.action_dim, p.proprio_dim, p.normalization.value) for p in (LIBERO, ALOHA, BRIDGE)]
    assert numbers == [(8, 7, 8, "bounds_q99"), (25, 14, 14, "bounds"), (5, 7, 7, "bounds_q99")]
    assert (constants.NUM_ACTIONS_CHUNK, constants.ACTION_DIM, constants.PROPRIO_DIM) == (8, 7, 8)


def test_names_and_dictionaries() -> None:
    assert get_platform("LIBERO") is LIBERO and get_platform(ALOHA) is ALOHA
    assert get_platform(BRIDGE.to_dict()) == BRIDGE


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'libero'"):
        get_platform("libre")
    with pytest.raises(ValueError, match="chunk is 0"):
        get_platform({**LIBERO.to_dict(), "chunk": 0})
    with pytest.raises(ValueError, match="platform: found fields"):
        get_platform({"name": "mine"})


def test_bounds() -> None:
    statistics = {"q01": 1, "q99": 2, "min": 0, "max": 3}
    assert NormalizationType.BOUNDS_Q99.bounds(statistics) == (1, 2)
    assert NormalizationType.BOUNDS.bounds(statistics) == (0, 3)
    with pytest.raises(ValueError, match="no bounds"):
        NormalizationType.NORMAL.bounds(statistics)
