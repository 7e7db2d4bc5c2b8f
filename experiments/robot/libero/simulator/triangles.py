"""Triangles that cannot change a pixel, left out of what a software renderer draws.

LIBERO's meshes have 300,000 triangles for a picture of 256 x 256 pixels: half of them face away, and most others lie
between the points of the pixels at which the renderer looks (its samples). Software renderers spend time on each. Those
that may touch a sample are selected here before a picture is drawn, in the order of the mesh, and MuJoCo draws them as
it always does: pictures stay the same bit for bit (a test compares).

Not obvious: every decision is on the safe side by `_SLACK`, and what is selected stays in use while nothing has moved
by more than a part of it on the picture, as furniture before a fixed camera.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

if TYPE_CHECKING:
    from mujoco import MjModel, MjrContext, MjvGeom, MjvGLCamera, MjvScene

# Pixels by which OpenGL may place a vertex elsewhere; llvmpipe rounds to 1/256.
_SLACK = np.float32(1 / 100)
_STILL = 1 / 400  # Pixels; less counts as unmoved.
_LARGE = np.float32(8)  # Pixels; triangles of such a side are drawn without a closer look.
_MIN_FACES = 100  # Smaller meshes are drawn as they are.
# Share of a mesh above which giving its triangles to OpenGL anew costs more than drawing all.
_MOST_KEPT = 0.3
SAMPLES = 4


def _compile(function: Any, **options: Any) -> Any:
    """Compile a kernel, once a machine where the result can be kept."""
    try:
        return numba.njit(cache=True, error_model="numpy", **options)(function)
    except RuntimeError:  # No folder to write to.
        return numba.njit(error_model="numpy", **options)(function)


def _project_points(vertices_V3, camera_34, x, y, depth):  # type: ignore[no-untyped-def]
    """Pixel coordinates and depth of every vertex; coordinates mean nothing behind the camera."""
    for i in range(len(vertices_V3)):
        a, b, c = vertices_V3[i, 0], vertices_V3[i, 1], vertices_V3[i, 2]
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


_touches = _compile(_touches_samples, inline="always")


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


_project, _select = _compile(_project_points), _compile(_select_faces)


@dataclass(frozen=True)
class _View:
    """Picture coordinates, in a camera or its reflection, of the points of a body.

    Attributes:
        matrix_34: homogeneous points to (x * depth, y * depth, depth) in pixels from the picture's lower left corner.
        limits: near plane, left, bottom, right, top of the part that matters, and 1, or -1 if mirrored.
    """

    matrix_34: np.ndarray
    limits: tuple[np.float32, ...]

    def of(self, pose_44: np.ndarray) -> _View:
        """The view of a body with this pose."""
        return _View(self.matrix_34 @ pose_44, self.limits)

    def pixels(self, points_N3: np.ndarray) -> np.ndarray:
        """Coordinates (2, N) of points; not numbers behind the near plane."""
        *xy, depth = self.matrix_34[:, :3] @ points_N3.T + self.matrix_34[:, 3:]
        return np.where(depth > self.limits[0], np.array(xy) / depth, np.nan)

    def misses(self, radius: float) -> bool:
        """Tell whether a ball around the body's origin cannot be seen in the part that matters."""
        x, y, depth = self.matrix_34[:, 3]
        near, left, bottom, right, top, _ = self.limits
        if depth - radius <= near:
            return bool(depth + radius < near)
        reach = 1.5 * radius * float(np.linalg.norm(self.matrix_34[:, :3], 2)) / (depth - radius)
        x, y = x / depth, y / depth
        return bool(x + reach < left or x - reach > right or y + reach < bottom or y - reach > top)


def _views(scene: MjvScene, size: int) -> list[_View]:
    """The camera's view of the world, then its reflections in the mirrors before it."""
    import mujoco

    camera = mujoco.mjv_averageCamera(*scene.camera)
    near, whole = np.float32(camera.frustum_near), _as_float32(0, 0, size, size)
    direct = _View(_matrix(camera, size), (near, *whole, np.float32(1)))
    views = [direct]
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
        seen, part = direct.pixels(center + sides_42 @ axes[:, :2].T), whole
        if min(geom.size[:2]) > 0 and np.isfinite(seen).all():  # Planes of size 0 are without end.
            edges = np.concatenate([seen.min(axis=1) - 1, seen.max(axis=1) + 1])
            part = _as_float32(*np.clip(edges, 0, size))
        views.append(_View(direct.matrix_34 @ reflection, (near, *part, np.float32(-1))))
    return views


def _as_float32(*numbers: float) -> tuple[np.float32, ...]:
    return tuple(map(np.float32, numbers))


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


class _Body:
    """One geom's mesh, and what is drawn of it.

    Attributes:
        views: those that the selection was made for.
        partly: whether a display list of a part is drawn, or all.
    """

    def __init__(self, model: MjModel, mesh: int) -> None:
        self.mesh = mesh
        faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
        self.faces_F3 = model.mesh_face[faces]
        self.corners = self.faces_F3, model.mesh_facenormal[faces], model.mesh_facetexcoord[faces]
        vertices = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
        self.vertices_V3 = model.mesh_vert[vertices]
        ends = self.vertices_V3.min(axis=0), self.vertices_V3.max(axis=0)
        self.box_83 = np.array(np.meshgrid(*zip(*ends, strict=True))).reshape(3, 8).T
        self.views: list[_View] = []
        self.partly = False

    def is_still(self, views: list[_View]) -> bool:
        """Tell whether the selection made before holds in these views."""
        return len(views) == len(self.views) and all(
            np.abs(now.pixels(self.box_83) - then.pixels(self.box_83)).max() < _STILL
            and np.abs(np.subtract(now.limits, then.limits)).max() < _STILL
            for now, then in zip(views, self.views, strict=True)
        )

    def select(self, views: list[_View], samples_42: np.ndarray) -> np.ndarray:
        """The faces (K,) that may be seen in one of the views."""
        keep_F = np.zeros(len(self.faces_F3), dtype=np.bool_)
        points = tuple(np.empty((3, len(self.vertices_V3)), dtype=np.float32))
        for view in views:
            _project(self.vertices_V3, view.matrix_34.astype(np.float32), *points)
            _select(self.faces_F3, points, view.limits, samples_42, keep_F)
        return np.flatnonzero(keep_F)


def triangle_filter(model: MjModel, context: MjrContext, scene: MjvScene, size: int) -> TriangleFilter | None:
    """Make a filter where leaving out triangles helps (in software) and changes no pixel; None elsewhere.

    It needs samples, back faces that are not drawn, no shadows, and numbers of display lists above MuJoCo's own.
    """
    from mujoco import mjtRndFlag
    from OpenGL import GL, error

    try:
        pays = b"llvmpipe" in (GL.glGetString(GL.GL_RENDERER) or b"") and context.offSamples == SAMPLES
        if not pays or not scene.flags[mjtRndFlag.mjRND_CULL_FACE] or model.light_castshadow.any():
            return None
        lists = GL.glGenLists(2 * model.ngeom * model.ncam)  # 0: OpenGL has none left.
        return TriangleFilter(model, context, size, lists) if lists > context.baseMesh else None
    except error.Error:
        return None


class TriangleFilter:
    """Lets MuJoCo draw the triangles that may be seen.

    Args:
        model: compiled model; its mesh arrays are changed within :meth:`apply` and restored.
        context: MuJoCo's OpenGL context, current.
        size: side of the pictures in pixels.
        lists: first of the display lists to use, two for every geom and camera.
    """

    def __init__(self, model: MjModel, context: MjrContext, size: int, lists: int) -> None:
        from OpenGL import GL

        self._model, self._context, self._size, self._lists = model, context, size, lists
        places = [GL.glGetMultisamplefv(GL.GL_SAMPLE_POSITION, sample) for sample in range(SAMPLES)]
        self._samples_42 = np.array(places, dtype=np.float32)
        self._bodies: dict[int, _Body] = {}

    def apply(self, scene: MjvScene, camera_id: int) -> None:
        """Point every large mesh of a scene, updated for a camera, to a list of its triangles that may be seen."""
        world = _views(scene, self._size)
        for geom in self._large_meshes(scene):
            number = self._lists + 2 * (camera_id * self._model.ngeom + geom.objid)
            body = self._bodies.get(number) or _Body(self._model, geom.dataid // 2)
            self._bodies[number] = body
            pose_44 = np.eye(4)
            pose_44[:3, :3], pose_44[:3, 3] = geom.mat, geom.pos
            radius = float(self._model.geom_rbound[geom.objid])
            views = [view.of(pose_44) for view in world]
            views = [view for view in views if view.limits[-1] > 0 or not view.misses(radius)]
            if not body.is_still(views):
                faces = body.select(views, self._samples_42)
                body.views, body.partly = views, len(faces) <= _MOST_KEPT * len(body.faces_F3)
                if body.partly:
                    self._upload(body, faces, number)
            if body.partly:
                geom.dataid = number - self._context.baseMesh

    def _large_meshes(self, scene: MjvScene) -> Iterator[MjvGeom]:
        import mujoco

        for geom in scene.geoms[: scene.ngeom]:
            # Odd numbers are those of convex hulls.
            is_mesh = geom.type == mujoco.mjtGeom.mjGEOM_MESH and geom.dataid >= 0 and geom.dataid % 2 == 0
            if is_mesh and self._model.mesh_facenum[geom.dataid // 2] >= _MIN_FACES:
                yield geom

    def _upload(self, body: _Body, faces: np.ndarray, number: int) -> None:
        """Make an OpenGL display list of some faces of a mesh: for MuJoCo, they are for a moment all that it has."""
        import mujoco

        model, context, mesh, count = self._model, self._context, body.mesh, len(faces)
        replaced = [array[:count].copy() for array in body.corners]
        before = model.mesh_facenum[mesh], model.mesh_graphadr[mesh], context.baseMesh
        try:
            for array in body.corners:
                array[:count] = array[faces]
            model.mesh_facenum[mesh], model.mesh_graphadr[mesh] = count, -1  # Without its hull.
            context.baseMesh = (number - 2 * mesh) % 2**32
            mujoco.mjr_uploadMesh(model, context, mesh)
        finally:
            model.mesh_facenum[mesh], model.mesh_graphadr[mesh], context.baseMesh = before
            for array, rows in zip(body.corners, replaced, strict=True):
                array[:count] = rows
