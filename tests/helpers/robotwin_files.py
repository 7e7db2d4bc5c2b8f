"""RoboTwin's episodes in both published layouts, as its own collection writes them (OpenCV, RGB taken for BGR)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np

CAMERAS = {
    "head_camera": "cam_head",
    "left_camera": "cam_left_wrist",
    "right_camera": "cam_right_wrist",
}
SEEN, UNSEEN = ["lift the pot with both arms", "raise the pot"], ["get the pot up"]


def make_episode(frames: int, seed: int, height: int = 24, width: int = 32) -> dict[str, Any]:
    """Joints (T, 14) float64 and pictures (T, H, W, 3) of each camera, RGB."""
    rng = np.random.default_rng(seed)
    joints = rng.uniform(-1, 1, (frames, 14))
    joints[:, [6, 13]] = rng.uniform(0, 1, (frames, 2))
    shape = (frames, height // 8, width // 8, 3)
    pictures = {name: rng.integers(0, 255, shape, np.uint8).repeat(8, axis=1).repeat(8, axis=2) for name in CAMERAS}
    return {"joints": joints, "pictures": pictures}


def _jpegs(pictures: np.ndarray) -> np.ndarray:
    files = [cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures]
    return np.array(files, dtype=f"S{max(map(len, files))}")


def as_read(pictures: np.ndarray) -> np.ndarray:
    """The pictures out of the JPEG files as RoboTwin's own code reads them, by OpenCV."""
    files = [np.frombuffer(file, np.uint8) for file in _jpegs(pictures)]
    return np.stack([np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR)) for file in files])


def write_legacy(
    root: Path, number: int, episode: dict[str, Any], task: str = "lift_pot", config: str = "demo_clean"
) -> Path:
    """data/TASK/CONFIG/data/episodeN.hdf5 and its instructions; returns the file."""
    folder = root / task / config
    for name in ("data", "instructions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    joints, path = episode["joints"], folder / "data" / f"episode{number}.hdf5"
    with h5py.File(path, "w") as file:
        for name, pictures in episode["pictures"].items():
            file[f"observation/{name}/rgb"] = _jpegs(pictures)
            file[f"observation/{name}/intrinsic_cv"] = np.zeros((len(pictures), 3, 3))
        file["joint_action/left_arm"], file["joint_action/left_gripper"] = joints[:, :6], joints[:, 6]
        file["joint_action/right_arm"], file["joint_action/right_gripper"] = joints[:, 7:13], joints[:, 13]
        file["joint_action/vector"] = joints
    (folder / "instructions" / f"episode{number}.json").write_text(json.dumps({"seen": SEEN, "unseen": UNSEEN}))
    return path


def write_v1(root: Path, number: int, episode: dict[str, Any], task: str = "lift_pot") -> Path:
    """TASK/aloha_agilex/data/episode_000000N.hdf5, whose last frame is gone already; returns the file."""
    folder = root / task / "aloha_agilex" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    joints, path = episode["joints"], folder / f"episode_{number:07d}.hdf5"
    text = h5py.string_dtype("utf-8")
    with h5py.File(path, "w") as file:
        file.create_dataset("data_format_version", data="v1.0", dtype=text)
        file.create_dataset("instructions", data=json.dumps(SEEN), dtype=text)
        file["additional_info/frequency"] = np.int32(15)
        for group, values in (("state", joints[:-1]), ("action", joints[1:])):
            file[f"{group}/left_arm_joint_states"], file[f"{group}/left_ee_joint_states"] = (
                values[:, :6],
                values[:, 6:7],
            )
            file[f"{group}/right_arm_joint_states"], file[f"{group}/right_ee_joint_states"] = (
                values[:, 7:13],
                values[:, 13:],
            )
        for name, pictures in episode["pictures"].items():
            file[f"vision/{CAMERAS[name]}/colors"] = _jpegs(pictures[:-1])
            file[f"vision/{CAMERAS[name]}/shape"] = np.array(pictures.shape[1:], np.int32)
    return path
