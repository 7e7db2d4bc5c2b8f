"""The expert's choice of a grasp: where, which way, and always the same."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.mini.grasp import MAX_WIDTH, canonical_turn, distance_to_rectangle, plan_grasp, smallest_rectangle

NOTHING = np.zeros((0, 3))
HAND_YAW = -np.pi / 2


def box(size: tuple[float, float, float], center: tuple[float, float, float], yaw: float = 0.0) -> np.ndarray:
    """Points of a box's surface."""
    axes = [np.linspace(-side / 2, side / 2, 9) for side in size]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    grid = grid[(np.abs(np.abs(grid) - np.array(size) / 2) < 1e-9).any(axis=1)]
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    return grid @ turn.T + np.array(center)


def ring(radius: float, bottom: float, top: float) -> np.ndarray:
    """Points of an open cylinder around the origin."""
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    circle = np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)
    return np.concatenate([np.column_stack([circle, np.full(72, z)]) for z in np.linspace(bottom, top, 12)])


def same_line(yaw: float, other: float) -> bool:
    return bool(abs((yaw - other + np.pi / 2) % np.pi - np.pi / 2) < 1e-3)


@pytest.mark.parametrize("yaw", np.deg2rad([0, 20, 65, 90, 140]))
def test_closes_across_the_narrow_side(yaw: float) -> None:
    grasp = plan_grasp(box((0.12, 0.05, 0.1), (0.1, -0.2, 0.05), yaw), NOTHING, HAND_YAW)
    assert same_line(grasp.yaw, yaw + np.pi / 2)
    assert np.allclose(grasp.position, [0.1, -0.2, 0.065], atol=2e-3)
    assert np.deg2rad(-75) <= grasp.yaw - HAND_YAW < np.deg2rad(105)


def test_equivalent_turns_have_one_name() -> None:
    """Turning +90 or -90 degrees is the same grasp; numerical noise must not choose between them."""
    noise = np.deg2rad([-3.0, -1e-9, 0.0, 1e-9, 3.0])
    assert np.allclose([canonical_turn(np.pi / 2 + e, 0.0) for e in noise], np.pi / 2 + noise)
    assert np.allclose([canonical_turn(-np.pi / 2 + e, 0.0) for e in noise], np.pi / 2 + noise)


def test_round_objects_need_no_turn() -> None:
    grasp = plan_grasp(ring(0.03, 0.0, 0.1), NOTHING, HAND_YAW)
    assert grasp.yaw == pytest.approx(HAND_YAW)


def test_flat_objects_are_taken_at_half_height() -> None:
    assert plan_grasp(box((0.08, 0.04, 0.02), (0, 0, 0.01)), NOTHING, 0.0).position[2] == pytest.approx(0.01)


def test_wide_bowls_are_taken_by_the_rim() -> None:
    grasp = plan_grasp(ring(0.06, 0.0, 0.06), NOTHING, HAND_YAW)
    assert np.linalg.norm(grasp.position[:2]) == pytest.approx(0.054, abs=1e-3)
    assert grasp.position[2] == pytest.approx(0.042, abs=2e-3)
    radial = np.arctan2(grasp.position[1], grasp.position[0])
    assert same_line(grasp.yaw, radial)
    # Both ends of the hand's closing line need no turn: the one away from it, at +90 degrees, is always taken.
    assert radial == pytest.approx(np.pi / 2)


def test_a_neighbor_in_the_hands_way_turns_it() -> None:
    item = box((0.08, 0.043, 0.018), (0.046, -0.097, 0.009))
    neighbor = ring(0.033, 0.0, 0.075) + np.array([0.07, -0.2, 0.0])
    free, crowded = plan_grasp(item, NOTHING, HAND_YAW), plan_grasp(item, neighbor, HAND_YAW)
    assert same_line(free.yaw, HAND_YAW)
    assert not same_line(crowded.yaw, HAND_YAW)
    high = neighbor[neighbor[:, 2] > 0.034][:, :2]
    straight = distance_to_rectangle(high, free.position[:2], free.yaw, (0.21, 0.066))
    assert crowded.clearance > straight + 0.005


def test_same_scene_same_grasp() -> None:
    rng = np.random.default_rng(0)
    obstacles = rng.uniform(-0.3, 0.3, (200, 3))
    item = box((0.06, 0.06, 0.1), (0, 0, 0.05), 0.3)
    first, again = plan_grasp(item, obstacles, HAND_YAW), plan_grasp(item, obstacles[::-1], HAND_YAW)
    assert np.array_equal(first.position, again.position) and first.yaw == again.yaw


def test_smallest_rectangle() -> None:
    points = box((0.09, 0.03, 0.1), (0.5, -0.1, 0.0), np.deg2rad(30))[:, :2]
    center, angle, sides = smallest_rectangle(points)
    assert np.allclose(center, [0.5, -0.1], atol=1e-4)
    long_side = angle if sides[0] > sides[1] else angle + np.pi / 2
    assert same_line(long_side, np.deg2rad(30)) and sorted(sides) == pytest.approx([0.03, 0.09], abs=1e-4)
    assert min(sides) < MAX_WIDTH
