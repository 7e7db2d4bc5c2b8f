"""robosuite's arm control between two policy steps, bit for bit, in half of its time.

A control step is 25 physics steps, and robosuite computes torques in each of them. Most of that is looking up names,
limits and the same Jacobian four times. Here these are looked up once; every number is still made by the same operation
on the same values, so trajectories do not change (a test compares with LIBERO's own environment).

The first physics step of a control step, which takes the new goal, is left to robosuite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from robosuite.environments.base import MujocoEnv


class ArmControl:
    """LIBERO's control of arm and gripper (OSC_POSE, fixed gains, uncoupled); raises ValueError for another one."""

    def __init__(self, domain: MujocoEnv) -> None:
        robot = domain.robots[0]
        controller = robot.controller
        usual = (
            len(domain.robots) == 1
            and controller.name == "OSC_POSE"
            and controller.uncoupling
            and controller.interpolator_pos is None
            and controller.interpolator_ori is None
        )
        if not usual:
            raise ValueError(f"controller: expected one arm with plain OSC_POSE, found {controller.name}")
        self._robot = robot
        self._model, self._data = domain.sim.model._model, domain.sim.data._data
        self._site = domain.sim.model.site_name2id(controller.eef_name)
        self._joints, self._dofs = controller.qpos_index, controller.qvel_index
        self._arm = robot._ref_joint_actuator_indexes
        self._torque_low, self._torque_high = robot.torque_limits
        self._fingers = [domain.sim.model.actuator_name2id(name) for name in robot.gripper.actuators]
        limits = domain.sim.model.actuator_ctrlrange[self._fingers]
        self._finger_bias = 0.5 * (limits[:, 1] + limits[:, 0])
        self._finger_weight = 0.5 * (limits[:, 1] - limits[:, 0])
        self._jacp, self._jacr = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))
        self._inertia = np.zeros((self._model.nv, self._model.nv))

    def substep(self, gripper_action: np.ndarray) -> None:
        """Bring positions and velocities up to date (the first half of MuJoCo's step) and set all motors.

        Args:
            gripper_action: (1,), the control step's last entry.
        """
        import mujoco

        mujoco.mj_step1(self._model, self._data)
        data = self._data
        torques = self._torques()
        data.ctrl[self._fingers] = self._finger_bias + self._finger_weight * self._robot.gripper.format_action(
            gripper_action
        )
        data.ctrl[self._arm] = np.clip(torques, self._torque_low, self._torque_high)

    def _torques(self) -> np.ndarray:
        """Torques (7,) that pull the hand to the controller's goal; Khatib 1987, with LIBERO's gains."""
        import mujoco
        from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

        controller, data, site = self._robot.controller, self._data, self._site
        mujoco.mj_jacSite(self._model, data, self._jacp, self._jacr, site)
        velocity, joint_pos, joint_vel = data.qvel, data.qpos[self._joints], data.qvel[self._dofs]
        # Copies in the memory layout that robosuite's have: it decides how BLAS sums.
        jacobian_pos, jacobian_ori = self._jacp[:, self._dofs].copy("K"), self._jacr[:, self._dofs].copy("K")
        jacobian = np.vstack([jacobian_pos, jacobian_ori])
        mujoco.mj_fullM(self._model, self._inertia, data.qM)
        inertia = self._inertia[self._dofs, :][:, self._dofs]

        turn = orientation_error(controller.goal_ori, data.site_xmat[site].reshape(3, 3))
        force = (controller.goal_pos - data.site_xpos[site]) * controller.kp[:3]
        force += -np.dot(self._jacp, velocity) * controller.kd[:3]
        torque = turn * controller.kp[3:6] + -np.dot(self._jacr, velocity) * controller.kd[3:6]
        _, lambda_pos, lambda_ori, nullspace = opspace_matrices(inertia, jacobian, jacobian_pos, jacobian_ori)
        wrench = np.concatenate([np.dot(lambda_pos, force), np.dot(lambda_ori, torque)])
        torques = np.dot(jacobian.T, wrench) + data.qfrc_bias[self._dofs]
        torques += nullspace_torques(inertia, nullspace, controller.initial_joint, joint_pos, joint_vel)
        return torques
