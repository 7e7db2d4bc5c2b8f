"""VGGT (Visual Geometry Grounded Transformer), written from its published architecture and checkpoint layout."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rocket_align.teacher.vggt.aggregator import VGGTAggregator
    from rocket_align.teacher.vggt.config import VGGTConfig
    from rocket_align.teacher.vggt.teacher import VGGTTeacher

__all__ = ["VGGTAggregator", "VGGTConfig", "VGGTTeacher"]

_HOME = {"VGGTAggregator": "aggregator", "VGGTConfig": "config", "VGGTTeacher": "teacher"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
