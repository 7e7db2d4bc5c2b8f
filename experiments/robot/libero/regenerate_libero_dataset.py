"""Replay LIBERO's HDF5 demonstrations in the simulator: larger images, no no-ops, successful ones only.

    python experiments/robot/libero/regenerate_libero_dataset.py --libero_task_suite libero_spatial \
        --libero_raw_data_dir LIBERO/datasets/libero_spatial --libero_target_dir LIBERO/datasets/libero_spatial_no_noops

Reads `<task>_demo.hdf5` of every task of the suite and writes files of the same layout, images raw (not rotated), plus
`<suite>_metainfo.json`: each demonstration's initial state and whether its replay succeeded, which
run_libero_eval.py takes as --initial_states_path. Finished tasks are kept when the command is run again.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
from scipy.spatial.transform import Rotation

from experiments.robot.libero.demonstrations import (
    INSTRUCTION,
    Demonstration,
    demonstration_file,
    demonstration_names,
    h5py_module,
    is_no_op,
    open_demonstrations,
    read_array,
    rotate,
    write_demonstration,
)
from experiments.robot.libero.rollouts.protocol import DUMMY_ACTION
from experiments.robot.libero.simulator.rendering import choose_renderer
from experiments.robot.libero.suites.tasks import get_task, num_tasks
from experiments.robot.policy import Render
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_path, atomic_write, read_json, refuse_no_folder
from prismatic.util.flags import check, choose_numbers, limited, numbers

if TYPE_CHECKING:
    from experiments.robot.libero.simulator.environment import LiberoEnv

_SETTLE_STEPS = 10


@dataclass
class RegenerateConfig:
    """Flags of the regeneration; the first three are upstream's."""

    libero_task_suite: str = "libero_spatial"  # libero_spatial, libero_object, libero_goal, libero_10 or libero_90
    libero_raw_data_dir: Path = Path("LIBERO/datasets/libero_spatial")  # Folder of LIBERO's <task>_demo.hdf5
    libero_target_dir: Path = Path("LIBERO/datasets/libero_spatial_no_noops")  # Folder for the new files
    image_size: int = limited(256, least=16, most=4096)  # Side of the images in pixels
    render: Render = "protocol"  # protocol, or fast: quicker, pixels differ slightly from the published data's
    task_ids: str = numbers("all", least=0)  # Task numbers, such as 0,3,5-7, or all
    num_workers: int = limited(1, least=1)  # Processes, each with a simulator of its own (2 GB)

    def __post_init__(self) -> None:
        check(self)
        self.libero_raw_data_dir = Path(self.libero_raw_data_dir).expanduser()
        self.libero_target_dir = Path(self.libero_target_dir).expanduser()

    @property
    def metainfo(self) -> Path:
        return self.libero_target_dir / f"{self.libero_task_suite}_metainfo.json"


def replay(env: LiberoEnv, actions_TA: np.ndarray, initial_state: np.ndarray) -> Demonstration | None:
    """Execute `actions_TA` without no-ops from `initial_state` (after upstream's 10 settle steps); None if it fails.

    A skipped no-op is not executed, so that what follows in the record is what happened. Success is the task's goal
    after the last action.
    """
    env.reset(initial_state)
    for _ in range(_SETTLE_STEPS):
        env.step(np.array(DUMMY_ACTION))
    actions: list[np.ndarray] = []
    rows: list[tuple[np.ndarray, ...]] = []
    solved = False
    for action in actions_TA:
        if is_no_op(action, actions[-1] if actions else None):
            continue
        seen = env.observe()
        state = env.domain.sim.get_state().flatten() if actions else initial_state
        rows.append((state, seen.state, seen.joint_state, rotate(seen.image), rotate(seen.wrist_image)))
        actions.append(action)
        solved = env.step(action)
    if not solved:
        return None
    states, robot, joints, images, wrist_images = (np.stack(column) for column in zip(*rows, strict=True))
    return Demonstration(
        actions=np.stack(actions),
        states=states,
        robot_states=np.concatenate([robot[:, 6:], robot[:, :3], quaternions(robot[:, 3:6])], axis=1),
        ee_states=robot[:, :6],
        gripper_states=robot[:, 6:],
        joint_states=joints,
        images=images,
        wrist_images=wrist_images,
    )


def quaternions(axis_angle_T3: np.ndarray) -> np.ndarray:
    """(x, y, z, w) of rotation vectors of 0 to 2 pi, with the sign that robosuite's conversion came from."""
    return Rotation.from_rotvec(axis_angle_T3).as_quat()


def regenerate_task(config: RegenerateConfig, task_id: int) -> dict[str, object]:
    """Replay a task's demonstrations into its new file; returns {demonstration: {"success", "initial_state"}}."""
    from experiments.robot.libero.simulator.environment import LiberoEnv

    task = get_task(config.libero_task_suite, task_id)
    target = demonstration_file(config.libero_target_dir, task.name)
    report: dict[str, object] = {}
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open_demonstrations(demonstration_file(config.libero_raw_data_dir, task.name)))
        env = stack.enter_context(
            LiberoEnv(config.libero_task_suite, task_id, image_size=config.image_size, render=config.render)
        )
        temporary = stack.enter_context(atomic_path(target))
        with h5py_module().File(temporary, "w") as file:
            file.require_group("data")
            kept = 0
            for name in demonstration_names(raw):
                initial_state = read_array(raw, name, "states")[0]
                demonstration = replay(env, read_array(raw, name, "actions"), initial_state)
                report[name] = {"success": demonstration is not None, "initial_state": initial_state.tolist()}
                if demonstration is not None:
                    write_demonstration(file, f"demo_{kept}", demonstration)
                    kept += 1
            file["data"].attrs["num_demos"] = kept
            file["data"].attrs[INSTRUCTION] = task.instruction
            file["data"].attrs["env_args"] = json.dumps({"image_size": config.image_size, "render": config.render})
    print(f"{target.name}: {kept} of {len(report)} demonstrations kept ({json.dumps(task.instruction)})", flush=True)
    return report


def _todo(config: RegenerateConfig, done: Collection[str]) -> dict[int, str]:
    """{task number: its key in the metainfo} of what is to do. Raises UsageError: files missing, or in the way."""
    count = num_tasks(config.libero_task_suite)
    if not config.libero_raw_data_dir.is_dir():
        raise UsageError(f"--libero_raw_data_dir: no such folder: {config.libero_raw_data_dir}")
    if config.libero_target_dir.resolve() == config.libero_raw_data_dir.resolve():
        raise UsageError(f"--libero_target_dir: {config.libero_target_dir} is the raw folder; accepted: another one")
    tasks = [get_task(config.libero_task_suite, task_id) for task_id in range(count)]
    todo: dict[int, str] = {}
    for task_id in choose_numbers("--task_ids", config.task_ids, count):
        task = tasks[task_id]
        # The same words in another scene (libero_90) are told apart by the task's name.
        repeated = any(other.instruction == task.instruction for other in tasks[:task_id])
        key = task.name if repeated else task.instruction.replace(" ", "_")
        raw = demonstration_file(config.libero_raw_data_dir, task.name)
        new = demonstration_file(config.libero_target_dir, task.name)
        if not raw.is_file():
            raise UsageError(
                f"--libero_raw_data_dir: no such file: {raw}; accepted: a folder with a file for every task"
            )
        if new.is_file() and key not in done:
            raise UsageError(f"--libero_target_dir: {new} is there, but not from this command; remove it")
        if not new.is_file():
            todo[task_id] = key
    return todo


def _reports(config: RegenerateConfig, tasks: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(task, what became of its demonstrations), each as soon as it ends: a file without its report stops a resume."""
    if config.num_workers == 1:
        for task_id in tasks:
            yield task_id, regenerate_task(config, task_id)
        return
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # Read by the workers; every core is used by another one already.
    pool = ProcessPoolExecutor(config.num_workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        pending = {pool.submit(regenerate_task, config, task_id): task_id for task_id in tasks}
        for future in as_completed(pending):
            yield pending[future], future.result()
    except BrokenProcessPool as error:
        raise RuntimeError("a process died (out of memory? fewer --num_workers); run again to continue") from error
    finally:
        pool.shutdown(cancel_futures=True)


def regenerate(config: RegenerateConfig) -> Path:
    """Regenerate what is missing; returns the metainfo file. Raises UsageError for a wrong flag or a damaged file."""
    choose_renderer()
    refuse_no_folder("--libero_target_dir", config.libero_target_dir)
    before = metainfo = read_json(config.metainfo) if config.metainfo.is_file() else {}
    todo = _todo(config, metainfo)
    config.libero_target_dir.mkdir(parents=True, exist_ok=True)
    reports: dict[int, dict[str, Any]] = {}
    for task_id, report in _reports(config, list(todo)):
        reports[task_id] = report
        metainfo = {**before, **{todo[number]: reports[number] for number in todo if number in reports}}
        atomic_write(config.metainfo, json.dumps(metainfo, indent=2))
    kept = sum(entry["success"] for demos in metainfo.values() for entry in demos.values())
    print(f"kept {kept} of {sum(map(len, metainfo.values()))} demonstrations: {config.libero_target_dir}")
    return config.metainfo


def main(config: RegenerateConfig) -> None:
    regenerate(config)


if __name__ == "__main__":
    run(RegenerateConfig, main)
