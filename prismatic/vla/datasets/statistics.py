"""Statistics of actions and proprioception, and the normalization that uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from prismatic.models.pi.normalization import Normalizer
from prismatic.vla.platforms import Normalization, NormalizationType, OpenPINormalization, scaled_numbers


class _AlwaysInStatistics(TypedDict):
    action: dict[str, list[float]]
    num_transitions: int
    num_trajectories: int


class Statistics(_AlwaysInStatistics, total=False):
    """Statistics of one dataset: mean, std, max, min, q01 and q99 of its actions (and their mask) and of its states.

    `proprio` is absent for a robot without states.
    """

    proprio: dict[str, list[float]]


def _describe(values_ND: np.ndarray) -> dict[str, list[float]]:
    # float64 sums: float32 ones lose digits over the hundred thousands of frames of a suite.
    return {
        "mean": values_ND.mean(axis=0, dtype=np.float64).tolist(),
        "std": values_ND.std(axis=0, dtype=np.float64).tolist(),
        "max": values_ND.max(axis=0).tolist(),
        "min": values_ND.min(axis=0).tolist(),
        "q01": np.quantile(values_ND.astype(np.float64), 0.01, axis=0).tolist(),
        "q99": np.quantile(values_ND.astype(np.float64), 0.99, axis=0).tolist(),
    }


def compute_statistics(
    action_NA: np.ndarray, proprio_NP: np.ndarray, num_trajectories: int, action_mask: tuple[bool, ...] | None
) -> Statistics:
    """Statistics over all transitions, in upstream's layout.

    Returns:
        {"action": {mean, std, max, min, q01, q99, mask}, "proprio": {the same without mask}, "num_transitions",
        "num_trajectories"}; lists of one number for each dimension, JSON-ready. The mask says which action numbers are
        normalized. Without states there is no "proprio".
    """
    mask = action_mask or (True,) * action_NA.shape[1]
    statistics: Statistics = {
        "action": {**_describe(action_NA), "mask": list(mask)},
        "num_transitions": len(action_NA),
        "num_trajectories": num_trajectories,
    }
    return {**statistics, "proprio": _describe(proprio_NP)} if proprio_NP.shape[1] else statistics


def describe_deltas(
    action_FA: np.ndarray, state_FP: np.ndarray, starts: np.ndarray, chunk: int, delta: Sequence[bool]
) -> dict[str, list[float]]:
    """Statistics of the actions in all chunks that begin at the frames `starts`.

    Numbers that `delta` marks count from the state at the chunk's start. Source: openpi's DeltaActions, whose
    statistics are of chunks, too.
    """
    columns = []
    for number, relative in enumerate(delta):
        chunks_NT = sliding_window_view(action_FA[:, number], chunk)[starts]
        if relative:
            chunks_NT = chunks_NT - state_FP[starts, number, None]
        columns.append(_describe(chunks_NT.reshape(-1, 1)))
    return {name: [column[name][0] for column in columns] for name in columns[0]}


def openpi_normalizer(statistics: Mapping[str, Any], kind: OpenPINormalization) -> Normalizer:
    """openpi's normalization by these statistics, unless they say themselves how they normalize."""
    return Normalizer.from_statistics(statistics, quantiles=kind is OpenPINormalization.QUANTILES)


def normalize(values: np.ndarray, statistics: Mapping[str, Sequence[float]], kind: Normalization) -> np.ndarray:
    """Normalize the last axis of `values` as training does; float32.

    bounds_q99 and bounds map [low, high] to [-1, 1] and clip; normal gives zero mean and unit variance. Numbers whose
    mask is False stay as they are. With bounds, numbers that never change (min == max) become 0, masked or not.
    Source: upstream's normalize_action_and_proprio. mean_std and quantiles: openpi's Normalize.
    """
    values = np.asarray(values, dtype=np.float32)
    if isinstance(kind, OpenPINormalization):
        return openpi_normalizer(statistics, kind).normalize(values).astype(np.float32)
    mask = scaled_numbers(statistics, values.shape[-1])
    if kind is NormalizationType.NORMAL:
        mean, std = (np.asarray(statistics[key], dtype=np.float32) for key in ("mean", "std"))
        return np.where(mask, (values - mean) / (std + np.float32(1e-8)), values).astype(np.float32)
    low, high = (np.asarray(bound, dtype=np.float32) for bound in kind.bounds(statistics))
    normalized = np.clip(2 * (values - low) / (high - low + np.float32(1e-8)) - 1, -1.0, 1.0)
    constant = np.asarray(statistics["min"]) == np.asarray(statistics["max"])
    return np.where(constant, np.float32(0.0), np.where(mask, normalized, values)).astype(np.float32)
