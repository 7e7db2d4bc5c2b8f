"""gym-aloha's simulated ALOHA (two ViperX arms) on the project's own MuJoCo, drawn only when asked.

Scene, joint targets, start poses and success are gym-aloha's; its Python is not imported. Not obvious:
- Its wrapper draws three 480 x 640 pictures with shadows at every step, which is nearly all of its time. The scene
  file is all that is needed here: dm-control's part of a step is MuJoCo's two half steps, in that order.
- Initial state number i of task 0 is the cube that gym-aloha's `reset(seed=i)` draws.
- An action is held for two of gym-aloha's 50 Hz steps: 25 Hz is OpenVLA-OFT's rate on ALOHA, where a chunk of 25 lasts
  a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.robot.aloha.suite import (
    FINGER_CLOSED,
    FINGER_OPEN,
    NUM_STATES,
    START_ARM,
    START_FINGER,
    cube_pose,
    scene_path,
)
from experiments.robot.libero.simulator.environment import Observation
from experiments.robot.libero.simulator.rendering import choose_renderer
from prismatic.util.errors import UsageError

if TYPE_CHECKING:
    from mujoco import MjData, MjModel

CAMERAS = ("top", "left_wrist", "right_wrist")
_PHYSICS_STEPS = 20  # Of 2 ms an action


class AlohaEnv:
    """Transfer of a cube: the right arm picks it up, the left arm takes it over.

    Args:
        task: number of the task, which says how far the cube is spread.
        image_size: side of the square pictures in pixels.
        render: "protocol" draws as the scene file says; "fast" without antialiasing and shadows (12 times faster).

    Attributes:
        model, data: MuJoCo's, privileged.
        init_states: float64 (NUM_STATES, 7).

    Raises:
        UsageError: gym-aloha or OpenGL is missing.
    """

    def __init__(self, task: int = 0, *, image_size: int = 256, render: str = "protocol") -> None:
        choose_renderer()
        import mujoco

        self._mujoco = mujoco
        self.model: MjModel = mujoco.MjModel.from_xml_path(str(scene_path()))
        self.data: MjData = mujoco.MjData(self.model)
        if render == "fast":
            self.model.vis.quality.offsamples = self.model.vis.quality.shadowsize = 0
        self.image_size, self.task = image_size, task
        self._renderer: Any = None
        self.init_states = np.stack([cube_pose(seed, task) for seed in range(NUM_STATES)])
        self.reset(self.init_states[0])

    def reset(self, init_state: np.ndarray, seed: int = 0) -> None:
        """Start an episode with the cube at `init_state` (7,); nothing is drawn at random, so `seed` is not used."""
        if np.shape(init_state) != (7,):
            raise UsageError(f"initial state of shape {np.shape(init_state)}; accepted: (7,), the pose of the cube")
        fingers = (START_FINGER, -START_FINGER)
        self._mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:16] = self.data.ctrl[:] = (*START_ARM, *fingers) * 2
        self.data.qpos[16:] = init_state
        self._mujoco.mj_forward(self.model, self.data)

    def step(self, action: np.ndarray) -> bool:
        """Hold joint targets (14,) for 1/25 s; true when the left hand holds the cube off the table.

        Per arm, left first: six joint angles (radians), gripper (0 closed, 1 open).
        """
        for arm in range(2):
            target = action[7 * arm : 7 * arm + 7]
            finger = FINGER_CLOSED + target[6] * (FINGER_OPEN - FINGER_CLOSED)
            self.data.ctrl[8 * arm : 8 * arm + 8] = (*target[:6], finger, -finger)
        self._mujoco.mj_step2(self.model, self.data)
        self._mujoco.mj_step(self.model, self.data, _PHYSICS_STEPS - 1)
        self._mujoco.mj_step1(self.model, self.data)
        return self.transferred()

    def transferred(self) -> bool:
        """Tell whether the left hand touches the cube and the table does not: gym-aloha's reward of 4."""
        cube = self.model.geom("red_box").id
        pairs = self.data.contact.geom[: self.data.ncon]
        touching = {int(geom) for pair in pairs for geom in pair if cube in pair}
        finger = self.model.geom("vx300s_left/10_left_gripper_finger").id
        return finger in touching and self.model.geom("table").id not in touching

    def cube(self) -> np.ndarray:
        """Pose of the cube now, (7,): position and quaternion."""
        pose: np.ndarray = self.data.qpos[16:].copy()
        return pose

    def state(self) -> np.ndarray:
        """Joint state float64 (14,), in the units of :meth:`step`'s action."""
        arms_28 = self.data.qpos[:16].reshape(2, 8)
        grippers = (arms_28[:, 6:7] - FINGER_CLOSED) / (FINGER_OPEN - FINGER_CLOSED)
        return np.concatenate([arms_28[:, :6], grippers], axis=1).ravel()

    def observe(self, wrist: bool = True) -> Observation:
        """Pictures and joint state; without `wrist`, that of the top camera alone, the others black."""
        top, left, right = (
            self._picture(name) if wrist or name == "top" else np.zeros((self.image_size,) * 2 + (3,), np.uint8)
            for name in CAMERAS
        )
        state = self.state()
        return Observation(top, left, state, state, (right,))

    def _picture(self, camera: str) -> np.ndarray:
        if self._renderer is None:
            self._renderer = self._mujoco.Renderer(self.model, self.image_size, self.image_size)
        self._renderer.update_scene(self.data, camera=camera)
        picture: np.ndarray = self._renderer.render().copy()
        return picture

    def close(self) -> None:
        """Free the renderer. Closing twice is fine."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def __enter__(self) -> AlohaEnv:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
