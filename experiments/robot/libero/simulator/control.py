"""robosuite's arm control between two policy steps, bit for bit, in half of its time.

A control step is 25 physics steps, and robosuite computes torques in each of them. Most of that is looking up names,
limits and the same Jacobian four times. Here these are looked up once; every number is still made by the same operation
on the same values, so trajectories do not change (a test compares with LIBERO's own environment).

A new goal is left to robosuite's controller. Its robot's records of recent forces and velocities are not kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from robosuite.environments.base import MujocoEnv


class ArmControl:
    """LIBERO's control of arm and gripper (OSC_POSE, fixed gains, uncoupled); raises ValueError for another one."""

    def __init__(self, domain: MujocoEnv) -> None:
        from robosuite.utils.control_utils import nullspace_torques

        from experiments.robot.libero.simulator.torques import decouple

        robot = domain.robots[0]
        controller = robot.controller
        self._decouple, self._nullspace_torques = decouple, nullspace_torques
        usual = (
            len(domain.robots) == 1
            and controller.name == "OSC_POSE"
            and controller.uncoupling
            and controller.interpolator_pos is None
            and controller.interpolator_ori is None
        )
        if not usual:
            raise ValueError(f"controller: expected one arm with plain OSC_POSE, found {controller.name}")
        self._domain, self._robot = domain, robot
        self._model, self._data = domain.sim.model._model, domain.sim.data._data
        self._site = domain.sim.model.site_name2id(controller.eef_name)
        self._joints, self._dofs = np.array(controller.qpos_index), np.array(controller.qvel_index)
        self._arm = np.array(robot._ref_joint_actuator_indexes)
        self._torque_low, self._torque_high = robot.torque_limits
        self._fingers = np.array([domain.sim.model.actuator_name2id(name) for name in robot.gripper.actuators])
        limits = domain.sim.model.actuator_ctrlrange[self._fingers]
        self._finger_bias = 0.5 * (limits[:, 1] + limits[:, 0])
        self._finger_weight = 0.5 * (limits[:, 1] - limits[:, 0])
        self._jacp, self._jacr = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))
        self._inertia = np.zeros((self._model.nv, self._model.nv))
        # Views of MuJoCo's memory, which stays where it is.
        data = self._data
        self._ctrl, self._qpos, self._qvel, self._bias = data.ctrl, data.qpos, data.qvel, data.qfrc_bias
        self._position, self._axes = data.site_xpos[self._site], data.site_xmat[self._site].reshape(3, 3)

    def begin(self, action: np.ndarray) -> None:
        """Take a control step's goal (7,), which robosuite's controller makes of it, and set all motors."""
        controller = self._robot.controller
        if not controller.new_update:  # After a reset it acts on a state of before, which only it has.
            self._domain._pre_action(action, True)
            return
        controller.set_goal(action[: controller.control_dim])
        self._set_motors(action[controller.control_dim :])
        controller.new_update = True  # As when it has computed torques itself: the next goal is for a new state.

    def substep(self, gripper_action: np.ndarray) -> None:
        """Bring positions and velocities up to date (the first half of MuJoCo's step) and set all motors.

        Args:
            gripper_action: (1,), the control step's last entry.
        """
        import mujoco

        mujoco.mj_step1(self._model, self._data)
        self._set_motors(gripper_action)

    def _set_motors(self, gripper_action: np.ndarray) -> None:
        torques = self._torques()
        self._ctrl[self._fingers] = self._finger_bias + self._finger_weight * self._robot.gripper.format_action(
            gripper_action
        )
        self._ctrl[self._arm] = np.clip(torques, self._torque_low, self._torque_high)

    def _torques(self) -> np.ndarray:
        """Torques (7,) that pull the hand to the controller's goal; Khatib 1987, with LIBERO's gains."""
        import mujoco

        controller = self._robot.controller
        mujoco.mj_jacSite(self._model, self._data, self._jacp, self._jacr, self._site)
        mujoco.mj_fullM(self._model, self._inertia, self._data.qM)
        velocities = np.dot(self._jacp, self._qvel), np.dot(self._jacr, self._qvel)
        jacobian, inertia, lambda_pos, lambda_ori, nullspace, force, torque = self._decouple(
            (self._jacp, self._jacr),
            self._inertia,
            self._dofs,
            (controller.goal_pos, controller.goal_ori),
            (self._position, self._axes, *velocities),
            (controller.kp, controller.kd),
        )
        wrench = np.concatenate([np.dot(lambda_pos, force), np.dot(lambda_ori, torque)])
        torques = np.dot(jacobian.T, wrench) + self._bias[self._dofs]
        torques += self._nullspace_torques(
            inertia, nullspace, controller.initial_joint, self._qpos[self._joints], self._qvel[self._dofs]
        )
        return torques
