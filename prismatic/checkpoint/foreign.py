"""Folders that openpi and LeRobot wrote, whose statistics alone tell the policy's robot.

Not obvious:
- openpi's may hold statistics of several robots, of other widths, below `assets`. A policy acts for one of them.
- They do not say which action numbers count from the state (openpi's DeltaActions): a flag does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from prismatic.checkpoint.folder import FOREIGN, Checkpoint, foreign_platform
from prismatic.util.errors import UsageError
from prismatic.util.flags import split_names
from prismatic.vla.platforms import Platform


def for_robot(checkpoint: Checkpoint, unnorm_key: str, delta_actions: str = "") -> Checkpoint:
    """The checkpoint as a policy of one robot, with the statistics of that robot alone.

    Args:
        unnorm_key: statistics of the robot; "" takes a checkpoint of one robot.
        delta_actions: see `PolicyFlags`; our and upstream's checkpoints record their robot, and take none.

    Raises:
        UsageError: statistics of several robots and no `unnorm_key`, or `delta_actions` that do not fit.
    """
    if checkpoint.platform.name not in FOREIGN:
        if delta_actions:
            raise UsageError(
                f"--delta_actions: {delta_actions} found; accepted: nothing, since {checkpoint.path} is no folder of "
                "openpi's or LeRobot's, and records how its actions count"
            )
        return checkpoint
    widths = {name: tuple(map(_width, data.values())) for name, data in checkpoint.statistics.items()}
    if not unnorm_key and len(set(widths.values())) > 1:
        choices = ", ".join(f"{name} ({actions} numbers)" for name, (actions, *_) in widths.items())
        raise UsageError(
            f"--unnorm_key: not given, but {checkpoint.path} has statistics of several robots; accepted: {choices}"
        )
    key = unnorm_key or next(iter(widths))
    platform = foreign_platform(checkpoint.path, checkpoint.family, checkpoint.config, checkpoint.statistics, key)
    statistics = {name: data for name, data in checkpoint.statistics.items() if widths[name] == widths[key]}
    if delta_actions:
        delta = _delta(delta_actions, platform)
        statistics = {name: {**data, "action": {**data["action"], "delta": delta}} for name, data in statistics.items()}
    return replace(checkpoint, config={**checkpoint.config, "platform": platform.to_json()}, statistics=statistics)


def _width(statistics: object) -> int:
    return int(np.size(statistics.get("mean", ()))) if isinstance(statistics, Mapping) else 0


def _delta(text: str, platform: Platform) -> list[bool]:
    """One bool for each action number; `text` as the arguments of openpi's `make_bool_mask`."""
    try:
        counts = [int(part) for part in split_names(text)]
    except ValueError:
        raise UsageError(
            f"--delta_actions: {text!r} found; accepted: the numbers of openpi's make_bool_mask, as in 6,-1,6,-1"
        ) from None
    length = sum(map(abs, counts))
    if length <= platform.action_dim:
        delta = [count > 0 for count in counts for _ in range(abs(count))]
        if not any(delta[platform.proprio_dim :]):
            return delta + [False] * (platform.action_dim - length)
    raise UsageError(
        f"--delta_actions: {text} found, for {length} numbers; accepted: up to {platform.action_dim}, the policy's, of "
        f"which those that count from the state are within its {platform.proprio_dim}"
    )
