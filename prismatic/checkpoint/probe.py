"""The probe in a checkpoint folder: one question to the policy and its answer when the checkpoint was written.

Whoever loads the checkpoint asks again. Another answer means that weights, preprocessing, flags or packages are not
those of the training: the usual reason for a policy that fails every episode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import atomic_write

PROBE = "probe.safetensors"
_TEXTS = ("instruction", "dataset", "precision")


@dataclass(frozen=True)
class Probe:
    """A question and its answer.

    Attributes:
        images: uint8 (V, H, W, 3), as cameras see them.
        state: (P,), as the robot tells it.
        actions: un-normalized chunk (T, A).
        dataset: whose statistics un-normalized it.
        precision: type that the policy computed in, "float32" or "bfloat16".
    """

    images: np.ndarray
    state: np.ndarray
    actions: np.ndarray
    instruction: str
    dataset: str
    precision: str

    def write(self, folder: Path) -> None:
        """Write the probe to a checkpoint folder."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ("images", "state", "actions")}
        atomic_write(folder / PROBE, save(arrays, {name: getattr(self, name) for name in _TEXTS}))

    @classmethod
    def read(cls, folder: Path) -> Probe:
        """Read the probe of a checkpoint folder.

        Raises:
            UsageError: it has none, or a damaged one.
        """
        file = folder / PROBE
        if not file.is_file():
            raise UsageError(f"--verify: no {PROBE} found in {folder}; accepted: a checkpoint with one, or no --verify")
        try:
            with safe_open(file, framework="np") as opened:
                arrays = {name: opened.get_tensor(name) for name in ("images", "state", "actions")}
                return cls(**arrays, **{name: opened.metadata()[name] for name in _TEXTS})
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise UsageError(f"--verify: {file} is not a readable probe ({one_line(error)})") from None

    def deviation(self, actions: np.ndarray, statistics: Mapping[str, Any]) -> float:
        """Largest difference of an answer (T, A) from the recorded one, as a part of each number's range in the data.

        Raises:
            UsageError: the answer has another shape.
        """
        if actions.shape != self.actions.shape:
            raise UsageError(f"--verify: actions of {actions.shape} found; accepted: {self.actions.shape}, as recorded")
        span = np.asarray(statistics["q99"], np.float64) - np.asarray(statistics["q01"], np.float64)
        return float(np.max(np.abs(actions - self.actions) / np.where(span > 1e-6, span, 1)))


def accepted_deviation(*precisions: str) -> float:
    """Part of a number's range that rounding may change, when recorded and asked again in these types."""
    return 1e-3 if set(precisions) == {"float32"} else 0.05
