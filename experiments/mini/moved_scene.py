"""A scene in which space is what limits: one object anywhere on the table, seen by a camera that stands elsewhere.

LIBERO's own placements hardly vary (3 mm in libero_object 7, measured over 74 draws) and its camera never moves, so a
policy need not see where anything is. Here every episode draws the object's place and the third-person camera's pose;
what the task does not name is put out of sight.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from experiments.mini.expert import read_goal
from experiments.robot.libero.simulator.environment import CAMERAS, LiberoEnv

# Meters on the table, the hand's start above its middle; and the least distance from what the object is to be put into.
_TABLE = np.array([[-0.22, -0.28], [0.12, 0.28]])
_APART = 0.19
_OUT_OF_SIGHT = 8.0
# Standard deviations per axis, as those of the mini teacher's frames.
_CAMERA_SHIFT, _CAMERA_TURN = 0.06, np.deg2rad(3.0)


class MovedScene(LiberoEnv):
    """A pick-and-place task of LIBERO whose object and camera are placed anew by every reset.

    Both are a function of `reset`'s arguments. The object keeps the height and turn that the task gives it.

    Args:
        as of :class:`LiberoEnv`.

    Raises:
        UsageError: also for a task whose goal is not one object in or on another.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._goal = None
        super().__init__(*args, **options)
        self._goal = read_goal(self.task)
        self._camera = self._model.camera(CAMERAS[0]).id
        self._camera_pose = self._model.cam_pos[self._camera].copy(), self._model.cam_quat[self._camera].copy()

    def reset(self, init_state: np.ndarray | None = None, seed: int = 0) -> None:
        """As of :class:`LiberoEnv`; then the object, the others and the camera are moved."""
        super().reset(init_state, seed)
        if self._goal is None:  # The base class's own reset, before there is a camera to move.
            return
        state = b"" if init_state is None else np.asarray(init_state, dtype=np.float64).tobytes()
        digest = hashlib.sha256(f"moved scene {seed} ".encode() + state).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        self._move_objects(rng)
        self._move_camera(rng)
        self.domain.sim.forward()
        self._sample(self._data.qpos.copy())

    def _move_objects(self, rng: np.random.Generator) -> None:
        assert self._goal is not None
        domain, data = self.domain, self.domain.sim.data
        target = next(name for name in domain.objects_dict if self._goal.target.startswith(name))
        target_xy = data.get_body_xpos(domain.objects_dict[target].root_body)[:2].copy()
        place = rng.uniform(*_TABLE)
        while np.linalg.norm(place - target_xy) < _APART:
            place = rng.uniform(*_TABLE)
        hidden = 0
        for name, item in domain.objects_dict.items():
            if name == target:
                continue
            hidden += name != self._goal.item
            away = np.array([_OUT_OF_SIGHT + 0.5 * hidden, _OUT_OF_SIGHT])
            for joint in item.joints:
                pose = np.array(data.get_joint_qpos(joint))
                if pose.shape == (7,):
                    pose[:2] = place if name == self._goal.item else away
                    data.set_joint_qpos(joint, pose)

    def _move_camera(self, rng: np.random.Generator) -> None:
        import mujoco

        position, quaternion = self._camera_pose
        axis = rng.normal(0.0, _CAMERA_TURN, 3)
        angle = float(np.linalg.norm(axis))
        turn, turned = np.empty(4), np.empty(4)
        mujoco.mju_axisAngle2Quat(turn, axis / angle, angle)
        mujoco.mju_mulQuat(turned, quaternion, turn)
        self._model.cam_pos[self._camera] = position + rng.normal(0.0, _CAMERA_SHIFT, 3)
        self._model.cam_quat[self._camera] = turned


def make_scene(scene: str, suite: str, task_id: int, **options: Any) -> LiberoEnv:
    """The task as it is ("task"), or its :class:`MovedScene` ("moved"); raises UsageError as they do."""
    return (MovedScene if scene == "moved" else LiberoEnv)(suite, task_id, **options)
