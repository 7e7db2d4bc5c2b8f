"""Frames with known geometry for the mini teacher: two views, metric depth, camera poses, from the simulator.

    python -m experiments.mini.make.teacher_data --out FOLDER

One `.npz` a task, resumable: a file that is there is not made again, and `frames.json` beside them says with which
flags they were made, so that frames of others are not taken for them. What varies within a task: the official initial
state, small shifts of the objects, the arm (it wanders between objects and free space, with noise) and the
third-person camera (its pose is perturbed in most frames, so depth cannot be learned by heart). Pictures use the
fast renderer and LIBERO's mirrored orientation, as the demonstrations for the mini student do.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.mini import SCENES
from prismatic.util.cli import run
from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import DAMAGED, atomic_path, atomic_write, read_json, refuse_no_folder
from prismatic.util.flags import check, limited, split_numbers

if TYPE_CHECKING:
    from experiments.robot.libero.simulator.environment import LiberoEnv

Frame = dict[str, np.ndarray]
# Values of the `kinds` map.
SCENE, ROBOT, OBJECT, FIXTURE = range(4)
_ROBOT_PREFIXES = ("robot", "gripper", "mount")
_GEOM = 5  # mujoco.mjtObj.mjOBJ_GEOM
_SETTLE_STEPS = 4
_STEPS_PER_FRAME = 4
_FRAMES_PER_WAYPOINT = 3
_OBJECT_SHIFT = 0.015
_CAMERA_SHIFT, _CAMERA_TURN = 0.06, np.deg2rad(3.0)
_CAMERA_PERTURBED = 0.75
# What frames of the same task depend on.
_RECORDED_FLAGS = ("episodes", "frames", "image_size", "seed")
_WORKSPACE = np.array([[-0.25, -0.3, 0.02], [0.15, 0.35, 0.35]])


def parse_tasks(flag: str, spec: str) -> list[tuple[str, int]]:
    """ "libero_object:0-2,5;libero_goal:0" -> [("libero_object", 0), ...]. Raises UsageError for anything else."""
    tasks = []
    for part in spec.split(";"):
        suite, _, listed = (word.strip() for word in part.partition(":"))
        if not suite or not listed:
            raise UsageError(f"{flag}: {part!r} found; accepted: SUITE:NUMBERS[;SUITE:NUMBERS], as libero_goal:0-3,8")
        tasks += [(suite, number) for number in split_numbers(flag, listed)]
    return tasks


def read_shard(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of these names in a file of frames, one row a frame.

    Raises UsageError: the file is damaged, has no frames, or lacks an array.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            if missing := [name for name in names if name not in archive.files]:
                raise UsageError(f"{file} holds no {', '.join(missing)}; accepted: frames made anew")
            arrays = {name: archive[name] for name in names}
    except UsageError:
        raise
    except (*DAMAGED, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{file} is no readable file of frames ({one_line(error, 120)})") from error
    counts = [len(array) if array.ndim else 0 for array in arrays.values()]
    if len(set(counts)) != 1 or not counts[0]:
        raise UsageError(f"{file} holds {counts} frames; accepted: the same of each, 1 or more")
    return arrays


@dataclass
class TeacherDataConfig:
    """Render frames with geometry for the mini teacher."""

    out: Path  # Folder for the shards, one a task
    tasks: str = "libero_object:0-9;libero_spatial:0-9;libero_goal:0,8"  # SUITE:NUMBERS[;SUITE:NUMBERS]
    episodes: int = limited(14, least=1)  # Episodes a task, each from a random official initial state
    frames: int = limited(14, least=1)  # Two-view frames an episode
    image_size: int = limited(128, least=1)  # Side of the pictures in pixels
    seed: int = limited(0, least=0)
    # task, or moved: one object anywhere on the table
    scene: str = limited("task", choices=SCENES)

    def __post_init__(self) -> None:
        parse_tasks("--tasks", self.tasks)
        check(self)


@dataclass
class TrainTeacherConfig:
    """Train the mini teacher on frames of teacher_data."""

    data: Path  # Folder of teacher_data's shards
    out: Path  # Folder for checkpoint.pt, log.jsonl and evaluation.json
    # Folder for the teacher: config.json, model.safetensors, its readouts, scores and examples; not written if absent
    weights: Path | None = None
    train_tasks: str = "libero_object:0-7;libero_spatial:0-7;libero_goal:0,8"
    held_out_tasks: str = "libero_object:8-9;libero_spatial:8-9"
    steps: int = limited(2500, least=1)
    batch_size: int = limited(16, least=1)
    learning_rate: float = limited(2e-3, above=0)
    weight_decay: float = limited(0.05, least=0)
    warmup_steps: int = limited(100, least=1)
    ema_decay: float = limited(0.995, above=0, below=1)
    # Sizes; see rocket_align.teacher.vggt.config
    image_size: int = limited(84, least=1)
    embed_dim: int = limited(64, least=1)
    depth: int = limited(6, least=1)
    num_heads: int = limited(2, least=1)
    mlp_ratio: float = limited(2.0, above=0)
    vit_depth: int = limited(2, least=1)
    num_register_tokens: int = limited(2, least=0)
    cells: int = limited(4, least=1)  # Side of the square of depth cells per patch
    control: bool = False  # Train the readouts alone, on a random aggregator
    log_every: int = limited(50, least=1)
    save_every: int = limited(100, least=1)
    threads: int = limited(0, least=0)  # CPU threads; 0 leaves the choice to PyTorch
    seed: int = limited(0, least=0)

    def __post_init__(self) -> None:
        parse_tasks("--train_tasks", self.train_tasks)
        parse_tasks("--held_out_tasks", self.held_out_tasks)
        check(self)
        if self.control and self.weights is not None:
            raise UsageError("--weights: not with --control true, whose aggregator is random; leave one of them out")


class KindMap:
    """Sort each geometry of the scene into SCENE, ROBOT, OBJECT or FIXTURE."""

    def __init__(self, env: LiberoEnv) -> None:
        model = env.domain.sim.model._model
        objects = {item.root_body for item in env.domain.objects_dict.values()}
        fixtures = {item.root_body for item in env.domain.fixtures_dict.values()}
        self._kind_of_geom = np.zeros(model.ngeom + 1, dtype=np.uint8)  # The last entry serves id -1.
        for geom in range(model.ngeom):
            name = model.body(model.body_rootid[model.geom_bodyid[geom]]).name
            if name.startswith(_ROBOT_PREFIXES):
                self._kind_of_geom[geom] = ROBOT
            elif name in objects:
                self._kind_of_geom[geom] = OBJECT
            elif name in fixtures:
                self._kind_of_geom[geom] = FIXTURE

    def __call__(self, segmentation_HW2: np.ndarray) -> np.ndarray:
        """uint8 (H, W) of a camera's segmentation."""
        ids = np.where(segmentation_HW2[..., 1] == _GEOM, segmentation_HW2[..., 0], -1)
        return self._kind_of_geom[ids]


class Wanderer:
    """Actions that take the hand from waypoint to waypoint, half of them close to objects, with noise."""

    def __init__(self, env: LiberoEnv, rng: np.random.Generator) -> None:
        self._env, self._rng = env, rng
        self._noise = np.zeros(6)
        self.next_waypoint()

    def next_waypoint(self) -> None:
        """Choose where to go next and whether the gripper is open on the way."""
        rng, data = self._rng, self._env.domain.sim.data
        self._gripper = rng.choice([-1.0, 1.0])
        bodies = [item.root_body for item in self._env.domain.objects_dict.values()]
        if rng.random() < 0.6:
            above = rng.uniform([-0.04, -0.04, 0.03], [0.04, 0.04, 0.2])
            self._goal = data.get_body_xpos(bodies[rng.integers(len(bodies))]) + above
        else:
            base = self._env.state[2] if rng.random() < 0.2 else min(data.get_body_xpos(body)[2] for body in bodies)
            self._goal = rng.uniform(*_WORKSPACE) + [0.0, 0.0, base]

    def action(self) -> np.ndarray:
        """The next 7-D action."""
        self._noise = 0.8 * self._noise + self._rng.normal(0.0, 0.12, 6)
        towards = 3.0 * (self._goal - self._env.state[:3]) / 0.05
        towards /= max(1.0, np.abs(towards).max())
        motion = np.concatenate([towards, np.zeros(3)]) + self._noise * [1, 1, 1, 0.5, 0.5, 0.5]
        return np.append(np.clip(motion, -1.0, 1.0), self._gripper)


class CameraShaker:
    """Moves and turns the third-person camera a little in most frames, and puts it back in the others."""

    def __init__(self, env: LiberoEnv, rng: np.random.Generator) -> None:
        self._model, self._rng = env.domain.sim.model._model, rng
        self._camera = self._model.camera("agentview").id
        self._position = self._model.cam_pos[self._camera].copy()
        self._quaternion = self._model.cam_quat[self._camera].copy()

    def shake(self) -> None:
        """Draw a pose; seen by pictures of the following steps."""
        import mujoco

        moved = self._rng.random() < _CAMERA_PERTURBED
        shift = self._rng.normal(0.0, _CAMERA_SHIFT, 3) * moved
        axis = self._rng.normal(0.0, _CAMERA_TURN, 3)
        turn, turned = np.empty(4), np.empty(4)
        angle = np.linalg.norm(axis)
        mujoco.mju_axisAngle2Quat(turn, axis / angle, angle * moved)
        mujoco.mju_mulQuat(turned, self._quaternion, turn)
        self._model.cam_pos[self._camera] = self._position + shift
        self._model.cam_quat[self._camera] = turned


def _shift_objects(env: LiberoEnv, rng: np.random.Generator) -> None:
    data = env.domain.sim.data
    for item in env.domain.objects_dict.values():
        for joint in item.joints:
            pose = np.array(data.get_joint_qpos(joint))
            if pose.shape == (7,):
                pose[:2] += rng.normal(0.0, _OBJECT_SHIFT, 2)
                data.set_joint_qpos(joint, pose)
    env.domain.sim.forward()


def _frame(env: LiberoEnv, kinds: KindMap) -> Frame:
    """One sample, views stacked (agentview, wrist); see `teacher_frames` for the fields."""
    observation, geometry = env.observe(), env.observe_geometry()
    views = list(geometry.values())
    return {
        "images": np.stack([observation.image, observation.wrist_image]),
        "states": observation.state,
        "depths": np.stack([view.depth for view in views]).astype(np.float16),
        "kinds": np.stack([kinds(view.segmentation) for view in views]),
        "intrinsics": np.stack([view.intrinsics for view in views]).astype(np.float32),
        "camera_to_world": np.stack([view.camera_to_world for view in views]).astype(np.float32),
    }


def episode_frames(env: LiberoEnv, kinds: KindMap, count: int, rng: np.random.Generator) -> Iterator[Frame]:
    """`count` frames of one episode from a random official initial state."""
    states = env.init_states
    env.reset(states[rng.integers(len(states))], seed=int(rng.integers(2**31)))
    _shift_objects(env, rng)
    wanderer = Wanderer(env, rng)
    for _ in range(_SETTLE_STEPS):
        env.step(wanderer.action())
    for number in range(count):
        if number % _FRAMES_PER_WAYPOINT == 0:
            wanderer.next_waypoint()
        for _ in range(_STEPS_PER_FRAME):
            env.step(wanderer.action())
        yield _frame(env, kinds)


def task_frames(cfg: TeacherDataConfig, suite: str, task_id: int) -> Iterator[Frame]:
    """All frames of a task; the same configuration gives the same frames."""
    from experiments.mini.moved_scene import make_scene

    rng = np.random.default_rng([cfg.seed, *suite.encode(), task_id])
    options: dict[str, Any] = {"image_size": cfg.image_size, "render": "fast", "camera_depths": True}
    with make_scene(cfg.scene, suite, task_id, **options) as env:
        kinds, shaker = KindMap(env), CameraShaker(env, rng)
        for _ in range(cfg.episodes):
            shaker.shake()
            for frame in episode_frames(env, kinds, cfg.frames, rng):
                shaker.shake()
                yield frame


def _check_origin(cfg: TeacherDataConfig) -> None:
    """Note beside the frames with which flags they are made; raises UsageError when those there have other ones."""
    record, ours = cfg.out / "frames.json", {name: getattr(cfg, name) for name in _RECORDED_FLAGS}
    ours |= {"scene": cfg.scene} if cfg.scene != "task" else {}
    if not record.is_file():
        if any(cfg.out.glob("*.npz")):
            raise UsageError(
                f"{cfg.out}: holds frames and no {record.name} on how they were made; accepted: another folder"
            )
        return atomic_write(record, json.dumps(ours, indent=2) + "\n")
    recorded = read_json(record)
    differing = [
        f"--{name} {recorded.get(name)}, not {value}" for name, value in ours.items() if recorded.get(name) != value
    ]
    if differing:
        raise UsageError(
            f"{cfg.out}: holds frames made with {', '.join(differing)}; accepted: these, or another folder"
        )


def main(cfg: TeacherDataConfig) -> None:
    """Make every shard that is not there yet. Raises UsageError beside frames of other, or of unknown flags."""
    from prismatic.util.progress import progress_bar

    refuse_no_folder("--out", cfg.out)
    _check_origin(cfg)
    tasks = parse_tasks("--tasks", cfg.tasks)
    with progress_bar() as progress:
        bar = progress.add_task("frames", total=len(tasks) * cfg.episodes * cfg.frames, info="")
        for suite, task_id in tasks:
            shard = cfg.out / f"{suite}-{task_id}.npz"
            if shard.exists():
                progress.advance(bar, cfg.episodes * cfg.frames)
                continue
            frames = []
            for frame in task_frames(cfg, suite, task_id):
                frames.append(frame)
                progress.advance(bar)
            with atomic_path(shard) as temporary:
                arrays: dict[str, Any] = {key: np.stack([f[key] for f in frames]) for key in frames[0]}
                np.savez_compressed(temporary, **arrays)
    print(f"{cfg.out}: {len(tasks)} tasks, {len(tasks) * cfg.episodes * cfg.frames} frames")


if __name__ == "__main__":
    run(TeacherDataConfig, main)
