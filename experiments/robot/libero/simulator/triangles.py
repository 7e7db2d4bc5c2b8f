"""Triangles that cannot change a pixel, left out of what a software renderer draws.

LIBERO's meshes have 300,000 triangles for a picture of 256 x 256 pixels: half of them face away, and most others lie
between the points of the pixels at which the renderer looks (its samples). Software renderers spend time on each. Those
that may touch a sample are selected here before a picture is drawn, in the order of the mesh, and MuJoCo draws them
with the same OpenGL states: pictures stay the same bit for bit (a test compares).

Not obvious:
- Every decision is on the safe side by a slack, and what is selected stays in use while nothing has moved by more than
  a part of it on the picture, as furniture before a fixed camera.
- MuJoCo keeps meshes in OpenGL's display lists, which take long to make. What it draws from the scene's own arrays are
  flexes (deformable bodies), so parts of meshes are drawn as such. A flex has no pose: a geom before it, whose list is
  one command, leaves the mesh's pose on OpenGL's stack of matrices, and a geom after it takes it off.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from experiments.robot.libero.simulator.coverage import SAMPLES, STILL, Views, project, scene_views, select

if TYPE_CHECKING:
    from mujoco import MjModel, MjrContext, MjvGeom, MjvScene

_MIN_FACES = 100  # Smaller meshes are drawn as they are.
_MOST_TRIANGLES = 150_000  # Selected for one picture; meshes beyond are drawn as they are.
_OPAQUE = 0.995  # MuJoCo blends what is less opaque.
_MUJOCO = "3.3.7"  # Others may keep flexes or the stack otherwise: 3.17.0 ends in a segmentation fault.
# What says how a geom is drawn.
_GEOM_FIELDS = (
    *("type", "dataid", "objtype", "objid", "category", "matid", "texcoord", "segid", "size", "pos", "mat", "rgba"),
    *("emission", "specular", "shininess", "reflectance", "label", "camdist", "modelrbound", "transparent"),
)


class _Mesh:
    """A mesh of the model, and all that OpenGL gets of its triangles, as one row each.

    Attributes:
        faces_F3: indices of points, three a triangle.
        points_3V: places of vertices, each once: files repeat a vertex for every face.
        box_38: corners of the box around them.
        arrays: positions (F, 9), normals (F, 9) and texture coordinates (F, 6) of the triangles' corners.
    """

    def __init__(self, model: MjModel, mesh: int) -> None:
        rows = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
        vertices_V3 = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
        corners = (
            vertices_V3[model.mesh_face[rows]],
            model.mesh_normal[model.mesh_normaladr[mesh] + model.mesh_facenormal[rows]],
            model.mesh_texcoord[model.mesh_texcoordadr[mesh] + model.mesh_facetexcoord[rows]],
        )
        points_V3, point_V = np.unique(vertices_V3, axis=0, return_inverse=True)
        self.faces_F3 = point_V.ravel()[model.mesh_face[rows]].astype(np.int32)
        self.points_3V = np.ascontiguousarray(points_V3.T)
        ends = points_V3.min(axis=0), points_V3.max(axis=0)
        self.box_38 = np.array(np.meshgrid(*zip(*ends, strict=True))).reshape(3, 8)
        self.arrays = [values.reshape(len(self.faces_F3), -1) for values in corners]

    def select(self, matrices_v34: np.ndarray, limits_v6: np.ndarray, samples_42: np.ndarray) -> np.ndarray:
        """The faces (K,) that may be seen in one of the views."""
        keep_F = np.zeros(len(self.faces_F3), dtype=np.bool_)
        places = tuple(np.empty(self.points_3V.shape, dtype=np.float32))
        for matrix_34, limits in zip(matrices_v34.astype(np.float32), limits_v6.astype(np.float32), strict=True):
            project(self.points_3V, matrix_34, *places)
            select(self.faces_F3, places, tuple(limits), samples_42, keep_F)
        return np.flatnonzero(keep_F)


@dataclass
class _Selected:
    """Selection for a camera's last picture.

    Attributes:
        limits_v6: of the views.
        pixels_vg2p: where every geom's box was on it, not numbers where it was not drawn.
        faces: of the geoms.
    """

    limits_v6: np.ndarray
    pixels_vg2p: np.ndarray
    faces: dict[int, np.ndarray] = field(default_factory=dict)

    def same_views(self, views: Views) -> bool:
        """Tell whether the parts that matter are where they were."""
        now, then = views.limits_v6, self.limits_v6
        return now.shape == then.shape and bool(np.abs(now - then).max() < STILL)


def triangle_filter(model: MjModel, context: MjrContext, scene: MjvScene, size: int) -> TriangleFilter | None:
    """Make a filter where leaving out triangles helps (in software) and changes no pixel; None elsewhere.

    It needs the MuJoCo that it is tested with, samples, back faces that are not drawn, no shadows, and numbers of
    display lists above MuJoCo's own.
    """
    from mujoco import __version__, mjtRndFlag
    from OpenGL import GL, error

    if __version__ != _MUJOCO:
        return None
    try:
        pays = b"llvmpipe" in (GL.glGetString(GL.GL_RENDERER) or b"") and context.offSamples == SAMPLES
        if not pays or not scene.flags[mjtRndFlag.mjRND_CULL_FACE] or model.light_castshadow.any() or model.nflex:
            return None
        lists = GL.glGenLists(2)  # 0: OpenGL has none left.
        return TriangleFilter(model, context, size, lists) if lists > context.baseMesh else None
    except error.Error:
        return None


class TriangleFilter:
    """Lets MuJoCo draw the triangles that may be seen.

    Args:
        model: compiled model.
        context: MuJoCo's OpenGL context, current.
        size: side of the pictures in pixels.
        lists: first of two display lists to use.
    """

    def __init__(self, model: MjModel, context: MjrContext, size: int, lists: int) -> None:
        from OpenGL import GL

        self._model, self._size = model, size
        places = [GL.glGetMultisamplefv(GL.GL_SAMPLE_POSITION, sample) for sample in range(SAMPLES)]
        self._samples_42 = np.array(places, dtype=np.float32)
        # MuJoCo takes its matrix off the stack after each geom: one more stays on it, and one more is taken off.
        for number, command in enumerate((GL.glPushMatrix, GL.glPopMatrix)):
            GL.glNewList(lists + number, GL.GL_COMPILE)
            command()
            GL.glEndList()
        self._keep_pose, self._drop_pose = lists - context.baseMesh, lists + 1 - context.baseMesh
        large = (model.mesh_facenum >= _MIN_FACES) & (model.mesh_texcoordadr >= 0)  # MuJoCo bends others' normals.
        self._large = {int(mesh) for mesh in np.flatnonzero(large)}
        self._mesh = functools.cache(functools.partial(_Mesh, model))
        self._selected: dict[int, _Selected] = {}

    def new_scene(self, max_geoms: int) -> MjvScene:
        """Make a scene for the model with room for the selected triangles."""
        import mujoco

        flex = '<flex name="{}" dim="2" body="world" vertex="0 0 0 1 0 0 0 1 0" element="{}"/>'
        flexes = [flex.format(number, "0 1 2 ") for number in range(max(1, self._model.ngeom))]
        flexes[0] = flex.format(0, "0 1 2 " * (_MOST_TRIANGLES // 2))
        room = mujoco.MjModel.from_xml_string(f"<mujoco><deformable>{''.join(flexes)}</deformable></mujoco>")
        return mujoco.MjvScene(room, maxgeom=max_geoms + 2 * self._model.ngeom)

    def apply(self, scene: MjvScene, camera_id: int) -> None:
        """Replace every large mesh of a scene, updated for a camera, by its triangles that may be seen."""
        import mujoco

        targets = scene.flexface, scene.flexnormal, scene.flextexcoord
        parts: dict[int, int] = {}
        first, room = 0, len(scene.flexface) // 9
        for place, mesh, faces in self._select(scene, camera_id):
            end = first + len(faces)
            if end == first:
                scene.geoms[place].type = mujoco.mjtGeom.mjGEOM_NONE
            elif end <= room:
                for rows, target in zip(mesh.arrays, targets, strict=True):
                    np.take(rows, faces, axis=0, out=target.reshape(-1, rows.shape[1])[first:end], mode="clip")
                scene.flexfaceadr[len(parts)], scene.flexfaceused[len(parts)] = first, len(faces)
                parts[place], first = len(parts), end
        self._replace(scene, parts)

    def start(self) -> None:
        """Let the renderer's threads begin with what MuJoCo has drawn, which they else do when it is read."""
        from OpenGL import GL, error

        # The check after it finds what MuJoCo leaves behind, as for a mesh with texture coordinates and a cube texture.
        with contextlib.suppress(error.Error):
            GL.glFlush()

    def _select(self, scene: MjvScene, camera_id: int) -> Iterator[tuple[int, _Mesh, np.ndarray]]:
        """Place in the scene, mesh and faces to draw of every large mesh."""
        places, geoms, meshes = self._large_meshes(scene)
        if not places:
            return
        poses_n44 = np.tile(np.eye(4), (len(places), 1, 1))
        poses_n44[:, :3, :3] = [scene.geoms[place].mat for place in places]
        poses_n44[:, :3, 3] = [scene.geoms[place].pos for place in places]
        views = scene_views(scene, self._size)
        matrices_vn34 = views.matrices(poses_n44)
        pixels_vn2p = views.pixels(matrices_vn34, np.array([mesh.box_38 for mesh in meshes]))
        before = self._selected.get(camera_id)
        if before is None or not before.same_views(views):
            nowhere = np.full((len(views.limits_v6), self._model.ngeom, 2, 8), np.nan)
            before = self._selected[camera_id] = _Selected(views.limits_v6, nowhere)
        moves = np.abs(pixels_vn2p - before.pixels_vg2p[:, geoms]).max(axis=(0, 2, 3))
        shown_vn = views.shows(pixels_vn2p)
        for number in np.flatnonzero(~(moves < STILL)):
            matrices, shown = matrices_vn34[:, number], shown_vn[:, number]
            faces = meshes[number].select(matrices[shown], views.limits_v6[shown], self._samples_42)
            before.faces[geoms[number]] = faces
            before.pixels_vg2p[:, geoms[number]] = pixels_vn2p[:, number]
        for place, geom, mesh in zip(places, geoms, meshes, strict=True):
            yield place, mesh, before.faces[geom]

    def _large_meshes(self, scene: MjvScene) -> tuple[list[int], list[int], list[_Mesh]]:
        """Places in the scene, geoms and meshes of what is selected from."""
        import mujoco

        places, geoms, meshes = [], [], []
        for place, geom in enumerate(scene.geoms[: scene.ngeom]):
            # Odd numbers are those of convex hulls.
            if geom.type != mujoco.mjtGeom.mjGEOM_MESH or geom.dataid % 2 or geom.dataid // 2 not in self._large:
                continue
            if geom.rgba[3] >= _OPAQUE:
                places.append(place)
                geoms.append(geom.objid)
                meshes.append(self._mesh(geom.dataid // 2))
        return places, geoms, meshes

    def _replace(self, scene: MjvScene, parts: dict[int, int]) -> None:
        """Put flexes in the places of meshes, each between the geoms that set and remove its pose."""
        import mujoco

        geoms, place, target = scene.geoms, scene.ngeom, scene.ngeom + 2 * len(parts)
        scene.ngeom = target
        while place < target:  # From the last one, since all after a mesh move on.
            place -= 1
            if place not in parts:
                target -= 1
                _copy(geoms[place], geoms[target])
                continue
            target -= 3
            pose, flex, end = geoms[target : target + 3]
            _copy(geoms[place], flex)
            flex.type, flex.objid, flex.size[:] = mujoco.mjtGeom.mjGEOM_FLEX, parts[place], 0
            position, axes = flex.pos.astype(np.float64), flex.mat.astype(np.float64).ravel()
            for geom, number in ((pose, self._keep_pose), (end, self._drop_pose)):
                mujoco.mjv_initGeom(geom, mujoco.mjtGeom.mjGEOM_MESH, np.zeros(3), position, axes, flex.rgba)
                geom.dataid = number


def _copy(source: MjvGeom, target: MjvGeom) -> None:
    """Copy all of a scene's geom."""
    for name in _GEOM_FIELDS:
        value = getattr(source, name)
        if isinstance(value, np.ndarray):
            getattr(target, name)[:] = value
        else:
            setattr(target, name, value)
