"""Grasps of the scripted expert, from the shapes of a MuJoCo scene: one deterministic choice a scene.

Shapes are points in the world frame: meters, radians. A policy cloned from an expert that grasps now this way, now that
way learns neither (measured on libero_object task 3: 9 of 10, then 2 of 10 with more training). So every choice below
has a fixed order, ties included.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import ConvexHull

if TYPE_CHECKING:
    from mujoco import MjData, MjModel

_SPACING = 0.012
_BOX, _MESH, _CYLINDER, _SPHERE, _CAPSULE = 6, 7, 5, 2, 3
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


def _box_surface(half: np.ndarray) -> np.ndarray:
    """Points (P, 3) on the surface of a box, its corners among them, at most about `_SPACING` apart."""
    axes = [np.linspace(-h, h, max(2, int(np.ceil(2 * h / _SPACING)) + 1)) for h in half]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return grid[(np.abs(np.abs(grid) - half) < 1e-9).any(axis=1)]


def _round_surface(radius: float, half_height: float) -> np.ndarray:
    """Points (P, 3) on a cylinder around z."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)
    heights = np.linspace(-half_height, half_height, max(2, int(np.ceil(2 * half_height / _SPACING)) + 1))
    return np.concatenate([np.column_stack([ring, np.full(len(ring), z)]) for z in heights])


def _geom_points(model: MjModel, geom: int) -> np.ndarray:
    """Points (P, 3) of a collision shape in its own frame; none for planes."""
    kind, size = int(model.geom_type[geom]), model.geom_size[geom]
    if kind == _BOX:
        return _box_surface(size)
    if kind == _MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        return model.mesh_vert[first : first + model.mesh_vertnum[mesh]].astype(np.float64)
    if kind in (_CYLINDER, _CAPSULE):
        return _round_surface(size[0], size[1] + (size[0] if kind == _CAPSULE else 0.0))
    if kind == _SPHERE:
        return _round_surface(size[0], size[0])
    return np.zeros((0, 3))


class Scene:
    """Collision shapes by top-level body, at the positions that `data` holds now."""

    def __init__(self, model: MjModel, data: MjData) -> None:
        self._model, self._data = model, data
        self._geoms: dict[int, list[int]] = {}
        for geom in range(model.ngeom):
            if model.geom_contype[geom] or model.geom_conaffinity[geom]:
                self._geoms.setdefault(int(model.body_rootid[model.geom_bodyid[geom]]), []).append(geom)
        self._local = functools.lru_cache(maxsize=None)(lambda geom: _geom_points(model, geom))

    def root(self, body: str) -> int:
        """Id of the top-level body that `body` belongs to."""
        return int(self._model.body_rootid[self._model.body(body).id])

    def roots(self) -> list[int]:
        """Top-level bodies with collision shapes, the world (0) among them where it has any."""
        return sorted(self._geoms)

    def points(self, root: int) -> np.ndarray:
        """World points (P, 3) of a top-level body's collision shapes."""
        parts = [
            self._local(geom) @ self._data.geom_xmat[geom].reshape(3, 3).T + self._data.geom_xpos[geom]
            for geom in self._geoms.get(root, [])
        ]
        return np.concatenate(parts) if parts else np.zeros((0, 3))


def hull(points_xy: np.ndarray) -> np.ndarray:
    """Corners (H, 2) of the convex hull of points (P, 2)."""
    return points_xy[ConvexHull(points_xy, qhull_options="QJ").vertices]


def extent_along(points_xy: np.ndarray, angle: float) -> tuple[float, float]:
    """Smallest and largest coordinate of points (P, 2) along the direction `angle`."""
    along = points_xy @ np.array([np.cos(angle), np.sin(angle)])
    return float(along.min()), float(along.max())


def smallest_rectangle(points_xy: np.ndarray) -> tuple[np.ndarray, float, tuple[float, float]]:
    """Minimum-area rectangle around points (P, 2): center (2,), angle of its first side, lengths of both sides."""
    corners = hull(points_xy)
    edges = np.roll(corners, -1, axis=0) - corners
    # Rounded so that edges of one straight side, cut by numerical noise, do not compete.
    angles = np.unique(np.round(np.arctan2(edges[:, 1], edges[:, 0]) % (np.pi / 2), 4))
    best: tuple[float, float] | None = None
    for angle in angles:
        low_a, high_a = extent_along(corners, angle)
        low_b, high_b = extent_along(corners, angle + np.pi / 2)
        area = (high_a - low_a) * (high_b - low_b)
        if best is None or area < best[0] - 1e-7:
            best = (area, float(angle))
    assert best is not None
    angle = best[1]
    low_a, high_a = extent_along(corners, angle)
    low_b, high_b = extent_along(corners, angle + np.pi / 2)
    first = np.array([np.cos(angle), np.sin(angle)])
    second = np.array([-first[1], first[0]])
    center = first * (low_a + high_a) / 2 + second * (low_b + high_b) / 2
    return center, angle, (high_a - low_a, high_b - low_b)


def distance_to_rectangle(points_xy: np.ndarray, center: np.ndarray, angle: float, sides: tuple[float, float]) -> float:
    """Smallest distance of points (P, 2) to a rectangle, 0 inside it; infinite without points."""
    if not len(points_xy):
        return float("inf")
    along = np.array([np.cos(angle), np.sin(angle)])
    frame = np.stack([along, [-along[1], along[0]]])
    beyond = np.abs((points_xy - center) @ frame.T) - np.array(sides) / 2
    return float(np.linalg.norm(np.maximum(beyond, 0.0), axis=1).min())


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
