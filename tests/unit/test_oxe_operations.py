"""The operations that make actions and states, on numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prismatic.vla.datasets.oxe.operations import Assembly, Columns, Constant, Operation


def _column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([1.0, 0.5, 0.0, 0.5, 1.0], [1, 0, 0, 1, 1]),
        ([0.5, 0.5, 0.96], [1, 1, 1]),
        ([0.0, 0.4, 0.7], [0, 0.7, 0.7]),  # never settles: the last value
        ([0.95, 0.05], [0.05, 0.05]),  # neither counts as settled
    ],
)
def test_binarize(raw: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(Operation.BINARIZE(_column(*raw)), _column(*expected))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([0, 1, 0, -1, 0], [1, 0, 0, 1, 1]),
        ([0, -1, 0], [0, 1, 1]),
        ([0.1, -0.1], [1, 1]),  # too small to be commands
        ([1, 1], [0, 0]),
    ],
)
def test_relative(raw: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(Operation.RELATIVE(_column(*raw)), _column(*expected))


def test_euler() -> None:
    half = math.sqrt(0.5)
    quaternions = np.array([[0, 0, 0, 1], [half, 0, 0, half], [0, 0, half, half], [0, 0, 0, 0]], np.float32)
    expected = [[0, 0, 0], [math.pi / 2, 0, 0], [0, 0, math.pi / 2], [0, 0, 0]]
    np.testing.assert_allclose(Operation.TO_EULER(quaternions), expected, atol=1e-6)


def test_the_rest() -> None:
    assert Operation.CLIP(_column(-1, 0.3, 2)).ravel().tolist() == pytest.approx([0, 0.3, 1])
    assert Operation.INVERT(_column(0, 0.25, 1)).ravel().tolist() == [1, 0.75, 0]
    assert Operation.TO_NEXT(_column(1, 4, 2)).ravel().tolist() == [3, -2, 0]


def test_an_assembly_drops_first_steps_before_operations_and_last_steps_after() -> None:
    assembly = Assembly(
        action=(Columns("a")[1:].then(Operation.TO_NEXT, Operation.INVERT), Constant(7.0)),
        proprio=(Columns("s")[-1:], Columns("a")[:1]),
        drop_first=1,
        drop_last=1,
    )
    numbers = {
        "a": np.array([[0, 100], [1, 1], [2, 4], [3, 9]], np.float32),
        "s": np.array([[9, 0], [9, 10], [9, 20], [9, 30]], np.float32),
    }
    action, proprio = assembly(numbers)
    assert assembly.features == ("a", "s")
    assert action.tolist() == [[-2, 7], [-4, 7]] and action.dtype == np.float32
    assert proprio.tolist() == [[10, 1], [20, 2]]
    for steps in (1, 2):
        action, proprio = assembly({name: values[:steps] for name, values in numbers.items()})
        assert action.shape == (0, 2) and proprio.shape == (0, 2)
