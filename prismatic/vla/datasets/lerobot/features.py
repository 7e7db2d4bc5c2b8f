"""Find the columns of a LeRobot dataset that are the action, the state and the views of a dataset's specification.

The `lerobot/libero` layout calls them observation.images.image, observation.images.image2 (the wrist),
observation.state and action; `physical-intelligence/libero` image, wrist_image, state and actions; others mix the two.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """Names of the columns that hold what a dataset's specification asks for."""

    spec: DatasetSpec  # The specification, without unused views and states that the dataset lacks
    numbers: Mapping[str, str]  # Feature of the specification -> column
    views: Mapping[str, str]  # View -> image or video column
    used: tuple[str, ...]  # Names of the views that the policy looks at
    language: str  # A column of instructions; "" where the tasks tell them


def _candidates(feature: str) -> list[str]:
    """Names that a feature may have here, the likeliest first."""
    leaf = feature.rsplit("/", 1)[-1]
    named = [prefix + name for name in _NAMES.get(leaf, (leaf,)) for prefix in _PREFIXES]
    return list(dict.fromkeys([feature, feature.replace("/", "."), *named]))


def _find(metadata: Metadata, feature: str, *, image: bool) -> str | None:
    for name in _candidates(feature):
        description = metadata.features.get(name, {"dtype": "string"})
        if description["dtype"] != "string" and (description["dtype"] in ("image", "video")) == image:
            return name
    return None


def find_columns(
    metadata: Metadata,
    spec: DatasetSpec,
    platform: Platform,
    with_proprio: bool = True,
    num_images: int | None = None,
) -> Columns:
    """The columns that hold what `spec` asks for; see :func:`prismatic.vla.datasets.builder.open_dataset`.

    Raises UsageError: a needed one is missing, or actions or states do not have the platform's width.
    """
    file, needed = metadata.folder / "meta" / "info.json", spec.needed(num_images, with_proprio)
    columns = {feature: _find(metadata, feature, image=False) for feature in spec.numbers}
    cameras = {feature: _find(metadata, feature, image=True) for feature in spec.stored_images.values()}
    absent = {feature for feature, column in (columns | cameras).items() if column is None}
    for feature in (*columns, *cameras):
        if feature in absent & needed:
            raise UsageError(
                f"{file}: no {'camera' if feature in cameras else 'column'} for {feature!r} "
                f"(looked for {', '.join(_candidates(feature))}); found: {', '.join(sorted(metadata.features))}"
            )
    spec = spec.without(absent)
    numbers = {feature: column for feature in spec.numbers if (column := columns[feature])}
    views = {view: column for view, feature in spec.stored_images.items() if (column := cameras[feature])}
    spec.check_widths(
        file, {feature: metadata.width(column) for feature, column in numbers.items()}, platform, with_proprio
    )
    used = tuple(view for view, feature in spec.stored_images.items() if feature in needed)
    texts = metadata.features.get(spec.language, {"dtype": ""})["dtype"] == "string"
    return Columns(spec, numbers, views, used, spec.language if texts else "")


def as_rlds_actions(action_FA: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """Actions with the gripper as the RLDS data have it before they are standardized.

    For LIBERO that is -1 (open) to +1 (close), as in `lerobot/libero` and `physical-intelligence/libero`. Conversions
    that were standardized already (1 open, 0 closed) never are negative, and are turned back.
    """
    gripper = action_FA[:, -1:]
    if spec.standardize is not libero_transform or (gripper < 0).any():
        return action_FA
    return np.concatenate([action_FA[:, :-1], 1.0 - 2.0 * gripper], axis=1).astype(np.float32)
