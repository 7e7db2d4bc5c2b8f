"""A scripted expert for gym-aloha's cube transfer: waypoints of both hands, inverse kinematics, joint targets.

Joint targets are absolute, so noise on what is executed needs no correction by the expert: the recorded action is the
plan's, the recorded state is where the noise took the arms. All of it is a function of the seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.robot.aloha.environment import AlohaEnv
from experiments.robot.aloha.suite import IDLE, INSTRUCTION, NUM_STATES, START_ARM, cube_pose
from prismatic.vla.datasets.rlds_schema import Values
from prismatic.vla.datasets.rlds_writer import aloha_schema, encode_jpeg

NOISE_LEVELS = (0.005, 0.01, 0.02)  # Standard deviation of a joint target, radians
_NOISE_MEMORY = 0.8  # Coefficient of the first-order autoregressive noise
_START_SPREAD = 0.04  # Of the joints an episode starts from, radians
# Largest detour of the right arm on the way to the cube, radians. Else where the arm is tells where the cube is, and a
# student learns to look at its joints instead of the pictures.
_DETOUR = np.array([0.0] * 7 + [0.25, 0.1, 0.1, 0.0, 0.15, 0.0, 0.0])
_DETOUR_STEPS = (14, 30)  # Begins to return, has returned
_SETTLE_STEPS = 10
_JOINTS = np.tile([1.0] * 6 + [0.0], 2)  # Numbers of an action that noise is added to: not the grippers
# ViperX: meters and radians, from the scene file.
_BASES = np.array([[-0.469, 0.5], [0.469, 0.5]])  # Left, right; they face each other.
_SHOULDER_HEIGHT = 0.079 + 0.04805
_UPPER, _LOWER = np.hypot(0.05955, 0.3), 0.3
_UPPER_ELEVATION = np.arctan2(0.3, 0.05955)  # Of the upper arm at a shoulder angle of 0
_HAND = 0.069744 + 0.135  # From the wrist to between the fingertips
_PICK_PITCH, _TAKE_PITCH = 1.0, 0.0
_MEET = np.array([0.0, 0.5, 0.25])
_OPEN, _SHUT = 1.0, 0.0


def joint_angles(arm: int, tip: np.ndarray, pitch: float, roll: float = 0.0) -> np.ndarray:
    """Joint angles (6,) that put the fingertips of arm 0 (left) or 1 at `tip` (3,), meters, in the world's frame.

    The hand points away from the arm's base, `pitch` radians downward, turned by `roll` about its axis. Raises
    ValueError: out of reach.
    """
    facing = 1.0 - 2.0 * arm
    aside = facing * (tip[:2] - _BASES[arm])
    out = float(np.hypot(*aside)) - _HAND * np.cos(pitch)
    up = float(tip[2]) + _HAND * np.sin(pitch) - _SHOULDER_HEIGHT
    distance = float(np.hypot(out, up))
    bend = (_UPPER**2 + distance**2 - _LOWER**2) / (2 * _UPPER * distance)
    if abs(bend) > 1.0:
        raise ValueError(f"tip {tip} is out of reach")
    upper = np.arctan2(up, out) + np.arccos(bend)  # Elevation of the upper arm, elbow up
    shoulder = _UPPER_ELEVATION - upper
    lower = np.arctan2(up - _UPPER * np.sin(upper), out - _UPPER * np.cos(upper))
    elbow = -lower - shoulder
    return np.array([np.arctan2(aside[1], aside[0]), shoulder, elbow, 0.0, pitch - shoulder - elbow, roll])


@dataclass(frozen=True)
class _Waypoint:
    """An arm's joints at `step`, and its gripper's command on the way there."""

    step: int
    joints: np.ndarray
    gripper: float


def plan(cube: np.ndarray) -> np.ndarray:
    """Joint targets of both arms (T, 14) that pick the cube at `cube` (3,) up and hand it over."""
    above, meet_right = np.array([0.0, 0.0, 0.08]), joint_angles(1, _MEET, _PICK_PITCH)
    grasp = np.array([cube[0], cube[1], 0.015])
    start = np.array(START_ARM)
    right = [
        _Waypoint(0, start, _OPEN),
        _Waypoint(28, joint_angles(1, grasp + above, _PICK_PITCH), _OPEN),
        _Waypoint(40, joint_angles(1, grasp, _PICK_PITCH), _OPEN),
        _Waypoint(50, joint_angles(1, grasp, _PICK_PITCH), _SHUT),
        _Waypoint(60, joint_angles(1, grasp + above, _PICK_PITCH), _SHUT),
        _Waypoint(85, meet_right, _SHUT),
        _Waypoint(118, meet_right, _SHUT),
        _Waypoint(124, meet_right, _OPEN),
        _Waypoint(140, joint_angles(1, _MEET + [0.12, 0.0, 0.05], _PICK_PITCH), _OPEN),
    ]
    left = [
        _Waypoint(0, start, _OPEN),
        _Waypoint(60, joint_angles(0, _MEET - [0.15, 0.0, 0.02], _TAKE_PITCH, np.pi / 2), _OPEN),
        _Waypoint(85, joint_angles(0, _MEET - [0.12, 0.0, 0.02], _TAKE_PITCH, np.pi / 2), _OPEN),
        _Waypoint(105, joint_angles(0, _MEET - [0.005, 0.0, 0.0], _TAKE_PITCH, np.pi / 2), _OPEN),
        _Waypoint(115, joint_angles(0, _MEET - [0.005, 0.0, 0.0], _TAKE_PITCH, np.pi / 2), _SHUT),
        _Waypoint(140, joint_angles(0, _MEET - [0.005, 0.0, 0.0], _TAKE_PITCH, np.pi / 2), _SHUT),
    ]
    return np.concatenate([_targets(left), _targets(right)], axis=1)


def _targets(waypoints: Sequence[_Waypoint]) -> np.ndarray:
    """Targets (T, 7) through one arm's waypoints, at rest in each of them."""
    rows = []
    for before, after in itertools.pairwise(waypoints):
        share = np.arange(1, after.step - before.step + 1) / (after.step - before.step)
        smooth = (share**2 * (3 - 2 * share))[:, None]
        joints = before.joints + smooth * (after.joints - before.joints)
        rows.append(np.concatenate([joints, np.full((len(joints), 1), after.gripper)], axis=1))
    return np.concatenate(rows)


@dataclass(frozen=True)
class TransferDemonstration:
    """Outcome of one attempt: `episode` is None if the cube was not handed over and kept; `ended_in` says how."""

    episode: Mapping[str, Values] | None
    steps: int
    ended_in: str


def demonstrate(env: AlohaEnv, seed: int, source: str, noise: bool = True) -> TransferDemonstration:
    """Place the cube with a seed beyond those of the initial states, let the expert solve the task, record.

    `episode` holds the steps' features of :func:`aloha_schema`, and `source`.
    """
    rng = np.random.default_rng(seed)
    env.reset(cube_pose(NUM_STATES + seed % (2**32 - NUM_STATES), env.task))
    start = np.array(IDLE) + (_START_SPREAD * rng.standard_normal(14) * _JOINTS if noise else 0.0)
    for _ in range(_SETTLE_STEPS):
        env.step(start)
    actions = plan(env.cube()[:3])
    level = float(rng.choice(NOISE_LEVELS)) if noise else 0.0
    detour = _DETOUR * rng.uniform(-1.0, 1.0, 14) if noise else np.zeros(14)
    drift, transferred, views = np.zeros(14), False, []
    for step, action in enumerate(actions):
        views.append(env.observe())
        drift = _NOISE_MEMORY * drift + np.sqrt(1 - _NOISE_MEMORY**2) * level * rng.standard_normal(14) * _JOINTS
        transferred = env.step(action + drift + detour * np.interp(step, (0, 6, *_DETOUR_STEPS), (0, 1, 1, 0)))
    if not transferred:
        return TransferDemonstration(None, len(actions), "without the cube in the left hand")
    numbers = np.arange(len(actions))
    episode: dict[str, Values] = {
        "action": actions,
        "is_first": numbers == 0,
        "is_last": numbers == len(actions) - 1,
        "is_terminal": numbers == len(actions) - 1,
        "language_instruction": [INSTRUCTION] * len(actions),
        "observation/image": [encode_jpeg(view.image) for view in views],
        "observation/left_wrist_image": [encode_jpeg(view.wrist_image) for view in views],
        "observation/right_wrist_image": [encode_jpeg(view.extra_images[0]) for view in views],
        "observation/state": np.stack([view.state for view in views]),
        "source": [source],
    }
    return TransferDemonstration(episode, len(actions), "done")


def serialize_episode(episode: Mapping[str, Values]) -> bytes:
    """A demonstration as a tf.train.Example; equal ones give equal bytes."""
    steps = dict(episode)
    (source,) = steps.pop("source")
    return aloha_schema(0, 0).serialize(steps, {"episode_metadata/file_path": str(source)})
