"""Robot platforms as data: how long an action chunk is, how wide actions and proprioception are, how they scale.

Upstream guesses the platform from the words on the command line. Here it is a value: a training run names one, the
checkpoint stores it (field `platform` of the model's configuration), and evaluation reads it from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np

from prismatic.util.errors import UsageError, one_line, unknown_name
from prismatic.util.files import read_mapping


class NormalizationType(str, Enum):
    """Statistics that map actions and proprioception to [-1, 1] (or to unit variance)."""

    NORMAL = "normal"
    BOUNDS = "bounds"
    BOUNDS_Q99 = "bounds_q99"

    def bounds(self, statistics: Mapping[str, Sequence[float]]) -> tuple[Sequence[float], Sequence[float]]:
        """The (low, high) entries of one dataset's action or proprio `statistics` that map to -1 and +1.

        Raises ValueError for NORMAL, which has no bounds.
        """
        if self is NormalizationType.BOUNDS_Q99:
            return statistics["q01"], statistics["q99"]
        if self is NormalizationType.BOUNDS:
            return statistics["min"], statistics["max"]
        raise ValueError(f"normalization {self.value!r} has no bounds; accepted: bounds, bounds_q99")


class OpenPINormalization(str, Enum):
    """openpi's normalization for pi0 (mean_std) and pi0.5 (quantiles to [-1, 1]): of every number, unclipped."""

    MEAN_STD = "mean_std"
    QUANTILES = "quantiles"

    def bounds(self, statistics: Mapping[str, Sequence[float]]) -> NoReturn:
        """Raises ValueError: see `statistics.openpi_normalizer` instead."""
        raise ValueError(f"normalization {self.value!r} is openpi's; accepted: bounds, bounds_q99")


OPENPI_NORMALIZATION = {"pi0": OpenPINormalization.MEAN_STD, "pi05": OpenPINormalization.QUANTILES}
Normalization: TypeAlias = NormalizationType | OpenPINormalization


def _normalization(value: str) -> Normalization:
    openpi = value in tuple(OpenPINormalization)
    return OpenPINormalization(value) if openpi else NormalizationType(value)


@dataclass(frozen=True)
class Platform:
    """The numbers of one robot platform.

    chunk: actions predicted at once; action_dim: numbers per action; proprio_dim: numbers of proprioceptive state, 0
    for a robot without.
    """

    name: str
    chunk: int
    action_dim: int
    proprio_dim: int
    normalization: Normalization

    def __post_init__(self) -> None:
        object.__setattr__(self, "normalization", _normalization(self.normalization))
        for field_name in ("chunk", "action_dim", "proprio_dim"):
            value = getattr(self, field_name)
            least = 0 if field_name == "proprio_dim" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"platform {self.name!r}: {field_name} is {value!r}; accepted: a whole number from {least} on"
                )

    @property
    def num_action_tokens(self) -> int:
        """Action tokens in one sequence: one for each number of each action of the chunk."""
        return self.chunk * self.action_dim

    def to_json(self) -> dict[str, Any]:
        """The numbers as a JSON object, which :meth:`from_json` reads back."""
        return {**asdict(self), "normalization": self.normalization.value}

    @classmethod
    def from_json(cls, content: Any, source: str = "platform") -> Platform:
        """The platform of such an object; without `normalization` it is bounds_q99, without `proprio_dim` 0.

        Raises UsageError: missing, unknown or wrong fields; the message begins with `source`.
        """
        names = [field.name for field in fields(cls)]
        optional = {"normalization", "proprio_dim"}
        if not isinstance(content, Mapping) or not set(names) - optional <= set(content) <= set(names):
            given = sorted(map(str, content)) if isinstance(content, Mapping) else f"of a {type(content).__name__}"
            raise UsageError(f"{source}: found fields {given}; accepted: exactly {', '.join(names)}")
        try:
            return cls(**{"normalization": NormalizationType.BOUNDS_Q99, "proprio_dim": 0, **content})
        except ValueError as error:
            raise UsageError(f"{source}: {error}") from error

    to_dict = to_json  # Earlier name.


LIBERO = Platform("libero", chunk=8, action_dim=7, proprio_dim=8, normalization=NormalizationType.BOUNDS_Q99)
ALOHA = Platform("aloha", chunk=25, action_dim=14, proprio_dim=14, normalization=NormalizationType.BOUNDS)
BRIDGE = Platform("bridge", chunk=5, action_dim=7, proprio_dim=7, normalization=NormalizationType.BOUNDS_Q99)
# RoboTwin's robot: of each arm six absolute joint angles (rad) and the gripper in [0, 1], 1 = open; left arm first.
ALOHA_AGILEX = replace(ALOHA, name="aloha_agilex")

UPSTREAM = (LIBERO, ALOHA, BRIDGE)
PLATFORMS: dict[str, Platform] = {platform.name: platform for platform in (*UPSTREAM, ALOHA_AGILEX)}


def get_platform(platform: str | Mapping[str, Any] | Platform) -> Platform:
    """The platform of that name (any case), of that dictionary of fields, of a JSON or YAML file, or `platform` itself.

    A file that gives no name is named by itself.

    Raises UsageError for an unknown name, no such file, or missing, unknown or wrong fields.
    """
    if isinstance(platform, Platform):
        return platform
    if isinstance(platform, Mapping):
        return Platform.from_json(platform)
    if platform.lower() not in PLATFORMS and Path(platform).suffix in (".json", ".yaml", ".yml"):
        content = read_mapping(Path(platform))
        return Platform.from_json({"name": Path(platform).stem, **content}, f"--platform: {platform}")
    if platform.lower() not in PLATFORMS:
        raise unknown_name("platform", platform, PLATFORMS)
    return PLATFORMS[platform.lower()]


def scaled_numbers(statistics: Mapping[str, Any], width: int) -> np.ndarray:
    """Tell which numbers are scaled: a bool mask (width,), the statistics' own; all of them without one, or by null."""
    mask = statistics.get("mask")
    return np.ones(width, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)


def check_bounds(platform: Platform, statistics: Mapping[str, Any], kinds: Sequence[str], folder: Path) -> None:
    """Raise UsageError unless a data set's statistics of these kinds hold the bounds that the platform scales by."""
    for kind in kinds:
        try:
            low, high = (np.asarray(bound, np.float64) for bound in platform.normalization.bounds(statistics[kind]))
            if low.ndim != 1 or low.shape != high.shape:
                raise ValueError(f"bounds of shapes {low.shape} and {high.shape} found; accepted: lists of one length")
            mask = _checked_mask(statistics[kind], len(low))
            if not (np.isfinite(low) & np.isfinite(high))[mask].all():
                raise ValueError("bounds that are not finite found; accepted: finite numbers")
        except KeyError as error:
            by = platform.normalization.value
            raise UsageError(f"{folder}: statistics of {kind}: no {error} found; accepted: bounds for {by}") from None
        except (TypeError, ValueError) as error:
            raise UsageError(f"{folder}: statistics of {kind}: {one_line(error)}") from None


def _checked_mask(statistics: Mapping[str, Any], width: int) -> np.ndarray:
    """The mask of :func:`scaled_numbers`. Raises ValueError unless it is `width` of true and false, or of 1 and 0."""
    given = np.asarray(scaled_numbers(statistics, width) if statistics.get("mask") is None else statistics["mask"])
    if given.shape != (width,):
        raise ValueError(f"a mask of shape {given.shape} found; accepted: {width} of true and false")
    if given.dtype.kind not in "biuf" or not np.isin(given, (0, 1)).all():
        raise ValueError(f"the mask {given.tolist()} found; accepted: {width} of true and false")
    return given.astype(bool)


def platform_of_statistics(statistics: Mapping[str, Any]) -> Platform | None:
    """The one of upstream's platforms whose actions and states are as wide as the data's, or None.

    `statistics` is {dataset: {"action", "proprio"}}. For checkpoints of upstream's, which record no platform.
    """
    widths = {
        # Any statistic of a kind tells its width; not all data sets have the same ones.
        tuple(len(next(iter(data[kind].values()), ())) for kind in ("action", "proprio") if kind in data)
        for data in statistics.values()
    }
    fitting = [robot for robot in UPSTREAM if widths == {(robot.action_dim, robot.proprio_dim)}]
    return fitting[0] if len(fitting) == 1 else None
