"""Kernel of the arm's control around robosuite's own; imported late, as robosuite is.

Where robosuite compiles its functions, this compiles with them, which spares most calls of NumPy. Sums of products that
robosuite leaves to NumPy are not here: NumPy's linear algebra and Numba's are two libraries.
"""

from __future__ import annotations

import numpy as np
from robosuite.utils import control_utils
from robosuite.utils.control_utils import opspace_matrices, orientation_error

from experiments.robot.libero.simulator.coverage import compile_kernel


def _decouple(jacobians, inertia_VV, dofs_D, goal, hand, gains):  # type: ignore[no-untyped-def]
    """Matrices and forces of operational space control.

    Args:
        jacobians: of the hand's position and rotation, (3, V) each.
        inertia_VV: of all degrees of freedom; dofs_D: those of the arm.
        goal: position (3,) and axes (3, 3).
        hand: position (3,), axes (3, 3), velocity (3,) and angular velocity (3,).
        gains: of errors and of velocities, (6,) each.

    Returns:
        The arm's Jacobian (6, D) and inertia (D, D); inertia of the hand for forces and for torques, (3, 3) each;
        projection to the null space (D, D); desired force and torque, (3,) each.
    """
    count = len(dofs_D)
    # Columns lie together, as robosuite has them: it decides how sums are made.
    jacobian, inertia = np.empty((count, 6)).T, np.empty((count, count)).T
    for column in range(count):
        for row in range(3):
            jacobian[row, column] = jacobians[0][row, dofs_D[column]]
            jacobian[row + 3, column] = jacobians[1][row, dofs_D[column]]
        for row in range(count):
            inertia[row, column] = inertia_VV[dofs_D[row], dofs_D[column]]
    jacobian_pos, jacobian_ori = np.empty((count, 3)).T, np.empty((count, 3)).T
    jacobian_pos[:], jacobian_ori[:] = jacobian[:3], jacobian[3:]
    force = (goal[0] - hand[0]) * gains[0][:3] + -hand[2] * gains[1][:3]
    torque = orientation_error(goal[1], hand[1]) * gains[0][3:] + -hand[3] * gains[1][3:]
    _, lambda_pos, lambda_ori, nullspace = opspace_matrices(inertia, jacobian, jacobian_pos, jacobian_ori)
    return jacobian, inertia, lambda_pos, lambda_ori, nullspace, force, torque


decouple = compile_kernel(_decouple, control_utils) if hasattr(opspace_matrices, "py_func") else _decouple
