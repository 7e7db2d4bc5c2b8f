"""LIBERO's simulator as an environment that renders only when asked and resets in a fraction of a second.

Not obvious, and on purpose:
- `reset` gives the same bytes whatever ran before in the object: the same as building the environment anew, seeding
  NumPy, resetting and setting the initial state, but without the 2-4 s of rebuilding. A soft reset of robosuite alone
  does not: MuJoCo's data, the gripper's held action, the controller and moved fixtures carry over.
- robosuite samples its sensors, pictures included, once per control step, and not at its end: after a reset that
  sets a state, the sample is taken one or two of the 25 physics steps earlier. `observe` reproduces that moment.
- Fixtures (cabinet, stove) are placed by the task's own sampler at every reset; official initial states do not hold
  them. Here they depend on `seed` alone.
- Images are robosuite's raw ones rotated by 180 degrees (upright and mirrored), as in the RLDS data and upstream.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.robot.libero.simulator.control import ArmControl
from experiments.robot.libero.simulator.rendering import (
    ACCEPTED_MUJOCO,
    APT_HINT,
    RENDER_MODES,
    Cameras,
    CameraView,
    choose_renderer,
    gl_settings,
    import_robosuite,
)
from experiments.robot.libero.suites.tasks import TaskSpec, get_task, load_init_states
from prismatic.util.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from robosuite.environments.base import MujocoEnv
    from robosuite.robots import SingleArm

CAMERAS = ("agentview", "robot0_eye_in_hand")
ACTION_DIM = 7
_CONTROL_HZ = 20
_MAX_PLACEMENT_TRIES = 100
# What resets, placement and visual effects write into the model itself.
_MODEL_FIELDS = ("body_pos", "body_quat", "geom_pos", "geom_quat", "geom_rgba", "site_pos", "site_rgba")


@dataclass(frozen=True)
class Observation:
    """A policy's view of the scene.

    Attributes:
        image: uint8 (H, W, 3), third-person camera, rotated 180 degrees.
        wrist_image: uint8 (H, W, 3), camera at the hand, rotated 180 degrees.
        state: float64 (8,): hand position (3, meters), axis-angle (3, radians), finger positions (2, meters).
        joint_state: float64 (7,), arm joints in radians.
        extra_images: further wrist cameras, of robots that have them.
    """

    image: np.ndarray
    wrist_image: np.ndarray
    state: np.ndarray
    joint_state: np.ndarray
    extra_images: tuple[np.ndarray, ...] = ()


def quat_to_axis_angle(quat_xyzw: np.ndarray) -> np.ndarray:
    """Axis-angle (3,) of a quaternion, as robosuite has it: angle in [0, 2 pi], no change of the quaternion's sign."""
    w = float(np.clip(quat_xyzw[3], -1.0, 1.0))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return quat_xyzw[:3] * 2.0 * math.acos(w) / sine


class LiberoEnv:
    """One LIBERO task.

    Args:
        suite: libero_spatial, libero_object, libero_goal, libero_10, libero_90 or another installed suite.
        task_id: 0-based, in LIBERO's default order.
        image_size: side of the square images in pixels (256 in the protocol).
        render: "protocol" draws as robosuite does; "fast" without multisampling and shadows and with thinned meshes
            (2-10 times faster, pixels differ slightly: never report its results as the protocol's).
        camera_depths: allow :meth:`observe_geometry`.

    Attributes:
        domain: the robosuite environment, privileged state for scripted experts and diagnosis; reset only through us.

    Raises:
        UsageError: unknown suite, task or render mode, a missing or doubled LIBERO installation, no OpenGL.
    """

    def __init__(
        self, suite: str, task_id: int, *, image_size: int = 256, render: str = "protocol", camera_depths: bool = False
    ) -> None:
        if render not in RENDER_MODES:
            raise unknown_name("render", render, RENDER_MODES)
        if image_size < 1:
            raise UsageError(f"image_size: expected a positive number of pixels, got {image_size}")
        choose_renderer()
        self.task: TaskSpec = get_task(suite, task_id)
        self.image_size, self.render, self.camera_depths = image_size, render, camera_depths
        self.robot_start = "perturbed"  # Or "package"; see `suites.perturbations`.
        self._black = np.zeros((image_size, image_size, 3), dtype=np.uint8)
        self._cameras: Cameras | None = None
        with _one_line(self.task):
            self.domain: MujocoEnv = _build_domain(self.task)
            if self.task.perturbation is not None:
                self.task.perturbation.apply(self.domain)
            self._model = self.domain.sim.model._model
            self._data = self.domain.sim.data._data
            self._arm = ArmControl(self.domain)
            self._scratch = copy.copy(self._data)  # Kinematics of the sampled moment, for drawing.
            self._pristine = self._pristine_model()
            self._pristine_visuals = {name: dict(vis) for name, vis in self._visual_flags()}
            self.reset(None)

    @property
    def instruction(self) -> str:
        """The task's instruction as upstream's evaluation and the RLDS data word it."""
        return self.task.instruction

    @functools.cached_property
    def init_states(self) -> np.ndarray:
        """The task's fixed initial states, float64 (N, 1 + nq + nv)."""
        return load_init_states(self.task)

    def reset(self, init_state: np.ndarray | None = None, seed: int = 0) -> None:
        """Start an episode; same arguments, same bytes, whatever ran before.

        Args:
            init_state: float (1 + nq + nv,), one of :attr:`init_states`; None keeps the placement that is drawn from
                the task's own sampler.
            seed: of that sampler (NumPy's legacy global generator, left untouched otherwise).

        Raises:
            UsageError: the state has the wrong length.
        """
        length = 1 + self._model.nq + self._model.nv
        if init_state is not None and np.shape(init_state) != (length,):
            raise UsageError(f"init_state: {self.task.name} expects shape ({length},), got {np.shape(init_state)}")
        self._rebuild(seed)
        self._seed = seed
        if init_state is not None and self.task.perturbation is not None and self.robot_start == "perturbed":
            init_state = self.task.perturbation.start_state(init_state, self.domain)
        timer = self.domain.model_timestep
        if init_state is not None:
            self.domain.sim.set_state_from_flattened(np.asarray(init_state, dtype=np.float64))
            self.domain.sim.forward()
            self.domain._check_success()
            self.domain._post_process()
            timer += self.domain.model_timestep  # robosuite's forced sampling advances its sensors' clock.
        self._sensor_clock, self._sampled = timer, True
        self._sample(self._data.qpos.copy())

    def step(self, action: np.ndarray) -> bool:
        """Apply one 20 Hz action, draw nothing; True once the task's goal holds.

        Args:
            action: float (7,): position (1.0 is 5 cm), rotation (1.0 is 0.5 rad), gripper (-1 open, +1 close); the
                controller clips to [-1, 1].

        Raises:
            ValueError: wrong shape or not finite.
        """
        import mujoco

        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"action: expected {ACTION_DIM} finite numbers, got {action}")
        domain = self.domain
        domain.timestep += 1
        domain.sim.forward()
        for substep in range(int(domain.control_timestep / domain.model_timestep)):
            # The controller brings positions and velocities up to date before it computes torques, so only the second
            # half of MuJoCo's step is left to do. robosuite does the first half three times, to the same result.
            if substep == 0:
                self._arm.begin(action)
            else:
                self._arm.substep(action[ACTION_DIM - 1 :])
            kinematics_qpos = self._data.qpos.copy()
            mujoco.mj_step2(self._model, self._data)
            self._tick(kinematics_qpos)
        domain.cur_time += domain.control_timestep
        domain._post_process()
        return bool(domain._check_success())

    def observe(self, wrist: bool = True) -> Observation:
        """Render the cameras and read the robot's state; without `wrist` that image is black, which saves time."""
        cameras = self._draw_ready()
        image, *others = cameras.colors(self._scratch, CAMERAS if wrist else CAMERAS[:1])
        if self.task.perturbation is not None:  # The same picture however often a moment is drawn.
            image = self.task.perturbation.picture(image, f"{self.task.name}:{self._seed}:{self.domain.timestep}")
        return Observation(
            image=image,
            wrist_image=others[0] if wrist else self._black,
            state=self.state,
            joint_state=self._sampled_qpos[self._robot._ref_joint_pos_indexes],
        )

    def observe_geometry(self) -> dict[str, CameraView]:
        """Depth, segmentation and camera geometry of what :meth:`observe` shows; needs camera_depths=True."""
        if not self.camera_depths:
            raise UsageError("observe_geometry: make the environment with camera_depths=True")
        cameras = self._draw_ready()
        return {name: cameras.geometry(self._scratch, name) for name in CAMERAS}

    @property
    def state(self) -> np.ndarray:
        """Robot state (8,) of the sampled moment without rendering; see :class:`Observation`."""
        self._place_scratch()
        hand = self._model.body(self._robot.robot_model.eef_name).id
        quat_wxyz = self._scratch.xquat[hand]
        position = self._scratch.site_xpos[self._robot.eef_site_id]
        fingers = self._sampled_qpos[self._robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([position, quat_to_axis_angle(quat_wxyz[[1, 2, 3, 0]]), fingers])

    def close(self) -> None:
        """Free the renderer. Closing twice is fine."""
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None

    def __enter__(self) -> LiberoEnv:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def _robot(self) -> SingleArm:
        return self.domain.robots[0]

    def _visual_flags(self) -> Iterator[tuple[str, dict[str, bool]]]:
        """Per object, the switches of its visual effects (a burner's glow), which steps change."""
        for objects in (self.domain.objects_dict, self.domain.fixtures_dict):
            for name, item in objects.items():
                yield name, item.object_properties["vis_site_names"]

    def _rebuild(self, seed: int) -> None:
        """Arrive where robosuite's hard reset does, on the model that is already compiled."""
        outer_random = np.random.get_state()  # noqa: NPY002 - LIBERO's samplers use the global generator
        try:
            np.random.seed(seed)  # noqa: NPY002
            if not any(self._place() for _ in range(_MAX_PLACEMENT_TRIES)):
                raise RuntimeError(f"{self.task.name}: no valid placement in {_MAX_PLACEMENT_TRIES} tries, seed {seed}")
        finally:
            np.random.set_state(outer_random)  # noqa: NPY002
        self.domain.sim.forward()
        self.domain.visualize(vis_settings=dict.fromkeys(self.domain._visualizations, False))

    def _place(self) -> bool:
        """Clear the simulation and draw one placement; False if the sampler found no room."""
        import mujoco
        from robosuite.utils.errors import RandomizationError

        mujoco.mj_resetData(self._model, self._data)
        for name, value in self._pristine.items():
            getattr(self._model, name)[:] = value
        for name, flags in self._visual_flags():
            flags.update(self._pristine_visuals[name])
        self._robot.gripper.current_action = np.zeros(self._robot.gripper.dof)
        self.domain.sim.forward()
        try:
            self.domain._reset_internal()
        except RandomizationError:
            return False
        return True

    def _pristine_model(self) -> dict[str, np.ndarray]:
        """The model's changeable fields as compiled: fixtures at their files' poses, which the first reset moved.

        LIBERO's sampler needs them there, since it adds a fixture's drawn pose to where its sites are before the move.
        """
        fields = {name: getattr(self._model, name).copy() for name in _MODEL_FIELDS}
        for fixture in self.domain.fixtures_dict.values():
            element = self.domain.model.worldbody.find(f".//body[@name='{fixture.root_body}']")
            index = self._model.body(fixture.root_body).id
            fields["body_pos"][index] = np.fromstring(element.get("pos", "0 0 0"), sep=" ")
            fields["body_quat"][index] = np.fromstring(element.get("quat", "1 0 0 0"), sep=" ")
        return fields

    def _tick(self, kinematics_qpos: np.ndarray) -> None:
        """Advance robosuite's sensor clock by one physics step; sample when its sensors would."""
        period = 1.0 / _CONTROL_HZ
        self._sensor_clock += self.domain.model_timestep
        if not self._sampled and period >= self._sensor_clock:
            self._sample(kinematics_qpos)
            self._sampled = True
        if self._sensor_clock >= period:
            if not self._sampled:
                self._sample(kinematics_qpos)
            self._sensor_clock %= period
            self._sampled = False

    def _sample(self, kinematics_qpos: np.ndarray) -> None:
        """Remember the moment: joints as they are, bodies where the last kinematics (one physics step ago) put them."""
        self._sampled_qpos, self._kinematics_qpos = self._data.qpos.copy(), kinematics_qpos
        self._scratch_ready = False

    def _place_scratch(self) -> None:
        import mujoco

        if not self._scratch_ready:
            self._scratch.qpos[:] = self._kinematics_qpos
            mujoco.mj_kinematics(self._model, self._scratch)
            mujoco.mj_comPos(self._model, self._scratch)
            mujoco.mj_camlight(self._model, self._scratch)
            self._scratch_ready = True

    def _draw_ready(self) -> Cameras:
        if self._cameras is None:
            self._cameras = Cameras(self._model, self.image_size, self.render)
        self._place_scratch()
        return self._cameras


@contextlib.contextmanager
def _one_line(task: TaskSpec) -> Iterator[None]:
    """Say in one line why an environment cannot be built: a UsageError stops the run, where others count as errors."""
    try:
        yield
    except (ImportError, AttributeError, AssertionError, KeyError, TypeError, OSError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{task.suite} task {task.task_id}: the simulator cannot be built ({type(error).__name__}: {reason}, "
            f"{Path(place.filename).name}:{place.lineno}; {gl_settings()}); accepted: mujoco {ACCEPTED_MUJOCO}, "
            f"robosuite 1.4, LIBERO with its assets, OpenGL: {APT_HINT}"
        ) from error


def _build_domain(task: TaskSpec) -> MujocoEnv:
    """The task's robosuite environment, with no cameras and no sensors of its own: both are read here instead."""
    settings = {
        "use_camera_obs": False,
        "has_offscreen_renderer": False,
        "hard_reset": False,
        "ignore_done": True,
        "control_freq": _CONTROL_HZ,
    }
    import_robosuite()
    own_scene = task.perturbation.build_scene(task, **settings) if task.perturbation is not None else None
    if own_scene is not None:
        return own_scene
    with contextlib.redirect_stdout(io.StringIO()):
        from libero.libero.envs.env_wrapper import ControlEnv

        return ControlEnv(bddl_file_name=str(task.bddl_path), **settings).env
