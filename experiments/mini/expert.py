"""A scripted expert for LIBERO's pick-and-place tasks, from privileged state through the robot's normal actions.

It solves goals of one predicate, "in" or "on", whose object can be grasped from above: all of libero_object, most of
libero_spatial, some of libero_goal. Drawers, knobs and tasks of two objects are out of its reach.

Demonstrations are recorded with noise on the executed action and clean labels: they show the policy states beside the
expert's path, each with the action that leads back. All of it is a function of (seed, suite, task, episode, attempt).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from experiments.mini.grasp import Grasp, Scene, plan_grasp
from experiments.robot.libero.demonstrations import is_no_op
from experiments.robot.libero.simulator.environment import LiberoEnv, Observation
from experiments.robot.libero.simulator.rendering import choose_renderer, import_robosuite
from experiments.robot.libero.suites.tasks import TaskSpec
from prismatic.util.errors import UsageError
from prismatic.vla.datasets.rlds_writer import Episode, encode_jpeg

OPEN, CLOSE = -1.0, 1.0
MAX_STEPS = 260
_STEP = 0.05  # Meters of hand motion that an action of 1.0 asks for.
_TURN = 0.5  # Radians.
_GAIN = 3.0
_PHASE_LIMIT = 60
_STALL_STEPS = 8
_CLOSE_STEPS, _OPEN_STEPS = 12, 8
_HOVER, _CLEAR, _ABOVE, _RETREAT = 0.08, 0.03, 0.04, 0.08
_GRIP_SITE, _FINGERS = "gripper0_grip_site", ("gripper0_leftfinger", "gripper0_rightfinger")
NOISE_LEVELS = (0.1, 0.2, 0.3)
_NOISE_MEMORY = 0.8  # Coefficient of the first-order autoregressive noise.
_NOISE_SHARE = np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
_DELICATE_SHARE = 0.4
_MAX_START_STEPS = 9
_START_SIZE = 0.5


@dataclass(frozen=True)
class Goal:
    """One thing to put in or on another (`kind`): `item` and `target` name bodies or sites of the task."""

    kind: str
    item: str
    target: str


def read_goal(task: TaskSpec) -> Goal:
    """The goal of a task, from its file. Raises UsageError for a kind of task that the expert cannot solve."""
    choose_renderer()  # LIBERO's module loads MuJoCo, after which it is too late.
    import_robosuite()
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    problem = robosuite_parse_problem(str(task.bddl_path))
    goals = problem["goal_state"]
    movable = {name for names in problem["objects"].values() for name in names}
    if len(goals) == 1 and len(goals[0]) == 3 and goals[0][0] in ("in", "on") and goals[0][1] in movable:
        return Goal(*goals[0])
    raise UsageError(
        f"the scripted expert cannot solve {task.suite} task {task.task_id} ({task.instruction!r}): its goal is "
        f"{goals}; it can put one object in or on something"
    )


class Expert:
    """Acts in `env` from the moment it is made: plans then, and steers by feedback at every step.

    Make it when the objects have settled. `act` gives the clean action for the current state; whoever executes it may
    add noise, and the next action corrects.

    Raises:
        UsageError: see :func:`read_goal`.
    """

    def __init__(self, env: LiberoEnv) -> None:
        self._env, self._goal = env, read_goal(env.task)
        self._model, self._data = env.domain.sim.model._model, env.domain.sim.data._data
        self._scene = Scene(self._model, self._data)
        self._item_root = self._scene.root(env.domain.objects_dict[self._goal.item].root_body)
        self._robot_roots = {self._scene.root(_FINGERS[0]), self._scene.root("robot0_base")}
        self._target_xy = self._find_target_xy()
        self.grasp: Grasp = self._plan()
        self._carry_bottom = self._find_carry_height()
        self._phases = ("hover", "descend", "close", "lift", "carry", "lower", "open", "retreat")
        self._phase, self._count = 0, 0
        self._nearest, self._since_nearest = float("inf"), 0
        self._release: np.ndarray | None = None
        self.failed = False

    @property
    def phase(self) -> str:
        """Name of the current phase, "done" at the end."""
        return self._phases[self._phase] if self._phase < len(self._phases) else "done"

    @property
    def delicate(self) -> bool:
        """Tell whether the hand must be precise now, so that noise on the action should be small."""
        return self.phase in ("descend", "close", "lower", "open")

    @property
    def done(self) -> bool:
        """Tell whether the last phase has ended (or the expert gave up, see `failed`)."""
        return self.phase == "done" or self.failed

    def act(self) -> np.ndarray:
        """The clean action (7,) for the current state."""
        error, limit, tolerance = self._position_error()
        turn = self._turn_error()
        arrived = bool(np.linalg.norm(error) < tolerance and (self.phase != "hover" or np.linalg.norm(turn) < 0.12))
        waiting = {"close": _CLOSE_STEPS, "open": _OPEN_STEPS}.get(self.phase)
        gripper = CLOSE if self.phase in ("close", "lift", "carry", "lower") else OPEN
        self._count += 1
        arrived = self._stalled(float(np.linalg.norm(error))) or arrived
        if self._count >= waiting if waiting is not None else arrived:
            self._advance()
        elif self._count > _PHASE_LIMIT:
            self.failed = True
        motion = _GAIN * error / _STEP
        motion *= min(1.0, limit / max(float(np.linalg.norm(motion)), 1e-9))
        return np.concatenate([motion, np.clip(turn / _TURN, -0.5, 0.5), [gripper]])

    def _stalled(self, distance: float) -> bool:
        """Tell whether something holds the hand up short of its goal, near enough to go on."""
        if distance < self._nearest - 0.001:
            self._nearest, self._since_nearest = distance, 0
        else:
            self._since_nearest += 1
        return self._since_nearest >= _STALL_STEPS and distance < {"lower": 0.04, "descend": 0.015}.get(self.phase, 0.0)

    def _advance(self) -> None:
        if self.phase == "lower":
            self._release = self._hand_position()
        self._phase, self._count = self._phase + 1, 0
        self._nearest, self._since_nearest = float("inf"), 0

    def _hand_position(self) -> np.ndarray:
        return self._data.site(_GRIP_SITE).xpos.copy()

    def _hand_yaw(self) -> float:
        along = self._data.site(_GRIP_SITE).xmat.reshape(3, 3) @ self._closing_axis
        return float(np.arctan2(along[1], along[0]))

    def _turn_error(self) -> np.ndarray:
        """Rotation vector (3,) from the hand's orientation to "straight down, fingers along the grasp's yaw"."""
        site = self._data.site(_GRIP_SITE).xmat.reshape(3, 3)
        closing, approach = site @ self._closing_axis, site[:, 2]
        wanted = np.array([np.cos(self.grasp.yaw), np.sin(self.grasp.yaw), 0.0])
        down = np.array([0.0, 0.0, -1.0])
        current_frame = np.column_stack([closing, np.cross(approach, closing), approach])
        wanted_frame = np.column_stack([wanted, np.cross(down, wanted), down])
        return Rotation.from_matrix(wanted_frame @ current_frame.T).as_rotvec()

    def _position_error(self) -> tuple[np.ndarray, float, float]:
        """Way from the hand to its goal (3,), the largest action norm, and how near is near enough (meters)."""
        hand = self._hand_position()
        if self.phase in ("hover", "descend", "close"):
            goal = self.grasp.position + np.array([0.0, 0.0, _HOVER if self.phase == "hover" else 0.0])
            return goal - hand, 1.0 if self.phase == "hover" else 0.6, 0.012 if self.phase == "hover" else 0.006
        if self.phase in ("open", "retreat", "done"):
            assert self._release is not None
            rise = 0.0 if self.phase == "open" else _RETREAT
            return self._release + np.array([0.0, 0.0, rise]) - hand, 1.0, 0.015
        item = self._scene.points(self._item_root)
        body = self._data.xpos[self._item_root]
        lift = self._carry_bottom - item[:, 2].min()
        if self.phase == "lift":
            return np.array([0.0, 0.0, lift]), 1.0, 0.02
        aside = self._target_xy - body[:2]
        if self.phase == "carry":
            return np.array([*aside, lift]), 1.0, 0.012
        return np.array([*aside, self._release_bottom - item[:, 2].min()]), 0.5, 0.008

    def _find_target_xy(self) -> np.ndarray:
        names = self._env.domain
        if self._goal.target in names.objects_dict or self._goal.target in names.fixtures_dict:
            body = names.get_object(self._goal.target).root_body
            return self._data.body(body).xpos[:2].copy()
        return self._data.site(self._goal.target).xpos[:2].copy()

    def _obstacles(self) -> dict[int, np.ndarray]:
        """Points of everything but the robot, the object and the room itself."""
        skipped = self._robot_roots | {self._item_root, 0}
        return {root: self._scene.points(root) for root in self._scene.roots() if root not in skipped}

    def _plan(self) -> Grasp:
        self._closing_axis = self._find_closing_axis()
        obstacles = list(self._obstacles().values())
        everything = np.concatenate(obstacles) if obstacles else np.zeros((0, 3))
        return plan_grasp(self._scene.points(self._item_root), everything, self._hand_yaw())

    def _find_closing_axis(self) -> np.ndarray:
        """The axis (3,) of the grip site's frame along which the fingers close, signed from right to left finger."""
        along = self._data.body(_FINGERS[0]).xpos - self._data.body(_FINGERS[1]).xpos
        in_site = self._data.site(_GRIP_SITE).xmat.reshape(3, 3).T @ along
        axis = np.zeros(3)
        nearest = int(np.argmax(np.abs(in_site)))
        axis[nearest] = np.sign(in_site[nearest])
        return axis

    def _find_carry_height(self) -> float:
        """Height of the object's lowest point on its way: above all near the path, the target's rim included."""
        start = self.grasp.position[:2]
        path = self._target_xy - start
        highest = 0.0
        supports = [0.0]
        for points in self._obstacles().values():
            along = np.clip((points[:, :2] - start) @ path / max(float(path @ path), 1e-9), 0.0, 1.0)
            away = np.linalg.norm(points[:, :2] - start - along[:, None] * path, axis=1)
            beyond = np.linalg.norm(points[:, :2] - start, axis=1) > 0.06
            close = points[(away < 0.09) & beyond]
            highest = max(highest, float(close[:, 2].max()) if len(close) else 0.0)
            around = np.linalg.norm(points[:, :2] - self._target_xy, axis=1)
            under = points[around < (0.04 if self._goal.kind == "on" else 0.12)]
            supports += [float(under[:, 2].max())] if len(under) else []
        support = max(supports)
        self._release_bottom = support + (0.006 if self._goal.kind == "on" else -0.03)
        bottom = float(self._scene.points(self._item_root)[:, 2].min())
        return max(highest + _CLEAR, support + _ABOVE, bottom + 0.04)


def settle(env: LiberoEnv, steps: int = 10) -> None:
    """Let objects come to rest: `steps` no-op actions with the gripper open, as the evaluation protocol does."""
    action = np.array([0.0] * 6 + [OPEN])
    for _ in range(steps):
        env.step(action)


def derive_seed(*parts: int | str) -> int:
    """A 32-bit seed from `parts`, the same on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")


@dataclass(frozen=True)
class Demonstration:
    """Outcome of one attempt: `episode` is None if the task was not solved; `ended_in` names the last phase."""

    episode: Episode | None
    steps: int
    ended_in: str


def demonstrate(env: LiberoEnv, seed: int, source: str, noise: bool = True) -> Demonstration:
    """Reset `env` to a placement drawn with `seed`, let the expert solve the task, record it.

    The grasp is chosen before the hand is moved to a random start, so that the choice depends on the objects alone.
    """
    rng = np.random.default_rng(derive_seed(seed, "noise"))
    env.reset(None, seed=seed)
    settle(env)
    expert = Expert(env)
    level = float(rng.choice(NOISE_LEVELS)) if noise else 0.0
    if noise:
        _random_start(env, rng)
    observations: list[Observation] = []
    actions: list[np.ndarray] = []
    previous: np.ndarray | None = None
    drift, solved = np.zeros(6), False
    for _ in range(MAX_STEPS):
        delicate = expert.delicate
        action = expert.act()
        if not is_no_op(action, previous):
            observations.append(env.observe())
            actions.append(action)
        drift = _NOISE_MEMORY * drift + np.sqrt(1 - _NOISE_MEMORY**2) * level * rng.standard_normal(6) * _NOISE_SHARE
        executed = action.copy()
        executed[:6] = np.clip(action[:6] + drift * (_DELICATE_SHARE if delicate else 1.0), -1.0, 1.0)
        solved, previous = env.step(executed), action
        if expert.done:
            break
    success = solved and expert.done and not expert.failed
    episode = _as_episode(env, observations, actions, source) if success else None
    return Demonstration(episode, len(actions), "failed in " + expert.phase if expert.failed else expert.phase)


def _random_start(env: LiberoEnv, rng: np.random.Generator) -> None:
    """0 to 9 unrecorded steps in one random direction."""
    action = np.concatenate([_START_SIZE * rng.standard_normal(6) * _NOISE_SHARE, [OPEN]])
    for _ in range(int(rng.integers(_MAX_START_STEPS + 1))):
        env.step(action)


def _as_episode(env: LiberoEnv, observations: list[Observation], actions: list[np.ndarray], source: str) -> Episode:
    return Episode(
        images=[encode_jpeg(view.image) for view in observations],
        wrist_images=[encode_jpeg(view.wrist_image) for view in observations],
        state=np.stack([view.state for view in observations]),
        joint_state=np.stack([view.joint_state for view in observations]),
        action=np.stack(actions),
        instruction=env.instruction,
        source=source,
    )
