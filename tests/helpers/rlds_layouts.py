"""RLDS datasets in the layouts of Bridge and ALOHA, small, with numbers that are easy to follow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.vla.datasets.rlds_schema import Images, Numbers, Schema, Texts
from prismatic.vla.datasets.rlds_writer import RLDSWriter, encode_jpeg

SIZE = 16


def gray(level: int) -> bytes:
    """A JPEG of one brightness."""
    return encode_jpeg(np.full((SIZE, SIZE, 3), level, np.uint8))


def write_layout(root: Path, name: str, steps: Mapping[str, Any], *episodes: Mapping[str, Any], **splits: Any) -> Path:
    """Write episodes as the split "train", and further splits by keyword; returns the dataset's folder."""
    schema = Schema(steps)
    payloads = [schema.serialize(episode) for episode in episodes]
    others = {split: [schema.serialize(episode) for episode in held] for split, held in splits.items()}
    return RLDSWriter(root, name, schema=schema).write_splits({"train": payloads, **others})


IMAGE = Images(SIZE, SIZE)


def bridge_episode(steps: int, gripper: list[float]) -> dict[str, Any]:
    """The hand moves t * (1, 2, 3, 4, 5, 6) hundredths in step t; images are t times 20 bright."""
    numbers = np.arange(steps)
    positions = np.cumsum(numbers)[:, None] * np.arange(1, 7) / 100
    return {
        "action": np.concatenate([np.full((steps, 6), 9.0), np.array(gripper)[:, None]], axis=1),
        "observation/state": np.concatenate([positions, numbers[:, None] / 10], axis=1),
        "observation/image_0": [gray(20 * number) for number in numbers],
        "observation/image_1": [gray(255)] * steps,
        "language_instruction": ["put the pot on the stove"] * steps,
    }


BRIDGE_STEPS: dict[str, Any] = {
    "action": Numbers((7,)),
    "observation": {"state": Numbers((7,)), "image_0": IMAGE, "image_1": IMAGE},
    "language_instruction": Texts(),
}


ALOHA_VIEWS = ("image", "left_wrist_image", "right_wrist_image")
ALOHA_STEPS: dict[str, Any] = {
    "action": Numbers((14,)),
    "observation": {"state": Numbers((14,)), **dict.fromkeys(ALOHA_VIEWS, IMAGE)},
    "language_instruction": Texts(),
}


def aloha_episode(steps: int) -> dict[str, Any]:
    """Actions grow by 1 to 14 a step, states fall by 1; the three views are 60, 120 and 180 bright."""
    numbers = np.arange(steps)
    return {
        "action": numbers[:, None] * np.arange(1, 15),
        "observation/state": steps - 1.0 - numbers[:, None] * np.ones(14),
        **{f"observation/{view}": [gray(60 * (number + 1))] * steps for number, view in enumerate(ALOHA_VIEWS)},
        "language_instruction": ["put the pepper into the pot"] * steps,
    }
