"""Thinned visual meshes for fast drawing: LIBERO's scenes have about 300,000 triangles, which is what a picture costs.

Works on the copy of a compiled model that is uploaded to OpenGL. Mass, inertia and collision shapes are compiled before
and belong to the physics model, so nothing that moves changes.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from prismatic.util.errors import UsageError

KEEP_SHARE = 0.125
_TARGET_FACES = 1000  # At least so many, also of a mesh just large enough to be thinned.
_MIN_FACES = 1500  # Smaller meshes are drawn as they are.
_cache: dict[bytes, np.ndarray] = {}


def thin_visual_meshes(model: Any, keep_share: float = KEEP_SHARE) -> None:
    """Reduce every large mesh of `model` to about `keep_share` of its triangles, in place; only for drawing.

    A mesh's slots in the model's arrays keep their place; the thinned mesh is shorter and fills their beginning.

    Raises:
        UsageError: the package fast-simplification is missing.
    """
    for mesh in range(model.nmesh):
        if model.mesh_facenum[mesh] >= _MIN_FACES:
            _thin(model, mesh, max(_TARGET_FACES, int(model.mesh_facenum[mesh] * keep_share)))


def _thin(model: Any, mesh: int, target_faces: int) -> None:
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
    chosen = _simplify(values, target_faces)
    kept = len(chosen)
    model.mesh_face[first : first + kept] = corners[0][chosen]
    model.mesh_facenormal[first : first + kept] = corners[1][chosen]
    if uv_first >= 0:
        model.mesh_facetexcoord[first : first + kept] = corners[2][chosen]
    model.mesh_facenum[mesh] = kept


def _simplify(corners: np.ndarray, target_faces: int) -> np.ndarray:
    """Fewer triangles over the mesh's own corners: rows of `corners`, int (F, 3).

    Corners (3 F, 3 or 5: position and texture coordinates, three rows a triangle) of equal value are welded; where the
    texture has a seam they differ, so that no triangle stretches across one. The simplified mesh's corners snap to the
    nearest old ones: no vertex, normal or texture coordinate has to be invented.
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

        welded, first_row, point_of = np.unique(corners, axis=0, return_index=True, return_inverse=True)
        points = welded[:, :3].astype(np.float32)
        triangles = point_of.reshape(-1, 3).astype(np.int32)
        new_points, new_triangles = fast_simplification.simplify(points, triangles, target_count=target_faces)
        snapped = cKDTree(points).query(new_points)[1][new_triangles]
        a, b, c = snapped.T
        _cache[key] = first_row[snapped[(a != b) & (b != c) & (a != c)]]
    return _cache[key]
