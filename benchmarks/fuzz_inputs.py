"""Valid inputs of every command that `fuzz.py` tries: made by the commands themselves, or as other projects do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "experiments" / "mini" / "weights"
SUITE = "libero_object"


def prepare(folder: Path, invoke: Callable[[list[str]], Any]) -> None:
    """Write all of them; `invoke` runs a command. Raises RuntimeError where one ends with an error."""
    from tests.helpers.tiny_pi import write_tiny_pi

    shutil.copytree(ROOT / "tests" / "golden" / "rlds", folder / "data")
    for name in ("student", "teacher"):
        shutil.copytree(WEIGHTS / name, folder / name)
    write_tiny_pi(folder / "pi05", "pi05")
    acting = ["--num_images_in_input", "2", "--use_proprio", "True", "--data_root_dir", f"{folder}/data"]
    student = ["--vla_path", f"{folder}/student", *acting, "--vggt_path", f"{folder}/teacher", "--num_workers", "0"]
    training = ["--run_root_dir", f"{folder}/runs", "--trackers", "none", "--save_freq", "1", "--batch_size", "1"]
    training += ["--lora_rank", "2"]
    pi = ["--vla_path", f"{folder}/pi05", *acting, "--num_workers", "0", "--recipe", "baseline", "--max_steps", "1"]
    store = ["--feature_store", f"{folder}/store", "--components", "8", "--fit_frames", "8"]
    for words in (
        ["vla-scripts/finetune.py", *student, *training, "--run_id_override", "run", "--max_steps", "2"],
        ["vla-scripts/finetune.py", *pi, *training, "--run_id_override", "pi"],
        ["vla-scripts/build_feature_store.py", *student, *store],
        ["vla-scripts/select_layers.py", "--strategy", "uniform", "--count", "2", "--checkpoint", f"{folder}/student",
         "--vggt_path", f"{folder}/teacher", "--out", f"{folder}/layers.json"],
    ):  # fmt: skip
        outcome = invoke(words)
        if outcome.code:
            raise RuntimeError(f"{words} ended with {outcome}")
    _write_results(folder / "results")
    _write_data(folder)


def _write_results(folder: Path) -> None:
    """An evaluation of two tasks, as `run_libero_eval.py` writes it."""
    from experiments.robot.libero.results import EpisodeResult, RunFolder
    from experiments.robot.libero.rollouts.protocol import Episode

    environment = {"checkpoint": "runs/run--2_chkpt"}
    with RunFolder(folder, {"suite": "libero_goal", "seed": 7}, environment) as results:
        results.plan(Episode("libero_goal", task, "do it", number, 7) for task in (0, 3) for number in range(2))
        for task in (0, 3):
            for number in range(2):
                results.append(EpisodeResult("libero_goal", task, "do it", number, 7, "success", True, 90, None, 1.5))
        results.write_summary()


def _write_data(folder: Path) -> None:
    """Demonstrations of LIBERO and RoboTwin in HDF5, LeRobot's layouts, frames with geometry, initial states."""
    from tests.helpers.lerobot_files import LeRobotFiles
    from tests.helpers.rlds_files import episode
    from tests.helpers.robotwin_files import make_episode, write_legacy, write_v1

    _write_hdf5(folder / "hdf5")
    write_legacy(folder / "robotwin", 0, make_episode(3, 0))
    write_v1(folder / "robotwin", 0, make_episode(3, 1), task="stack_bowls")
    episodes = [episode(steps, seed, "open the drawer") for seed, steps in enumerate((12, 9))]
    for version in ("v3.0", "v2.1"):
        LeRobotFiles(folder / f"lerobot{version[1]}" / "libero_goal_no_noops", version).write(episodes)
    (folder / "frames").mkdir()
    for task in (0, 1):
        _write_frames(folder / "frames" / f"{SUITE}-{task}.npz", seed=task)
    entry = {"demo_0": {"success": True, "initial_state": [0.0] * 77}}
    (folder / "states.json").write_text(json.dumps({"do_it": entry}))


def _write_hdf5(folder: Path) -> None:
    import h5py

    from experiments.robot.libero.demonstrations import Demonstration, demonstration_file, write_demonstration
    from experiments.robot.libero.suites.tasks import get_task

    folder.mkdir()
    widths = {"actions": 7, "states": 77, "robot_states": 9, "ee_states": 6, "gripper_states": 2, "joint_states": 7}
    numbers = {name: np.zeros((4, width)) for name, width in widths.items()}
    images = np.zeros((4, 8, 8, 3), np.uint8)
    with h5py.File(demonstration_file(folder, get_task(SUITE, 0).name), "w") as file:
        write_demonstration(file, "demo_0", Demonstration(images=images, wrist_images=images, **numbers))


def _write_frames(file: Path, seed: int, frames: int = 4, side: int = 84) -> None:
    """Two views of random pictures, seen by cameras that look along z."""
    rng = np.random.default_rng(seed)
    cameras = np.tile(np.eye(4, dtype=np.float32), (frames, 2, 1, 1))
    cameras[..., :3, 3] = rng.normal(size=(frames, 2, 3))
    lenses = np.tile(np.diag([-90.0, 90.0, 1.0]).astype(np.float32), (frames, 2, 1, 1))
    lenses[..., :2, 2] = side / 2
    pictures = (frames, 2, side, side)
    np.savez_compressed(
        file,
        images=rng.integers(0, 255, (*pictures, 3), np.uint8),
        depths=rng.uniform(0.5, 3, pictures).astype(np.float16),
        kinds=rng.integers(0, 4, pictures, np.uint8),
        intrinsics=lenses,
        camera_to_world=cameras,
        states=rng.normal(size=(frames, 8)),
    )
