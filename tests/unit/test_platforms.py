"""Platforms: their numbers, and how configurations name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from prismatic.util.errors import UsageError
from prismatic.vla import constants
from prismatic.vla.platforms import ALOHA, BRIDGE, LIBERO, NormalizationType, get_platform


def test_numbers_are_upstreams() -> None:
    numbers = [(p.chunk, p.action_dim, p.proprio_dim, p.normalization.value) for p in (LIBERO, ALOHA, BRIDGE)]
    assert numbers == [(8, 7, 8, "bounds_q99"), (25, 14, 14, "bounds"), (5, 7, 7, "bounds_q99")]
    assert (constants.NUM_ACTIONS_CHUNK, constants.ACTION_DIM, constants.PROPRIO_DIM) == (8, 7, 8)


def test_names_and_dictionaries() -> None:
    assert get_platform("LIBERO") is LIBERO and get_platform(ALOHA) is ALOHA
    assert get_platform(BRIDGE.to_dict()) == BRIDGE


def test_a_file_is_a_platform(tmp_path: Path) -> None:
    file = tmp_path / "my_arm.json"
    file.write_text('{"chunk": 10, "action_dim": 8, "proprio_dim": 8, "normalization": "bounds"}')
    arm = get_platform(str(file))
    assert (arm.name, arm.chunk, arm.action_dim, arm.proprio_dim) == ("my_arm", 10, 8, 8)
    assert arm.normalization is NormalizationType.BOUNDS
    stateless = tmp_path / "stateless.yaml"
    stateless.write_text("name: rover\nchunk: 4\naction_dim: 2\n")
    assert get_platform(str(stateless)).to_json() == {
        "name": "rover", "chunk": 4, "action_dim": 2, "proprio_dim": 0, "normalization": "bounds_q99",
    }  # fmt: skip
    file.write_text('{"chunk": 10, "width": 8}')
    with pytest.raises(UsageError, match=r"--platform: .*my_arm.json: found fields \['chunk', 'name', 'width'\]"):
        get_platform(str(file))
    with pytest.raises(UsageError, match=r"your_arm.json: no such file"):
        get_platform(str(tmp_path / "your_arm.json"))


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
