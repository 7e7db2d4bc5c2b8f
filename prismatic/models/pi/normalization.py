"""Normalization of states and actions: by mean and deviation (pi0), or by quantiles to [-1, 1] (pi0.5).

Not obvious: openpi adds 1e-6 to every denominator, LeRobot 1e-8 to deviations and to spans of zero. A vector that never
changes in the data is therefore blown up by another factor when it does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import DAMAGED, atomic_write, read_json

_NAMES = ("mean", "std", "q01", "q99")
_OPENPI_FILE = "assets/*/norm_stats.json"
LEROBOT = "lerobot"  # Name of the statistics in LeRobot's folders, and of the platform of their policies
# LeRobot's modes, and the statistics that each takes as the ends of [-1, 1].
_RANGES = {"QUANTILES": ("q01", "q99"), "MIN_MAX": ("min", "max"), "QUANTILE10": ("q10", "q90")}


@dataclass(frozen=True)
class Normalizer:
    """Statistics of one vector, [D] each; `quantiles` says by which of them it is normalized.

    Numbers beyond the D statistics (padding) stay as they are.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    quantiles: bool = False
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.quantiles and (self.q01 is None or self.q99 is None):
            raise ValueError("q01, q99: None found; accepted: arrays, for normalization by quantiles")

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """Normalize [..., any number]."""
        low, span = self._low_and_span(values.shape[-1])
        known, rest = values[..., : len(low)], values[..., len(low) :]
        scaled = (known - low) / (span + self.epsilon)
        return np.concatenate([scaled * 2 - 1 if self.quantiles else scaled, rest], axis=-1)

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """Undo :meth:`normalize`."""
        low, span = self._low_and_span(values.shape[-1])
        known, rest = values[..., : len(low)], values[..., len(low) :]
        scaled = (known + 1) / 2 if self.quantiles else known
        return np.concatenate([scaled * (span + self.epsilon) + low, rest], axis=-1)

    def _low_and_span(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        if self.quantiles and self.q01 is not None and self.q99 is not None:
            return self.q01[:width], (self.q99 - self.q01)[:width]
        return self.mean[:width], self.std[:width]

    @classmethod
    def from_statistics(cls, statistics: Mapping[str, Any], *, quantiles: bool) -> Normalizer:
        """By a checkpoint's statistics of a vector, which may say themselves how they normalize; else by `quantiles`.

        Raises ValueError: some are missing, or they are not lists of one length.
        """
        if not isinstance(statistics, Mapping):
            raise ValueError(f"{type(statistics).__name__} found; accepted: an object of {', '.join(_NAMES)}")
        arrays = {name: np.asarray(statistics[name], np.float64) for name in _NAMES if statistics.get(name) is not None}
        if missing := {"mean", "std"} - arrays.keys():
            raise ValueError(f"{', '.join(sorted(missing))}: missing; accepted: mean and std")
        for pair in (_NAMES[:2], _NAMES[2:]):
            shapes = [arrays[name].shape for name in pair if name in arrays]
            if any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
                raise ValueError(f"{', '.join(pair)}: shapes {shapes} found; accepted: lists of one length")
        told = {name: statistics[name] for name in ("quantiles", "epsilon") if name in statistics}
        return cls(**{"quantiles": quantiles, **arrays, **told})


def foreign_statistics_files(folder: Path) -> list[Path]:
    """The files in a folder that :func:`read_foreign_statistics` may read."""
    return [*folder.glob("assets/**/norm_stats.json"), *folder.glob("policy_preprocessor*")]


def read_foreign_statistics(folder: Path) -> dict[str, Any]:
    """Statistics in a folder of openpi or LeRobot, by name, as {"action": {...}, "proprio": {...}}; {} without any.

    openpi's are those of `assets/{name}/norm_stats.json`. LeRobot's have no name, and are called "lerobot"; they say
    by `quantiles` and `epsilon` how they normalize.

    Raises UsageError: a LeRobot pipeline without statistics, or of a mode that is not known; a damaged file.
    """
    if pipelines := sorted(folder.glob("policy_preprocessor*.json")):
        return {LEROBOT: _read_lerobot(pipelines[0])}
    assets, statistics = folder / "assets", {}
    for file in sorted(assets.glob("**/norm_stats.json")):
        stored = read_json(file).get("norm_stats", {})
        if not isinstance(stored, Mapping):
            raise UsageError(
                f"{file}: norm_stats is a {type(stored).__name__}; accepted: an object of state and actions"
            )
        if {"state", "actions"} <= stored.keys():
            name = file.parent.relative_to(assets).as_posix()
            statistics[name] = {"action": stored["actions"], "proprio": stored["state"]}
    return statistics


def make_normalizers(statistics: Any, name: str, folder: Path, *, quantiles: bool) -> dict[str, Normalizer]:
    """{"action": ..., "proprio": ...} of a data set's statistics; a robot without states has no "proprio".

    Raises UsageError: they are missing or of another form; `name` and `folder` say which ones.
    """
    try:
        kinds = ("action", "proprio") if "proprio" in statistics else ("action",)
        return {kind: Normalizer.from_statistics(statistics[kind], quantiles=quantiles) for kind in kinds}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder}: statistics of {name}: {one_line(error)}") from None


def read_normalizers(folder: Path, kind: str, asset: str | None = None) -> dict[str, Normalizer]:
    """{"state": ..., "actions": ...} of a checkpoint folder of openpi or LeRobot.

    Args:
        kind: "pi0" (by mean and deviation) or "pi05" (by quantiles); LeRobot's folders say it themselves.
        asset: which of openpi's `assets/*/norm_stats.json`, where there are several.

    Raises:
        UsageError: no statistics, several, or of a form that is not known.
    """
    statistics = read_foreign_statistics(folder)
    if asset is None and len(statistics) == 1:
        asset = next(iter(statistics))
    if asset not in statistics:
        accepted = f"one of {', '.join(statistics)}" if statistics else f"{_OPENPI_FILE} or policy_preprocessor.json"
        raise UsageError(f"{folder}: statistics of {asset or 'no name'} not found; accepted: {accepted}")
    normalizers = make_normalizers(statistics[asset], asset, folder, quantiles=kind == "pi05")
    return {"state": normalizers["proprio"], "actions": normalizers["action"]}


def write_normalizers(folder: Path, asset: str, normalizers: Mapping[str, Normalizer]) -> None:
    """Write `assets/{asset}/norm_stats.json` of a checkpoint folder, as openpi reads it."""
    stored = {
        name: {key: np.asarray(value).tolist() for key in _NAMES if (value := getattr(normalizer, key)) is not None}
        for name, normalizer in normalizers.items()
    }
    atomic_write(folder / "assets" / asset / "norm_stats.json", json.dumps({"norm_stats": stored}, indent=2))


def _read_lerobot(pipeline: Path) -> dict[str, Any]:
    """The statistics of a LeRobot pipeline's normalizing step, which lie in a file of their own."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        steps = read_json(pipeline).get("steps", [])
        names = [str(step.get("registry_name", step.get("class", ""))) for step in steps]
        normalizing = [step for step, name in zip(steps, names, strict=True) if "normaliz" in name]
        step = normalizing[0] if normalizing else {}
        file = pipeline.parent / str(step.get("state_file"))
        if not file.is_file():
            raise UsageError(
                f"{pipeline}: no normalizing step with a state file found; accepted: a pipeline of LeRobot's"
            )
        return _lerobot_statistics(load_file(file), step.get("config", {}), pipeline)
    except UsageError:
        raise
    except SafetensorError as error:
        raise UsageError(f"{file}: damaged or cut short ({one_line(error, 120)}); copy or download it again") from error
    except DAMAGED as error:
        raise UsageError(f"{pipeline}: {one_line(error, 120)}; accepted: a pipeline of LeRobot's") from error


def _lerobot_statistics(
    stored: Mapping[str, np.ndarray], config: Mapping[str, Any], pipeline: Path
) -> dict[str, dict[str, Any]]:
    statistics = {}
    for name, feature, kind in (("proprio", "observation.state", "STATE"), ("action", "action", "ACTION")):
        prefix = f"{feature}."
        values = {key.removeprefix(prefix): value.tolist() for key, value in stored.items() if key.startswith(prefix)}
        width = config.get("features", {}).get(feature, {}).get("shape") or [max(map(len, values.values()), default=0)]
        mode = config.get("norm_map", {}).get(kind, "IDENTITY")
        statistics[name] = _from_lerobot(values, mode, config.get("eps", 1e-8), width[0], pipeline)
    return statistics


def _from_lerobot(
    values: Mapping[str, list[float]], mode: str, epsilon: float, width: int, pipeline: Path
) -> dict[str, Any]:
    nothing = {"mean": [0.0] * width, "std": [1.0] * width}
    if mode == "IDENTITY":
        return {**nothing, "quantiles": False, "epsilon": 0.0}
    accepted = ("MEAN_STD", *_RANGES, "IDENTITY")
    low, high = _RANGES.get(mode, ("mean", "std"))
    if mode not in accepted or low not in values or high not in values:
        raise UsageError(
            f"{pipeline}: mode {mode} with {', '.join(values) or 'no statistics'} found; "
            f"accepted: {', '.join(accepted)} with their statistics"
        )
    ends = {"q01": values[low], "q99": values[high]} if mode in _RANGES else {}
    return {**nothing, **values, **ends, "quantiles": mode in _RANGES, "epsilon": epsilon}
