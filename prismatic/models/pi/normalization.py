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

from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, read_json

_NAMES = ("mean", "std", "q01", "q99")
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


def read_normalizers(folder: Path, kind: str, asset: str | None = None) -> dict[str, Normalizer]:
    """{"state": ..., "actions": ...} of a checkpoint folder of openpi or LeRobot.

    Args:
        kind: "pi0" (by mean and deviation) or "pi05" (by quantiles); LeRobot's folders say it themselves.
        asset: which of openpi's `assets/*/norm_stats.json`, where there are several.

    Raises:
        UsageError: no statistics, several, or of a form that is not known.
    """
    if pipelines := sorted(folder.glob("policy_preprocessor*.json")):
        return _read_lerobot(pipelines[0])
    assets = folder / "assets"
    files = {file.parent.relative_to(assets).as_posix(): file for file in sorted(assets.glob("**/norm_stats.json"))}
    if asset is None and len(files) == 1:
        asset = next(iter(files))
    if asset not in files:
        accepted = f"one of {', '.join(files)}" if files else "assets/*/norm_stats.json or policy_preprocessor.json"
        raise UsageError(f"{folder}: statistics of {asset or 'no name'} not found; accepted: {accepted}")
    stored = read_json(files[asset]).get("norm_stats", {})
    try:
        return {name: Normalizer(**_arrays(stored[name]), quantiles=kind == "pi05") for name in ("state", "actions")}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{files[asset]}: {error} (of state and actions); accepted: openpi's norm_stats") from None


def write_normalizers(folder: Path, asset: str, normalizers: Mapping[str, Normalizer]) -> None:
    """Write `assets/{asset}/norm_stats.json` of a checkpoint folder, as openpi reads it."""
    stored = {
        name: {key: np.asarray(value).tolist() for key in _NAMES if (value := getattr(normalizer, key)) is not None}
        for name, normalizer in normalizers.items()
    }
    atomic_write(folder / "assets" / asset / "norm_stats.json", json.dumps({"norm_stats": stored}, indent=2))


def _arrays(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(stored[name], np.float64) for name in _NAMES if stored.get(name) is not None}


def _read_lerobot(pipeline: Path) -> dict[str, Normalizer]:
    """The statistics of a LeRobot pipeline's normalizing step, which lie in a file of their own."""
    from safetensors.numpy import load_file

    steps = read_json(pipeline).get("steps", [])
    step = next((step for step in steps if "normaliz" in str(step.get("registry_name", step.get("class", "")))), None)
    if step is None or not (pipeline.parent / str(step.get("state_file"))).is_file():
        raise UsageError(f"{pipeline}: no normalizing step with a state file found; accepted: a pipeline of LeRobot's")
    stored, config = load_file(pipeline.parent / step["state_file"]), step.get("config", {})
    modes = config.get("norm_map", {})
    normalizers = {}
    for name, feature, kind in (("state", "observation.state", "STATE"), ("actions", "action", "ACTION")):
        values = {
            key.removeprefix(f"{feature}."): np.asarray(value, np.float64)
            for key, value in stored.items()
            if key.startswith(f"{feature}.")
        }
        normalizers[name] = _from_lerobot(values, modes.get(kind, "IDENTITY"), config.get("eps", 1e-8), pipeline)
    return normalizers


def _from_lerobot(values: Mapping[str, np.ndarray], mode: str, epsilon: float, pipeline: Path) -> Normalizer:
    if mode == "IDENTITY":
        return Normalizer(np.zeros(0), np.zeros(0))
    accepted = ("MEAN_STD", *_RANGES, "IDENTITY")
    low, high = _RANGES.get(mode, ("mean", "std"))
    if mode not in accepted or low not in values or high not in values:
        raise UsageError(
            f"{pipeline}: mode {mode} with {', '.join(values) or 'no statistics'} found; "
            f"accepted: {', '.join(accepted)} with their statistics"
        )
    if mode == "MEAN_STD":
        return Normalizer(values["mean"], values["std"], values.get("q01"), values.get("q99"), epsilon=epsilon)
    nothing = np.zeros_like(values[low])
    mean, std = values.get("mean", nothing), values.get("std", nothing)
    return Normalizer(mean, std, values[low], values[high], quantiles=True, epsilon=epsilon)
