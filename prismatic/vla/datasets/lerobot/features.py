"""Which columns of a LeRobot dataset are the action, the state and the views that a dataset's specification asks for.

The `lerobot/libero` layout calls them observation.images.image, observation.images.image2 (the wrist),
observation.state and action; `physical-intelligence/libero` image, wrist_image, state and actions; others mix the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prismatic.util.errors import UsageError
from prismatic.vla.datasets.lerobot.metadata import Metadata
from prismatic.vla.datasets.specs import DatasetSpec, libero_transform
from prismatic.vla.platforms import Platform

# Last part of the RLDS feature's name -> names in LeRobot datasets, the likeliest first.
_NAMES = {
    "image": ("image", "cam_high"),
    "wrist_image": ("wrist_image", "image2"),
    "left_wrist_image": ("left_wrist_image", "cam_left_wrist"),
    "right_wrist_image": ("right_wrist_image", "cam_right_wrist"),
    "action": ("action", "actions"),
}
_PREFIXES = ("observation.images.", "observation.", "")


@dataclass(frozen=True)
class Columns:
    """Names of the columns: action, state, and the image or video feature of each view."""

    action: str
    state: str
    views: dict[str, str]


def _candidates(feature: str) -> Iterator[str]:
    leaf = feature.rsplit("/", 1)[-1]
    for name in _NAMES.get(leaf, (leaf,)):
        for prefix in _PREFIXES:
            yield prefix + name


def _find(metadata: Metadata, feature: str, *, image: bool) -> str:
    names = list(dict.fromkeys(_candidates(feature)))
    for name in names:
        if name in metadata.features and (metadata.features[name]["dtype"] in ("image", "video")) == image:
            return name
    raise UsageError(
        f"{metadata.folder / 'meta' / 'info.json'}: no {'camera' if image else 'column'} for {feature!r} "
        f"(looked for {', '.join(names)}); found: {', '.join(sorted(metadata.features))}"
    )


def find_columns(metadata: Metadata, spec: DatasetSpec, platform: Platform, with_proprio: bool = True) -> Columns:
    """The columns that hold what `spec` asks for; states that are not used may have any width.

    Raises:
        UsageError: one is missing, or actions or states do not have the platform's width.
    """
    columns = Columns(
        action=_find(metadata, spec.action, image=False),
        state=_find(metadata, spec.state, image=False),
        views={view: _find(metadata, feature, image=True) for view, feature in spec.stored_images.items()},
    )
    checked = [(columns.action, platform.action_dim)]
    checked += [(columns.state, platform.proprio_dim)] if with_proprio else []
    for name, width in checked:
        shape = tuple(metadata.features[name]["shape"])
        if shape != (width,):
            raise UsageError(
                f"{metadata.folder / 'meta' / 'info.json'}: feature {name} has shape {shape}; "
                f"accepted for platform {platform.name!r}: ({width},)"
            )
    return columns


def as_rlds_actions(action_FA: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """Actions with the gripper as the RLDS data have it before they are standardized.

    For LIBERO that is -1 (open) to +1 (close), as in `lerobot/libero` and `physical-intelligence/libero`. Conversions
    that were standardized already (1 open, 0 closed) never are negative, and are turned back.
    """
    gripper = action_FA[:, -1:]
    if spec.standardize is not libero_transform or (gripper < 0).any():
        return action_FA
    return np.concatenate([action_FA[:, :-1], 1.0 - 2.0 * gripper], axis=1).astype(np.float32)
