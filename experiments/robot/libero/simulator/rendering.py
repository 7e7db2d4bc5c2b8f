"""Off-screen cameras for a MuJoCo model: which OpenGL to use, color, metric depth and segmentation of fixed cameras.

Images come in the orientation of LIBERO's training data: robosuite's raw picture rotated by 180 degrees, which is the
upright picture mirrored left to right. Depth, segmentation and intrinsics use the same orientation.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes.util
import importlib
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from experiments.robot.libero.simulator.decimation import thin_visual_meshes
from experiments.robot.policy import Render
from prismatic.util.errors import UsageError
from prismatic.util.versions import package_version

if TYPE_CHECKING:
    from mujoco import MjData, MjModel

    from experiments.robot.libero.simulator.triangles import TriangleFilter

RENDER_MODES = get_args(Render)
# An upgrade to 4 in place leaves parts of it behind, which then fail to import.
ACCEPTED_MUJOCO = "3.3.7 (pip uninstall -y mujoco mujoco-core mujoco-studio, then pip install mujoco==3.3.7)"
APT_HINT = "apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri (or libosmesa6 for MUJOCO_GL=osmesa)"
_MAX_GEOMS = 1000
_COLLISION_GROUP, _VISUAL_GROUP, _OUT_OF_VIEW_GROUP = 0, 1, 5


def choose_renderer() -> str:
    """Set MUJOCO_GL, unless it is set, before MuJoCo is imported: EGL, else OSMesa. Raises UsageError without them."""
    version = package_version("mujoco") or ""
    if version and int(version.split(".")[0]) >= 4:
        raise UsageError(f"mujoco {version} found; accepted: {ACCEPTED_MUJOCO}")
    # Mesa's software renderer and triton, which torch imports late, both bring an LLVM: with Mesa's loaded first,
    # importing triton is a segmentation fault.
    with contextlib.suppress(ImportError):
        importlib.import_module("triton._C.libtriton")
    device = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if device is not None and not device.isdigit():
        raise UsageError(f"MUJOCO_EGL_DEVICE_ID: found {device!r}; accepted: a number of EGL's devices, from 0")
    chosen = os.environ.get("MUJOCO_GL", "").lower().strip()
    if chosen in ("egl", "osmesa", "glfw", "cgl", "wgl"):
        return chosen
    for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = name
            return name
    raise UsageError(f"no off-screen renderer found (neither EGL nor OSMesa); install one: {APT_HINT}")


def gl_settings() -> str:
    """The environment variables that decide who draws, as in "MUJOCO_GL=egl"."""
    names = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM", "CUDA_VISIBLE_DEVICES")
    return ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def import_robosuite() -> None:
    """Import robosuite without a guard of its that does not concern the cameras here.

    It refuses a MUJOCO_EGL_DEVICE_ID that is not in CUDA_VISIBLE_DEVICES, though the one is a number of EGL's, which
    counts the devices it sees, and the other one of CUDA's.
    """
    device = os.environ.pop("MUJOCO_EGL_DEVICE_ID", None)
    try:
        importlib.import_module("robosuite")
    finally:
        if device is not None:
            os.environ["MUJOCO_EGL_DEVICE_ID"] = device


def _draw_on_own_gpu(rank: int) -> None:
    """Let MuJoCo draw on the GPU of this rank of a distributed run: by itself it takes the first GPU in every process.

    Does nothing with a single GPU, with software rendering, or where MUJOCO_EGL_DEVICE_ID says which one to take.
    """
    if "MUJOCO_EGL_DEVICE_ID" in os.environ:
        return
    from mujoco import egl
    from OpenGL.EGL import EGL_EXTENSIONS
    from OpenGL.EGL.EXT.device_query import eglQueryDeviceStringEXT

    if not eglQueryDeviceStringEXT:  # An EGL that cannot tell what its devices are.
        return
    devices = egl.EGL.eglQueryDevicesEXT()
    about = [eglQueryDeviceStringEXT(device, EGL_EXTENSIONS) or b"" for device in devices]
    gpus = [place for place, extensions in enumerate(about) if b"EGL_MESA_device_software" not in extensions]
    for turn in range(len(gpus) if len(gpus) > 1 else 0):
        os.environ["MUJOCO_EGL_DEVICE_ID"] = str(gpus[(rank + turn) % len(gpus)])
        # A GPU that belongs to another job may be listed, but does not start.
        if egl.create_initialized_egl_device_display() != egl.EGL.EGL_NO_DISPLAY:
            return
    os.environ.pop("MUJOCO_EGL_DEVICE_ID", None)


@dataclass(frozen=True)
class CameraView:
    """Geometry of one camera's image at one moment.

    Attributes:
        depth: float32 (H, W), meters along the optical axis; the far plane where nothing was hit.
        segmentation: int32 (H, W, 2), MuJoCo object id and object type per pixel, -1 for the background.
        intrinsics: float64 (3, 3); pixel centers at half integers. fx is negative since images are mirrored.
        camera_to_world: float64 (4, 4), camera axes right, down, forward (before the mirroring).
    """

    depth: np.ndarray
    segmentation: np.ndarray
    intrinsics: np.ndarray
    camera_to_world: np.ndarray


def _release(holder: dict[str, Any]) -> None:
    """Free the MuJoCo context, then OpenGL's; safe to run twice."""
    for name in ("mujoco", "gl"):
        context = holder.pop(name, None)
        if context is not None:
            if name == "mujoco" and "gl" in holder:
                holder["gl"].make_current()
            context.free()


def geoms_out_of_view(model: MjModel, data: MjData, camera_id: int) -> np.ndarray:
    """Geoms that cannot change a pixel of the square picture of a camera: bool (number of geoms,).

    Those whose bounding sphere lies outside its pyramid of sight, as do the reflections in all mirrors in view. A
    third to two thirds of the triangles before a wrist camera are such, and software renderers spend time on each.
    None when a light casts shadows, which may fall into the picture from outside.
    """
    if model.light_castshadow.any():
        return np.zeros(model.ngeom, dtype=bool)
    bounded = model.geom_rbound > 0  # Planes have no bounds.
    out = bounded & _outside(data.geom_xpos, model, data, camera_id)
    for mirror in np.flatnonzero(_mirrors(model) & ~out):
        axes = data.geom_xmat[mirror].reshape(3, 3).T
        for normal, size in zip(axes, model.geom_size[mirror]):
            for side in (size, -size):  # MuJoCo mirrors one face of a box; all six are on the safe side.
                heights = (data.geom_xpos - data.geom_xpos[mirror]) @ normal - side
                out &= _outside(data.geom_xpos - 2 * heights[:, None] * normal, model, data, camera_id)
    return out


def _outside(centers: np.ndarray, model: MjModel, data: MjData, camera_id: int) -> np.ndarray:
    """Tell whether the geoms' bounding spheres, put at `centers` (G, 3), lie outside a camera's pyramid of sight."""
    right, up, back = ((centers - data.cam_xpos[camera_id]) @ data.cam_xmat[camera_id].reshape(3, 3)).T
    half = np.deg2rad(model.cam_fovy[camera_id]) / 2
    radius = 1.01 * model.geom_rbound + 1e-3
    return np.maximum(np.maximum(abs(right), abs(up)) * np.cos(half) + back * np.sin(half), back) > radius


def _mirrors(model: MjModel) -> np.ndarray:
    """Geoms that MuJoCo may draw reflections on: planes and boxes of a reflecting material."""
    import mujoco

    flat = np.isin(model.geom_type, (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX))
    shines = np.append(model.mat_reflectance, 0.0)[model.geom_matid] > 0  # Material -1: none.
    return flat & shines & (model.geom_group == _VISUAL_GROUP)


class Cameras:
    """Renders fixed cameras of `model` at `size` x `size` pixels.

    `render` "protocol" draws as robosuite does; "fast" turns multisampling and shadows off and draws thinned meshes,
    which changes pixels a little (never the physics) and costs a fraction of the time.

    Raises:
        UsageError: no OpenGL context can be made.
    """

    def __init__(self, model: MjModel, size: int, render: str) -> None:
        import mujoco
        from mujoco.gl_context import GLContext

        if GLContext is None:
            raise UsageError(f"MUJOCO_GL={os.environ.get('MUJOCO_GL')}: rendering is switched off; unset it or use egl")
        self._mujoco, self._model, self.size = mujoco, model, size
        drawn = copy.copy(model)  # What is uploaded to OpenGL, 300 MB for a moment; the physics model stays as it is.
        # No larger than the picture: clearing and resolving the samples of the files' 640 x 480 costs milliseconds.
        drawn.vis.global_.offwidth = drawn.vis.global_.offheight = size
        if render == "fast":
            drawn.vis.quality.offsamples = 0
            drawn.vis.quality.shadowsize = 0
            thin_visual_meshes(drawn)
        self._holder: dict[str, Any] = {}
        self._finalizer = weakref.finalize(self, _release, self._holder)
        try:
            if choose_renderer() == "egl" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
                _draw_on_own_gpu(int(os.environ.get("LOCAL_RANK", "0")))
            self._holder["gl"] = GLContext(size, size)
            self._holder["gl"].make_current()
            self._holder["mujoco"] = mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_150)
        except (ImportError, RuntimeError, AttributeError, ValueError, mujoco.FatalError) as error:
            self.close()
            reason = " ".join(str(error).split())
            raise UsageError(f"cannot start OpenGL ({reason}; {gl_settings()}); install it: {APT_HINT}") from error
        self._holder["mujoco"].readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._holder["mujoco"])
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._option = mujoco.MjvOption()
        self._option.geomgroup[[_COLLISION_GROUP, _VISUAL_GROUP, _OUT_OF_VIEW_GROUP]] = 0, 1, 0
        self._without_sites = copy.copy(self._option)
        self._without_sites.sitegroup[:] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._triangles = self._triangle_filter() if render == "protocol" else None

    def close(self) -> None:
        """Free the OpenGL context. Closing twice is fine."""
        self._finalizer()

    def _triangle_filter(self) -> TriangleFilter | None:
        """Make what spares a software renderer triangles, and its scene; or None: pictures are the same without it."""
        try:
            from experiments.robot.libero.simulator.triangles import triangle_filter

            triangles = triangle_filter(self._model, self._holder["mujoco"], self._scene, self.size)
            if triangles is not None:
                self._scene = triangles.new_scene(_MAX_GEOMS)
            return triangles
        # A PyOpenGL that looks for another window system, or a MuJoCo that makes no such scene.
        except (ImportError, AttributeError, ValueError, self._mujoco.FatalError):
            return None

    def _prepare(self, data: MjData, camera: str, segment: bool = False) -> None:
        mujoco = self._mujoco
        camera_id = self._camera.fixedcamid = self._model.camera(camera).id
        # Sites (the hand's axis, placement regions) are transparent in color but solid in segmentation and depth.
        option = self._without_sites if segment else self._option
        groups, kept = self._model.geom_group, self._model.geom_group.copy()
        groups[geoms_out_of_view(self._model, data, camera_id)] = _OUT_OF_VIEW_GROUP
        mujoco.mjv_updateScene(self._model, data, option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene)
        groups[:] = kept
        if self._triangles is not None and not segment:
            self._triangles.apply(self._scene, camera_id)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = segment
        self._scene.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = segment

    def _draw(self) -> None:
        self._holder["gl"].make_current()  # Freeing others, as the garbage collector may, leaves none.
        self._mujoco.mjr_render(self._viewport, self._scene, self._holder["mujoco"])
        if self._triangles is not None:
            self._triangles.start()

    def _read(self, depth: np.ndarray | None = None) -> np.ndarray:
        """Color rotated as the training data are, and depth into `depth` as OpenGL has it."""
        image = np.empty((self.size, self.size, 3), dtype=np.uint8)
        self._holder["gl"].make_current()
        self._mujoco.mjr_readPixels(image, depth, self._viewport, self._holder["mujoco"])
        return np.ascontiguousarray(image[::-1, ::-1])

    def colors(self, data: MjData, cameras: Sequence[str]) -> list[np.ndarray]:
        """Images of `cameras`, uint8 (H, W, 3), rotated as the training data are.

        Where triangles are selected, each camera is prepared while the renderer's threads draw for the one before.
        """
        images: list[np.ndarray] = []
        for number, camera in enumerate(cameras):
            self._prepare(data, camera)
            if number > 0:
                images.append(self._read())
            self._draw()
        return [*images, self._read()]

    def geometry(self, data: MjData, camera: str) -> CameraView:
        """Depth, segmentation and pose of `camera`, pixel by pixel in line with :meth:`colors`."""
        depth = np.empty((self.size, self.size), dtype=np.float32)
        self._prepare(data, camera, segment=True)
        self._draw()
        ids = self._read(depth)
        return CameraView(
            depth=np.ascontiguousarray(self._metric(depth)[::-1, ::-1]),
            segmentation=self._objects(ids),
            intrinsics=self._intrinsics(camera),
            camera_to_world=self._pose(data, camera),
        )

    def _metric(self, depth: np.ndarray) -> np.ndarray:
        """Reversed-z buffer values (1 near, 0 far) to meters, from the projection matrix that MuJoCo uses."""
        extent = self._model.stat.extent
        near, far = self._model.vis.map.znear * extent, self._model.vis.map.zfar * extent
        return (near * far / (near + depth.astype(np.float64) * (far - near))).astype(np.float32)

    def _objects(self, ids: np.ndarray) -> np.ndarray:
        """Segment colors to (object id, object type); color 0 is the background."""
        table = np.full((self._scene.ngeom + 1, 2), -1, dtype=np.int32)
        for geom in self._scene.geoms[: self._scene.ngeom]:
            if geom.segid != -1:
                table[geom.segid + 1] = geom.objid, geom.objtype
        index = ids.astype(np.uint32) @ np.array([1, 1 << 8, 1 << 16], dtype=np.uint32)
        return table[np.where(index > self._scene.ngeom, 0, index)]

    def _intrinsics(self, camera: str) -> np.ndarray:
        focal = 0.5 * self.size / np.tan(np.deg2rad(self._model.camera(camera).fovy[0]) / 2)
        center = self.size / 2
        return np.array([[-focal, 0.0, center], [0.0, focal, center], [0.0, 0.0, 1.0]])

    def _pose(self, data: MjData, camera: str) -> np.ndarray:
        index = self._model.camera(camera).id
        pose = np.eye(4)
        # MuJoCo's cameras look along -z with y up; ours along +z with y down.
        pose[:3, :3] = data.cam_xmat[index].reshape(3, 3) * np.array([1.0, -1.0, -1.0])
        pose[:3, 3] = data.cam_xpos[index]
        return pose
