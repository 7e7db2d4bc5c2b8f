"""Shapes of a MuJoCo scene as points in the world frame, for planning grasps: meters, radians."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from scipy.spatial import ConvexHull

_SPACING = 0.012
_BOX, _MESH, _CYLINDER, _SPHERE, _CAPSULE = 6, 7, 5, 2, 3


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


def _geom_points(model: Any, geom: int) -> np.ndarray:
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

    def __init__(self, model: Any, data: Any) -> None:
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
