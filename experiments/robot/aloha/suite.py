"""gym-aloha's scene as numbers, and its suite as the harness knows it. Loads no simulator."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.aloha import GYM_ALOHA
from experiments.robot.libero.suites.task import Robot, Suite, TaskSpec
from prismatic.util.errors import UsageError
from prismatic.util.versions import package_version
from prismatic.vla.platforms import ALOHA

INSTALL_HINT = 'pip install --no-deps "gym-aloha==0.1.5"'
INSTRUCTION = "transfer the red cube to the other arm"
CONTROL_HZ = 25
MAX_STEPS = 150  # gym-aloha's 300 steps of 50 Hz
NUM_STATES = 1000  # Seeds from 0 that count as initial states; demonstrations draw theirs beyond.
START_ARM = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0)  # Joint angles, radians
START_FINGER = 0.02239  # Meters from the middle
FINGER_CLOSED, FINGER_OPEN = 0.01844, 0.058  # Where a gripper's 0 and 1 are
IDLE = (*START_ARM, (START_FINGER - FINGER_CLOSED) / (FINGER_OPEN - FINGER_CLOSED)) * 2  # Action that stays there
# Task -> lowest and highest position of the cube, meters. gym-aloha's own, and one for students of few steps.
TASKS = {
    "transfer_cube": ((0.0, 0.4, 0.05), (0.2, 0.6, 0.05)),
    "transfer_cube_middle": ((0.07, 0.48, 0.05), (0.13, 0.52, 0.05)),
}


def scene_path() -> Path:
    """The scene file of the installed gym-aloha. Raises UsageError when it is not installed."""
    package = importlib.util.find_spec("gym_aloha")
    if package is None or package.origin is None:
        raise UsageError(f"gym-aloha is not installed; install it with: {INSTALL_HINT}")
    return Path(package.origin).parent / "assets" / "bimanual_viperx_transfer_cube.xml"


def cube_pose(seed: int, task: int = 0) -> np.ndarray:
    """Position (m) and quaternion (w, x, y, z) of the cube, (7,), drawn as gym-aloha draws it with this seed."""
    position = np.random.RandomState(seed).uniform(*tuple(TASKS.values())[task])
    return np.concatenate([position, [1.0, 0.0, 0.0, 0.0]])


def _task(number: int, source: str) -> TaskSpec:
    scene, name = scene_path(), tuple(TASKS)[number]
    return TaskSpec(GYM_ALOHA, number, name, INSTRUCTION, scene, scene.parent, num_states=NUM_STATES)


def suite() -> Suite[Any]:
    """Its record: the tasks' initial states are the cubes of gym-aloha's seeds."""
    return Suite(
        name=GYM_ALOHA,
        base="",
        max_steps=MAX_STEPS,
        num_tasks=lambda: len(TASKS),
        task=_task,
        own_states="gym-aloha",
        identity=lambda flags: {"gym_aloha": package_version("gym-aloha")},
        robot=Robot(GYM_ALOHA, ALOHA, cameras=3, control_hz=CONTROL_HZ, idle=IDLE, flips_gripper=False),
    )
