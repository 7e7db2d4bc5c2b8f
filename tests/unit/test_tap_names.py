"""Numbers of layers mean other places in the three paths of the ROCKET release; names mean one."""

from __future__ import annotations

import pytest

from rocket_align import tap_names
from rocket_align.config import PAPER_LAYERS

PI05 = (2, 3, 4, 5, 6, 7, 8, 9, 10, -1)  # the release's pi0.5 recipe, 18 blocks


def blocks(*indices: int) -> tuple[str, ...]:
    return tuple(f"block.{index}" for index in indices)


def test_openvla_states_end_before_the_last_block() -> None:
    """hidden_states[2] is after two blocks; -1 is index 31 of 33, the output of block 30."""
    assert tap_names(PAPER_LAYERS, 32, convention="openvla") == blocks(1, 3, 5, 7, 9, 11, 13, 15, 17, 30)
    assert tap_names("0,32", 32, convention="openvla") == ("embeddings", "final_norm")


def test_openpi_torch_states_end_after_the_final_norm() -> None:
    """19 states: inputs of blocks 0 to 17, then the prefix after the final norm."""
    assert tap_names(PI05, 18, convention="openpi-torch") == (*blocks(1, 2, 3, 4, 5, 6, 7, 8, 9), "final_norm")
    assert tap_names([0, 17, 18], 18, convention="openpi-torch") == ("embeddings", "block.16", "final_norm")


def test_openpi_jax_numbers_are_outputs_of_blocks() -> None:
    """18 states: 2 is after three blocks, -1 the last block's output without the norm."""
    assert tap_names(PI05, 18, convention="openpi-jax") == blocks(2, 3, 4, 5, 6, 7, 8, 9, 10, 17)


def test_blocks_is_the_default_and_names_need_no_convention() -> None:
    assert tap_names("0,-1,final_norm", 4) == ("block.0", "block.3", "final_norm")
    assert tap_names(["block.-1", "embeddings"], 4, convention="openvla") == ("block.3", "embeddings")
    assert tap_names(["vision.1", "vision.-2"], 6) == ("vision.1", "vision.4")


@pytest.mark.parametrize(
    ("spec", "convention", "message"),
    [
        ("layer.3", "blocks", "accepted: embeddings, block.k, final_norm"),
        ([4], "blocks", "found 4 in .4.; accepted: -4 to 3 for 4 blocks"),
        ([5], "openvla", "accepted: -5 to 4 for 4 blocks"),
        ("", "blocks", "layers: found none"),
        ([True], "blocks", "found True"),
        ([1], "released", "accepted: blocks, openvla, openpi-torch, openpi-jax"),
    ],
)
def test_what_is_no_place_is_refused(spec: object, convention: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tap_names(spec, 4, convention=convention)  # type: ignore[arg-type]
