"""Layer lists: parsing, counting from the end, refusals."""

from __future__ import annotations

import pytest

from rocket_align.layers import parse_layers, resolve_layers

PAPER = "2,4,6,8,10,12,14,16,18,-1"


def test_released_convention_counts_back_from_the_number_of_blocks() -> None:
    assert resolve_layers(PAPER, 32, convention="released")[-1] == 31
    assert resolve_layers("32", 32, convention="released") == (32,)


@pytest.mark.parametrize(("layer", "state"), [(-1, 31), (-2, 31), (-3, 30), (-32, 1), (-33, 0)])
def test_a_negative_student_layer_is_the_state_that_the_release_takes(layer: int, state: int) -> None:
    """It replaces -1 by the number of blocks less one and hands the others to Python, which counts all 33 states."""
    states = range(33)
    assert resolve_layers([layer], 32, convention="released") == (state,)
    assert state == states[31 if layer == -1 else layer]


def test_states_convention_counts_back_from_the_last_state() -> None:
    assert resolve_layers([0, -1], 32, convention="states") == (0, 32)


def test_python_convention_has_no_index_for_the_number_of_blocks() -> None:
    assert resolve_layers(PAPER, 24, convention="python")[-1] == 23
    with pytest.raises(ValueError, match="24"):
        resolve_layers("24", 24, convention="python")


@pytest.mark.parametrize("spec", ["2, 4,-1", [2, 4, -1], (2, 4, -1)])
def test_lists_and_comma_strings_mean_the_same(spec: str | list[int] | tuple[int, ...]) -> None:
    assert parse_layers(spec) == (2, 4, -1)


def test_nothing_means_no_layers() -> None:
    assert resolve_layers("", 32, convention="released") == ()
    assert resolve_layers([], 32, convention="python") == ()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("4,2", "ascending"),
        ("2,2", "twice"),
        ("31,-1", "twice"),
        ("2,33", "33"),
        ("2,-2,-1", "twice"),
        ("-2,5", "ascending"),
        ("-34,2", "-34"),
        ("2,x", "'x'"),
        ([1.5], "1.5"),
        ([True], "True"),
        ([None], "None"),
    ],
)
def test_refusals_are_one_line_that_names_the_value(spec: str | list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        resolve_layers(spec, 32, convention="released")
    assert "\n" not in str(refused.value)
    assert "accepted" in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "blocks"), [("16,6,13", (16, 6, 13)), ("2,2,2", (2, 2, 2)), ([-1, 0, -1, -24], (23, 0, 23, 0))]
)
def test_teacher_layers_come_in_any_order_and_repeat(spec: str | list[int], blocks: tuple[int, ...]) -> None:
    assert resolve_layers(spec, 24, convention="python") == blocks


def test_unknown_convention() -> None:
    with pytest.raises(ValueError, match="released, states, python"):
        resolve_layers("1", 4, convention="numpy")  # type: ignore[arg-type]
