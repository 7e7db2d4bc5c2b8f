"""Selection of the triangles that may cover a sample of a picture, seen by a camera or in a mirror."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

if TYPE_CHECKING:
    from mujoco import MjvGLCamera, MjvScene

# Pixels by which OpenGL may place a vertex elsewhere: llvmpipe rounds to the nearest 1/256, float arithmetic differs by
# 1/10,000, and less than STILL counts as unmoved. With 1/700, pictures differ.
_SLACK = np.float32(1 / 300)
STILL = 1 / 4000
_LARGE = np.float32(8)  # Pixels; triangles of such a side are drawn without a closer look.
SAMPLES = 4


def compile_kernel(function: Any, *inlined: ModuleType, **options: Any) -> Any:
    """Compile a kernel; the result is kept on disk where a folder can be written.

    Args:
        function: kernel to compile.
        inlined: modules with kernels that it calls. Numba looks at the age of the function's own file alone, so what
            theirs say becomes part of the name by which the result is kept.
        options: of `numba.njit`.
    """
    for module in inlined:
        function.__qualname__ += "_" + hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()[:16]
    try:
        return numba.njit(cache=True, error_model="numpy", **options)(function)
    except RuntimeError:  # No folder to write to.
        return numba.njit(error_model="numpy", **options)(function)


def _project_points(vertices_3V, camera_34, x, y, depth):  # type: ignore[no-untyped-def]
    """Pixel coordinates and depth of every vertex; coordinates mean nothing behind the camera."""
    for i in range(vertices_3V.shape[1]):
        a, b, c = vertices_3V[0, i], vertices_3V[1, i], vertices_3V[2, i]
        along = camera_34[2, 0] * a + camera_34[2, 1] * b + camera_34[2, 2] * c + camera_34[2, 3]
        depth[i] = along
        x[i] = (camera_34[0, 0] * a + camera_34[0, 1] * b + camera_34[0, 2] * c + camera_34[0, 3]) / along
        y[i] = (camera_34[1, 0] * a + camera_34[1, 1] * b + camera_34[1, 2] * c + camera_34[1, 3]) / along


def _touches_samples(corners, margins, box, samples):  # type: ignore[no-untyped-def]
    """Tell whether a counterclockwise triangle may cover the first of any kind of sample right of and above the box's
    lower left corner; the only one of its kind if the box is smaller than a pixel."""
    ax, ay, bx, by, cx, cy = corners
    touched = False
    for sample in range(SAMPLES):
        px = np.ceil(box[0] - samples[sample, 0]) + samples[sample, 0]
        py = np.ceil(box[1] - samples[sample, 1]) + samples[sample, 1]
        touched |= (
            (px <= box[2])
            & (py <= box[3])
            & ((bx - ax) * (py - ay) - (by - ay) * (px - ax) >= -margins[0])
            & ((cx - bx) * (py - by) - (cy - by) * (px - bx) >= -margins[1])
            & ((ax - cx) * (py - cy) - (ay - cy) * (px - cx) >= -margins[2])
        )
    return touched


_touches = compile_kernel(_touches_samples, inline="always")


def _select_faces(faces_F3, points, limits, samples_42, keep_F):  # type: ignore[no-untyped-def]
    """Mark the faces that may cover a sample.

    points: x, y and depth of the vertices. limits: near plane, left, bottom, right, top of the part of the picture that
    matters, and 1, or -1 where triangles turn the other way, as in mirrors.
    """
    x, y, depth = points
    near, left, bottom, right, top, turn = limits
    for face in range(len(faces_F3)):
        a, b, c = faces_F3[face, 0], faces_F3[face, 1], faces_F3[face, 2]
        if turn < 0:
            b, c = c, b
        ax, ay, bx, by, cx, cy = x[a], y[a], x[b], y[b], x[c], y[c]
        x0, x1 = min(ax, min(bx, cx)) - _SLACK, max(ax, max(bx, cx)) + _SLACK
        y0, y1 = min(ay, min(by, cy)) - _SLACK, max(ay, max(by, cy)) + _SLACK
        area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
        if max(depth[a], max(depth[b], depth[c])) <= near:
            continue
        if min(depth[a], min(depth[b], depth[c])) <= near:
            keep_F[face] = True
            continue
        wide, high = x1 - x0, y1 - y0
        if (area < -_SLACK * (wide + high)) | (x1 < left) | (x0 > right) | (y1 < bottom) | (y0 > top):
            continue
        corners = (ax, ay, bx, by, cx, cy)
        # How much twice the area left of each side changes within the slack.
        margins = (
            _SLACK * (abs(bx - ax) + abs(by - ay)),
            _SLACK * (abs(cx - bx) + abs(cy - by)),
            _SLACK * (abs(ax - cx) + abs(ay - cy)),
        )
        touched = max(wide, high) > _LARGE
        column = x0
        while column <= x1 and not touched:
            row = y0
            while row <= y1 and not touched:
                touched = _touches(corners, margins, (column, row, x1, y1), samples_42)
                row += np.float32(1)
            column += np.float32(1)
        if touched:
            keep_F[face] = True


project, select = compile_kernel(_project_points), compile_kernel(_select_faces)


@dataclass(frozen=True)
class Views:
    """Picture coordinates of the world, seen by a camera (first) and in the mirrors before it.

    Attributes:
        matrices_v34: homogeneous points to (x * depth, y * depth, depth), pixels from the picture's lower left corner.
        limits_v6: near plane, left, bottom, right, top of the part that matters, and 1, or -1 if mirrored.
    """

    matrices_v34: np.ndarray
    limits_v6: np.ndarray

    def matrices(self, poses_n44: np.ndarray) -> np.ndarray:
        """Matrices (v, n, 3, 4) for points of bodies with these poses."""
        return self.matrices_v34[:, None] @ poses_n44

    def pixels(self, matrices_vn34: np.ndarray, points_n3p: np.ndarray) -> np.ndarray:
        """Coordinates (v, n, 2, p) of points of those bodies; not numbers behind the near plane."""
        places = matrices_vn34[..., :3] @ points_n3p + matrices_vn34[..., 3:]
        depth = np.where(places[:, :, 2:] > self.limits_v6[:, :1, None, None], places[:, :, 2:], np.nan)
        return places[:, :, :2] / depth

    def shows(self, pixels_vn2p: np.ndarray) -> np.ndarray:
        """Tell whether anything between such points may be in the parts that matter: bool (v, n)."""
        _, left, bottom, right, top, _ = self.limits_v6[:, :, None].swapaxes(0, 1)
        (x0, y0), (x1, y1) = (np.moveaxis(end(pixels_vn2p, axis=-1), -1, 0) for end in (np.min, np.max))
        return ~((x1 < left - 1) | (x0 > right + 1) | (y1 < bottom - 1) | (y0 > top + 1))


def scene_views(scene: MjvScene, size: int) -> Views:
    """The views of a scene that MuJoCo draws."""
    import mujoco

    camera = mujoco.mjv_averageCamera(*scene.camera)
    whole = np.array([0.0, 0, size, size])
    direct = _matrix(camera, size)
    matrices, limits = [direct], [(camera.frustum_near, *whole, 1.0)]
    mirrors = mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX
    for geom in scene.geoms[: scene.ngeom]:
        if geom.type not in mirrors or geom.reflectance == 0:
            continue
        axes, center = np.asarray(geom.mat, dtype=np.float64), np.asarray(geom.pos, dtype=np.float64)
        if geom.type == mujoco.mjtGeom.mjGEOM_BOX:  # The face in its direction z mirrors.
            center = center + geom.size[2] * axes[:, 2]
        if (camera.pos - center) @ axes[:, 2] < 0:
            continue
        reflection = np.eye(4)
        reflection[:3, :3] -= 2 * np.outer(axes[:, 2], axes[:, 2])
        reflection[:3, 3] = 2 * axes[:, 2] * (center @ axes[:, 2])
        sides_42 = np.array([(-1.0, -1), (-1, 1), (1, -1), (1, 1)]) * geom.size[:2]
        *xy, depth = direct[:, :3] @ (center + sides_42 @ axes[:, :2].T).T + direct[:, 3:]
        part = whole
        if min(geom.size[:2]) > 0 and min(depth) > camera.frustum_near:  # Planes of size 0 are without end.
            seen = np.array(xy) / depth
            part = np.clip(np.concatenate([seen.min(axis=1) - 1, seen.max(axis=1) + 1]), 0, size)
        matrices.append(direct @ reflection)
        limits.append((camera.frustum_near, *part, -1.0))
    return Views(np.array(matrices), np.array(limits))


def _matrix(camera: MjvGLCamera, size: int) -> np.ndarray:
    """World points to pixels and depth (3, 4), as `mjr_render` projects them."""
    forward, up = np.asarray(camera.forward, dtype=np.float64), np.asarray(camera.up, dtype=np.float64)
    half_height = (camera.frustum_top - camera.frustum_bottom) / 2
    halves = camera.frustum_width or half_height, half_height
    middles = camera.frustum_center, (camera.frustum_top + camera.frustum_bottom) / 2
    axes = np.cross(forward, up), up
    rows = [
        size / 2 * (camera.frustum_near / half * axis + (1 - middle / half) * forward)
        for axis, half, middle in zip(axes, halves, middles, strict=True)
    ]
    rotation_33 = np.array([*rows, forward])
    return np.column_stack([rotation_33, -rotation_33 @ camera.pos])
