"""Where and how the scripted expert grasps: one deterministic choice a scene.

A policy cloned from an expert that grasps now this way, now that way learns neither (measured on libero_object task 3:
9 of 10, then 2 of 10 with more training). So every choice below has a fixed order, ties included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.mini.geometry import distance_to_rectangle, extent_along, smallest_rectangle

MAX_WIDTH = 0.074  # The gripper opens to 8 cm.
_ROUND = 1.12  # Widest over narrowest: below, any direction is as good.
_HAND = (0.21, 0.066)  # Along and across the closing direction.
_FINGER, _FINGER_OFFSET = (0.022, 0.022), 0.048
_CLEARANCE = 0.012
_CLEARANCE_COST = 100.0  # Per meter of missing clearance, against radians of rotation.
_SHIFT_COST = 10.0  # Per meter off the middle.
# Rotations are taken from this half-open range of half a turn: not symmetric, so that +90 and -90 degrees, which are
# the same grasp, always become +90.
_LOWEST_TURN = np.deg2rad(-75.0)


@dataclass(frozen=True)
class Grasp:
    """A grasp from above: `position` (3,) of the grip site and `yaw` of the closing direction, world frame."""

    position: np.ndarray
    yaw: float
    clearance: float


def canonical_turn(yaw: float, hand_yaw: float) -> float:
    """The rotation in [-75, 105) degrees that brings the closing direction from `hand_yaw` to `yaw` or opposite."""
    return (yaw - hand_yaw - _LOWEST_TURN) % np.pi + _LOWEST_TURN


def _clearance(position: np.ndarray, yaw: float, obstacles: np.ndarray) -> float:
    """Distance of hand and opened fingers to obstacle points (P, 3), meters."""
    near_hand = obstacles[obstacles[:, 2] > position[2] + 0.025]
    near_fingers = obstacles[obstacles[:, 2] > position[2] - 0.01]
    along = np.array([np.cos(yaw), np.sin(yaw)])
    distances = [distance_to_rectangle(near_hand[:, :2], position[:2], yaw, _HAND)]
    for side in (-1.0, 1.0):
        center = position[:2] + side * _FINGER_OFFSET * along
        distances.append(distance_to_rectangle(near_fingers[:, :2], center, yaw, _FINGER))
    return min(distances)


@dataclass(frozen=True)
class _Candidate:
    position: np.ndarray
    yaw: float
    cost: float  # In radians of rotation.


def _turned(position: np.ndarray, yaw: float, hand_yaw: float) -> _Candidate:
    return _Candidate(position, yaw, abs(canonical_turn(yaw, hand_yaw)))


def _best(candidates: list[_Candidate], hand_yaw: float, obstacles: np.ndarray) -> Grasp:
    """The candidate of least cost plus missing clearance; the earlier one on ties."""
    best: tuple[float, Grasp] | None = None
    for candidate in candidates:
        position, turn = candidate.position, canonical_turn(candidate.yaw, hand_yaw)
        clearance = _clearance(position, candidate.yaw, obstacles)
        cost = candidate.cost + _CLEARANCE_COST * max(0.0, _CLEARANCE - clearance)
        if best is None or cost < best[0] - 1e-6:
            best = (cost, Grasp(position, hand_yaw + turn, clearance))
    assert best is not None
    return best[1]


def plan_grasp(item: np.ndarray, obstacles: np.ndarray, hand_yaw: float) -> Grasp:
    """Grasp an object given by its surface points.

    Args:
        item: (P, 3) points of the object.
        obstacles: (Q, 3) points of everything else.
        hand_yaw: direction in which the fingers close now, radians.
    """
    bottom, top = item[:, 2].min(), item[:, 2].max()
    height = (bottom + top) / 2 if top - bottom < 0.03 else max(top - 0.035, bottom + 0.012)
    band = item[np.abs(item[:, 2] - height) < 0.015]
    if len(band) < 4:
        band = item
    center, angle, sides = smallest_rectangle(band[:, :2])
    position = np.array([*center, height])
    widths = [np.ptp(extent_along(band[:, :2], a)) for a in np.linspace(0, np.pi, 24, endpoint=False)]
    if max(widths) < MAX_WIDTH and max(widths) < _ROUND * min(widths):
        turns = sorted(np.deg2rad(np.arange(-75, 105, 15)), key=lambda turn: (abs(turn), turn))
        return _best([_turned(position, hand_yaw + turn, hand_yaw) for turn in turns], hand_yaw, obstacles)
    axes = [(sides[0], angle), (sides[1], angle + np.pi / 2)]
    narrow = [_turned(position, yaw, hand_yaw) for width, yaw in sorted(axes) if width < MAX_WIDTH]
    # The narrow side, unless it is hardly narrower than the other.
    if len(narrow) == 2 and min(sides) < 0.85 * max(sides):
        narrow = narrow[:1]
    if narrow:
        return _best(narrow + _askew(narrow, band[:, :2]), hand_yaw, obstacles)
    return _rim_grasp(item, obstacles, hand_yaw, top)


def _askew(grasps: list[_Candidate], band: np.ndarray) -> list[_Candidate]:
    """Second choices where a neighbor is in the hand's way: turned a little and nearer to one end of the object."""
    result = []
    for grasp in grasps:
        across = np.array([-np.sin(grasp.yaw), np.cos(grasp.yaw), 0.0])
        length = np.ptp(extent_along(band, grasp.yaw + np.pi / 2))
        for turn in np.deg2rad([0, 10, -10, 20, -20]):
            for shift in (0.0, 0.012, -0.012, 0.022, -0.022):
                if np.ptp(extent_along(band, grasp.yaw + turn)) < MAX_WIDTH and abs(shift) < length / 2 - 0.012:
                    cost = grasp.cost + abs(turn) + _SHIFT_COST * abs(shift)
                    result.append(_Candidate(grasp.position + shift * across, grasp.yaw + turn, cost))
    return result


def _rim_grasp(item: np.ndarray, obstacles: np.ndarray, hand_yaw: float, top: float) -> Grasp:
    """Take a bowl by its rim: one finger inside, the closing direction radial."""
    rim = item[item[:, 2] > top - 0.01][:, :2]
    center = (rim.min(axis=0) + rim.max(axis=0)) / 2
    radius = float(np.quantile(np.linalg.norm(rim - center, axis=1), 0.9)) - 0.006
    candidates = []
    # The first side of each pair, at hand_yaw + pi, is preferred since an equal cost does not replace it.
    for turn in sorted(np.deg2rad(np.arange(-75, 105, 15)), key=lambda turn: (abs(turn), turn)):
        for side in (np.pi, 0.0):
            yaw = hand_yaw + turn + side
            spot = center + radius * np.array([np.cos(yaw), np.sin(yaw)])
            candidates.append(_turned(np.array([*spot, top - 0.018]), yaw, hand_yaw))
    return _best(candidates, hand_yaw, obstacles)
