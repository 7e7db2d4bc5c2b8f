"""LIBERO's demonstration files: one HDF5 file a task, `<task>_demo.hdf5`, with groups data/demo_0, data/demo_1, ...

Not obvious:
- Their images are robosuite's raw ones. The RLDS data and the policies have them rotated by 180 degrees.
- The gripper's action is -1 (open) or +1 (close), in HDF5 and in RLDS alike.
- LIBERO's published files hold actions in which the hand does not move; the `no_noops` data lack these.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero.suites.task import MAX_STEPS, name_in_words
from prismatic.util.errors import UsageError, one_line

_SUFFIX = "_demo.hdf5"
_NO_OP_SIZE = 1e-4
INSTRUCTION = "instruction"  # attribute of a regenerated file
INSTALL_HINT = 'pip install "rocket-vla[sim]"'


def is_no_op(action: np.ndarray, previous: np.ndarray | None) -> bool:
    """Tell whether an action neither moves the hand nor changes the gripper; the published `no_noops` data lack these.

    Upstream's rule: the first six entries have a norm below 1e-4 and the gripper's command is the previous action's.
    """
    still = float(np.linalg.norm(action[:-1])) < _NO_OP_SIZE
    return still and (previous is None or action[-1] == previous[-1])


def rotate(images_THW3: np.ndarray) -> np.ndarray:
    """Images rotated by 180 degrees: raw to policy, or back."""
    return np.ascontiguousarray(images_THW3[..., ::-1, ::-1, :])


@dataclass(frozen=True)
class Demonstration:
    """One demonstration of T steps as LIBERO's files hold it.

    Attributes:
        actions: (T, 7), gripper -1 open, +1 close.
        states: (T, 1 + nq + nv), the simulator's time, positions and velocities before each action.
        robot_states: (T, 9), finger positions, hand position, hand quaternion (x, y, z, w).
        ee_states: (T, 6), hand position and axis-angle; gripper_states: (T, 2); joint_states: (T, 7).
        images, wrist_images: uint8 (T, H, W, 3), raw: not rotated.
    """

    actions: np.ndarray
    states: np.ndarray
    robot_states: np.ndarray
    ee_states: np.ndarray
    gripper_states: np.ndarray
    joint_states: np.ndarray
    images: np.ndarray
    wrist_images: np.ndarray

    def __len__(self) -> int:
        return len(self.actions)


# Attribute of a demonstration -> data set in its HDF5 group.
_DATASETS = {
    "actions": "actions",
    "states": "states",
    "robot_states": "robot_states",
    "ee_states": "obs/ee_states",
    "gripper_states": "obs/gripper_states",
    "joint_states": "obs/joint_states",
    "images": "obs/agentview_rgb",
    "wrist_images": "obs/eye_in_hand_rgb",
}
_WIDTHS = {"actions": 7, "ee_states": 6, "gripper_states": 2, "joint_states": 7}


def h5py_module() -> Any:
    """h5py. Raises UsageError when it is not installed."""
    try:
        import h5py
    except ImportError as error:
        raise UsageError(f"HDF5 files need h5py ({error}); install it with: {INSTALL_HINT}") from error
    return h5py


def demonstration_file(folder: Path, task: str) -> Path:
    return folder / f"{task}{_SUFFIX}"


def demonstration_files(folder: Path, flag: str) -> list[Path]:
    """All demonstration files of a folder, by name. Raises UsageError when there are none."""
    if not folder.is_dir():
        raise UsageError(f"{flag}: no such folder: {folder}")
    files = sorted(folder.glob(f"*{_SUFFIX}"))
    if not files:
        raise UsageError(f"{flag}: {folder} holds no *{_SUFFIX}; accepted: a folder of LIBERO's HDF5 demonstrations")
    return files


def instruction_of(file: Path) -> str:
    """The instruction of a file's demonstrations, in the wording that the evaluation tells.

    regenerate_libero_dataset.py records it. In LIBERO's own files it is the words of the file's name, without a leading
    scene such as KITCHEN_SCENE3; in files about another suite's tasks (LIBERO-PRO's, your own) the recorded sentence.
    """
    with open_demonstrations(file) as content:
        recorded = content["data"].attrs
        if INSTRUCTION in recorded:
            return str(recorded[INSTRUCTION])
        suite = Path(str(recorded.get("bddl_file_name", ""))).parent.name
        about = str(recorded.get("problem_info", ""))
    if suite and suite not in MAX_STEPS:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            sentence = json.loads(about)["language_instruction"]
            words = sentence if isinstance(sentence, str) else "".join(sentence)
            return " ".join(words.strip('"').split()).lower()
    return name_in_words(file.name.removesuffix(_SUFFIX))


def open_demonstrations(path: Path) -> Any:
    """The HDF5 file, opened for reading. Raises UsageError when it is missing, of another kind, or without `data`."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file; accepted: LIBERO's demonstrations of this task")
    try:
        file = h5py_module().File(path, "r")
    except OSError as error:
        raise UsageError(f"{path}: no readable HDF5 file ({one_line(error, 120)})") from error
    if "data" not in file:
        file.close()
        raise UsageError(f"{path}: no group 'data'; accepted: a LIBERO demonstration file")
    return file


def demonstration_names(file: Any) -> list[str]:
    """demo_0, demo_1, ... as far as they are there, in the order of their numbers."""
    return sorted((name for name in file["data"] if re.fullmatch(r"demo_\d+", name)), key=lambda name: int(name[5:]))


def read_array(file: Any, demo: str, attribute: str) -> np.ndarray:
    """An array by its name in :class:`Demonstration`; raises UsageError when it is missing or of another width."""
    name = _DATASETS[attribute]
    group = file["data"][demo]
    if name not in group:
        raise UsageError(f"{file.filename}: {demo}: no data set {name}; found: {', '.join(sorted(group))}")
    array = np.asarray(group[name])
    width = _WIDTHS.get(attribute)
    if width is not None and (array.ndim != 2 or array.shape[1] != width or not np.isfinite(array).all()):
        raise UsageError(f"{file.filename}: {demo}: {name} has shape {array.shape}; accepted: (steps, {width}), finite")
    return array


def read_demonstrations(path: Path) -> Iterator[tuple[str, Demonstration]]:
    """Yield (name, demonstration), one in memory at a time. Raises UsageError for one that is not whole."""
    with open_demonstrations(path) as file:
        for name in demonstration_names(file):
            content = Demonstration(**{attribute: read_array(file, name, attribute) for attribute in _DATASETS})
            lengths = {_DATASETS[attribute]: len(getattr(content, attribute)) for attribute in _DATASETS}
            if len(set(lengths.values())) != 1 or not len(content):
                raise UsageError(f"{path}: {name}: lengths {lengths}; accepted: equal ones, above 0")
            yield name, content


def write_demonstration(file: Any, name: str, demonstration: Demonstration) -> None:
    """Add one successful demonstration to an HDF5 file opened for writing; images are compressed (gzip, lossless)."""
    group = file.require_group("data").create_group(name)
    for attribute, dataset in _DATASETS.items():
        array = getattr(demonstration, attribute)
        options = {"chunks": (1, *array.shape[1:]), "compression": "gzip", "compression_opts": 1}
        group.create_dataset(dataset, data=array, **(options if array.ndim == 4 else {}))
    group["obs"].create_dataset("ee_pos", data=demonstration.ee_states[:, :3])
    group["obs"].create_dataset("ee_ori", data=demonstration.ee_states[:, 3:])
    last = (np.arange(len(demonstration)) == len(demonstration) - 1).astype(np.uint8)
    group.create_dataset("dones", data=last)
    group.create_dataset("rewards", data=last)
    group.attrs["num_samples"] = len(demonstration)
