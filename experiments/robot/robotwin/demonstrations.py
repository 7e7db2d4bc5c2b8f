"""RoboTwin's demonstrations: one HDF5 file an episode, in the layout until July 2026 or in XPolicyLab's "v1.0".

    legacy   TASK/CONFIG/data/episode0.hdf5 with /observation/CAMERA/rgb and /joint_action, TASK/CONFIG/instructions/;
             CONFIG is demo_clean where it was collected, and aloha-agilex_clean_50 in downloads
    v1.0     TASK/aloha_agilex/data/episode_0000000.hdf5 with /vision/CAMERA/colors, /state, /action, /instructions

Not obvious:
- RoboTwin hands its RGB pictures to OpenCV's encoder, which takes them for BGR: decoded by anything but OpenCV, red and
  blue are exchanged. Pictures are turned back here.
- The action of a frame is the joints of the next one, and the last frame has none. v1.0 files have that in them, legacy
  files do not. A v1.0 file whose actions are the same frame's joints (an option of its converter) is shifted, too.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero.demonstrations import h5py_module
from prismatic.util.errors import UsageError, one_line
from prismatic.vla.datasets.image_transforms import decode_with_pillow

ARM_JOINTS = 6
LEGACY_FPS = 15  # Their frames are 15 steps of a simulation of 250 Hz apart; RoboTwin's own converter calls that 15.
EPISODE = re.compile(r"episode_?(\d+)\.hdf5")
# Ours -> the camera in a legacy and in a v1.0 file.
CAMERAS = {
    "image": ("head_camera", "cam_head"),
    "left_wrist_image": ("left_camera", "cam_left_wrist"),
    "right_wrist_image": ("right_camera", "cam_right_wrist"),
}
# Names of configurations: of the two that datasets are known by, and of others.
_CONFIGURATION = re.compile(r"(?:demo_|aloha[-_]agilex_)(clean|randomized)(?:_\d+)?|demo_(.+)")
_OTHER_ROBOTS = ("arx", "franka", "piper", "ur5")  # Begin the folders of other robots' downloads.
_LEGACY_JOINTS = ("left_arm", "left_gripper", "right_arm", "right_gripper")
_JOINTS = ("left_arm_joint_states", "left_ee_joint_states", "right_arm_joint_states", "right_ee_joint_states")


@dataclass(frozen=True)
class Demonstration:
    """An episode of T steps.

    Attributes:
        pictures: camera -> T pictures as they are stored: encoded, or uint8 (H, W, 3).
        state: (T, 14) float32: left arm's 6 joints (rad) and gripper (0 closed, 1 open), then the right one's.
        action: (T, 14), the same of the next frame.
        instructions: what the robot was asked to do, in several wordings; () when the files do not tell.
    """

    pictures: dict[str, Sequence[bytes] | np.ndarray]
    state: np.ndarray
    action: np.ndarray
    instructions: tuple[str, ...]
    fps: float

    def __len__(self) -> int:
        return len(self.action)


def decode_picture(picture: bytes | np.ndarray, blue_first: bool = True) -> np.ndarray:
    """RGB uint8 (H, W, 3) of a stored picture; `blue_first`: encoded ones are as RoboTwin writes them.

    Raises ValueError: the bytes are no complete image.
    """
    if isinstance(picture, np.ndarray) and picture.ndim == 3:
        return picture
    image = decode_with_pillow(bytes(picture))
    return np.ascontiguousarray(image[..., ::-1]) if blue_first else image


def episode_files(folder: Path) -> list[Path]:
    """All episodes below a folder, those of a task together and in the order of their numbers."""

    def place(file: Path) -> tuple[Path, int]:
        match = EPISODE.fullmatch(file.name)
        return file.parent, int(match[1]) if match else -1

    return sorted((file for file in folder.rglob("episode*.hdf5") if EPISODE.fullmatch(file.name)), key=place)


def read_demonstration(path: Path, split: str = "seen") -> Demonstration:
    """Read an episode of either layout; `split` is of a legacy file's instructions, v1.0 files hold the seen ones.

    Raises UsageError: the file is damaged, of another layout or another robot; names it.
    """
    h5py, path = h5py_module(), Path(os.path.abspath(path))
    try:
        with h5py.File(path, "r") as file:
            if "joint_action" in file:
                return _read_legacy(path, file, split)
            if "state" in file and "vision" in file:
                return _read_v1(file)
            raise ValueError(f"groups {', '.join(file) or 'none'}; accepted: joint_action, or vision and state")
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: no whole RoboTwin episode ({one_line(error, 200)})") from error


def _read_legacy(path: Path, file: Any, split: str) -> Demonstration:
    joints = _vector(file["joint_action"], _LEGACY_JOINTS)
    pictures = {name: _pictures(file["observation"][camera]["rgb"]) for name, (camera, _) in CAMERAS.items()}
    number = int(EPISODE.fullmatch(path.name)[1])  # type: ignore[index]
    texts = path.parents[1] / "instructions" / f"episode{number}.json"
    content = json.loads(texts.read_text(encoding="utf-8")) if texts.is_file() else {}
    instructions = _texts(content.get(split, ())) if isinstance(content, dict) else _texts(content)
    return _checked(pictures, joints[:-1], joints[1:], instructions, LEGACY_FPS)


def _read_v1(file: Any) -> Demonstration:
    state = _vector(file["state"], _JOINTS)
    action = _vector(file["action"], _JOINTS) if "action" in file else state
    pictures = {name: _pictures(file["vision"][camera]["colors"]) for name, (_, camera) in CAMERAS.items()}
    stored = next((file[name][()] for name in ("instructions", "instruction") if name in file), ())
    info = file.get("additional_info", {})
    fps = float(info["frequency"][()]) if "frequency" in info else LEGACY_FPS
    if np.array_equal(action, state):
        return _checked(pictures, state[:-1], state[1:], _texts(stored), fps)
    return _checked(pictures, state, action, _texts(stored), fps)


def _vector(group: Any, names: Sequence[str]) -> np.ndarray:
    """(T, 14) float32."""
    parts = [np.asarray(group[name], np.float32) for name in names]
    parts = [part[:, None] if part.ndim == 1 else part for part in parts]
    widths = [part.shape[1] if part.ndim == 2 else 0 for part in parts]
    if widths != [ARM_JOINTS, 1, ARM_JOINTS, 1]:
        raise ValueError(f"arms and grippers of {widths} numbers; accepted: those of aloha-agilex, 6, 1, 6 and 1")
    vector = np.concatenate(parts, axis=1)
    if not np.isfinite(vector).all():
        raise ValueError("joints that are not finite")
    return vector


def _pictures(dataset: Any) -> Sequence[bytes] | np.ndarray:
    stored = dataset[()]
    return stored if stored.ndim == 4 and stored.dtype == np.uint8 else [bytes(picture) for picture in stored]


def _checked(
    pictures: dict[str, Any], state: np.ndarray, action: np.ndarray, instructions: tuple[str, ...], fps: float
) -> Demonstration:
    """The demonstration, without a last picture that has no action."""
    steps = len(action)
    lengths = {name: len(values) for name, values in pictures.items()}
    if not 0 < fps < math.inf:
        raise ValueError(f"{fps} frames a second; accepted: a positive number")
    if not steps or len(state) != steps or not set(lengths.values()) <= {steps, steps + 1}:
        raise ValueError(f"{len(state)} states, {steps} actions and pictures {lengths}; accepted: as many of each")
    return Demonstration({name: values[:steps] for name, values in pictures.items()}, state, action, instructions, fps)


def _texts(stored: Any) -> tuple[str, ...]:
    """The instructions in a text, a list of texts, or either of them as JSON."""
    if isinstance(stored, bytes | str):
        text = stored.decode() if isinstance(stored, bytes) else stored
        return _texts(json.loads(text)) if text.startswith("[") else tuple(filter(None, [text.strip()]))
    if not isinstance(stored, list | tuple | np.ndarray):
        raise ValueError(f"instructions: {stored!r} found; accepted: texts")
    return tuple(dict.fromkeys(text for part in stored for text in _texts(part)))


def task_of(file: Path) -> str:
    """Name of the task of an episode's file."""
    return file.parents[min(2, len(file.parents) - 1)].name or "task"


def grouped(files: Sequence[Path], config: str) -> Iterator[tuple[str, list[Path]]]:
    """(dataset's name, its files) for every task: robotwin_TASK_clean or robotwin_TASK_randomized.

    `config` is of files whose folders do not tell it (downloads of v1.0 files). Raises UsageError: another robot's.
    """
    groups: dict[str, list[Path]] = {}
    for file in files:
        folders = [folder.name for folder in file.parents[1:4]]
        if folders and folders[0].lower().startswith(_OTHER_ROBOTS):
            raise UsageError(f"--data_dir: {file.parents[1]} of another robot found; accepted: those of aloha-agilex")
        told = next(filter(None, map(_CONFIGURATION.fullmatch, [*folders, config])), None)
        kind = (told[1] or told[2]) if told else config
        groups.setdefault(f"robotwin_{task_of(file)}_{kind}", []).append(file)
    yield from groups.items()
