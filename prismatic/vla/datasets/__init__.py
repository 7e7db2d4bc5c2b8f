"""Datasets of robot episodes: RLDS files read with NumPy, random access to frames, exact shuffling."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "DatasetSpec": "specs",
    "FrameDraw": "dataset",
    "MixtureLoader": "sampler",
    "MixtureSampler": "sampler",
    "RLDSBatchTransform": "batch_transform",
    "RLDSDataset": "dataset",
    "make_dataloader": "sampler",
    "prepare_policy_image": "image_transforms",
    "register_dataset": "specs",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, so that importing the package does not import torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
