"""Thinned visual meshes, for fast drawing.

LIBERO's scenes have about 300,000 triangles, which is what a picture costs: fast drawing thins the visual meshes, on
the copy of the compiled model that is uploaded to OpenGL. Mass, inertia and collision shapes are compiled before and
belong to the physics model, so nothing that moves changes.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from prismatic.util.errors import UsageError

if TYPE_CHECKING:
    from mujoco import MjModel

KEEP_SHARE = 0.125
_TARGET_FACES = 1000  # At least so many, also of a mesh just large enough to be thinned.
_MIN_FACES = 1500  # Smaller meshes are drawn as they are.
_cache: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}


def thin_visual_meshes(model: MjModel, keep_share: float = KEEP_SHARE) -> None:
    """Reduce every large mesh of `model` to about `keep_share` of its triangles, in place; only for drawing.

    A mesh's slots in the model's arrays keep their place; the thinned mesh is shorter and fills their beginning.

    Raises:
        UsageError: the package fast-simplification is missing.
    """
    for mesh in range(model.nmesh):
        if model.mesh_facenum[mesh] >= _MIN_FACES:
            _thin(model, mesh, max(_TARGET_FACES, int(model.mesh_facenum[mesh] * keep_share)))


def _thin(model: MjModel, mesh: int, target_faces: int) -> None:
    first, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    rows = slice(first, first + count)
    uv_first = model.mesh_texcoordadr[mesh]
    vertices = model.mesh_vert[model.mesh_vertadr[mesh] : model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh]]
    corners = [model.mesh_face[rows].ravel(), model.mesh_facenormal[rows].ravel()]
    values = vertices[corners[0]]
    if uv_first >= 0:
        corners.append(model.mesh_facetexcoord[rows].ravel())
        uvs = model.mesh_texcoord[uv_first : uv_first + model.mesh_texcoordnum[mesh]]
        values = np.concatenate([values, uvs[corners[2]]], axis=1)
    places, looks = _simplify(values, target_faces)
    kept = len(places)
    model.mesh_face[first : first + kept] = corners[0][places]
    model.mesh_facenormal[first : first + kept] = corners[1][looks]
    if uv_first >= 0:
        model.mesh_facetexcoord[first : first + kept] = corners[2][looks]
    model.mesh_facenum[mesh] = kept


def _simplify(corners: np.ndarray, target_faces: int) -> tuple[np.ndarray, np.ndarray]:
    """Fewer triangles over the mesh's own corners: for position and for looks, rows of `corners`, int (F, 3) each.

    Corners (3 F, 3 or 5: position and texture coordinates, three rows a triangle) of equal position are welded and the
    surface simplified, so that no cracks open. Each new corner takes an old position nearby, and normal and texture
    coordinates of an old corner nearby that faces the same way: nothing has to be invented.
    """
    key = hashlib.sha256(corners.tobytes() + bytes(str(target_faces), "ascii")).digest()
    if key not in _cache:
        try:
            import fast_simplification
        except ImportError as error:
            raise UsageError(
                'render="fast" needs fast-simplification: pip install "rocket-vla[sim]", or use render="protocol"'
            ) from error
        from scipy.spatial import cKDTree

        points, first_row, point_of = np.unique(corners[:, :3], axis=0, return_index=True, return_inverse=True)
        new_points, new_triangles = fast_simplification.simplify(
            points.astype(np.float32), point_of.reshape(-1, 3).astype(np.int32), target_count=target_faces
        )
        places = first_row[cKDTree(points).query(new_points)[1]][new_triangles]
        a, b, c = places.T
        places = places[(a != b) & (b != c) & (a != c)]
        _cache[key] = places, _match_looks(corners[places, :3], corners)
    return _cache[key]


def _with_normals(points: np.ndarray, triangles: np.ndarray, weight: float) -> np.ndarray:
    """Points (F, 3) extended by their triangles' (F, 3, 3) unit normals times `weight`: (F, 6).

    Thin shells have two surfaces in nearly the same place; in this space they are far apart.
    """
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    return np.concatenate([points, weight * normals], axis=1)


def _match_looks(triangles: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Old corners (F, 3) for the looks of new triangles (F, 3 corners, 3): all from one chart, the nearest triangle's.

    A chart is a patch of the surface without a seam of the texture; across a seam the picture would smear.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    welded, weld_of = np.unique(corners, axis=0, return_inverse=True)
    old = weld_of.reshape(-1, 3)
    edges = (np.concatenate([old[:, 0], old[:, 1]]), np.concatenate([old[:, 1], old[:, 2]]))
    graph = coo_array((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(len(welded), len(welded)))
    chart_of = connected_components(graph, directed=False)[1][weld_of.ravel()]
    old_triangles = corners[:, :3].reshape(-1, 3, 3)
    weight = 0.1 * float(np.ptp(corners[:, :3], axis=0).max())
    old_centers = _with_normals(old_triangles.mean(axis=1), old_triangles, weight)
    new_centers = _with_normals(triangles.mean(axis=1), triangles, weight)
    new_charts = chart_of[3 * cKDTree(old_centers).query(new_centers)[1]]
    old_corners = _with_normals(corners[:, :3], np.repeat(old_triangles, 3, axis=0), weight)
    new_corners = _with_normals(triangles.reshape(-1, 3), np.repeat(triangles, 3, axis=0), weight).reshape(-1, 3, 6)
    result = np.empty(triangles.shape[:2], dtype=np.int64)
    for chart in np.unique(new_charts):
        members, selected = np.flatnonzero(chart_of == chart), new_charts == chart
        result[selected] = members[cKDTree(old_corners[members]).query(new_corners[selected])[1]]
    return result
