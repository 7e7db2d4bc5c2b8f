"""ROCKET: align several layers of a student policy with several layers of a frozen 3D teacher, through one projector.

Plain tensors in, a loss out: nothing here knows any particular policy. Names are imported when first used, so that
`import rocket_align` does not import torch.

    config = recipes.rocket(num_student_layers=32, num_teacher_layers=24)
    teacher = VGGTTeacher.from_pretrained("VGGT-1B", layers=config.teacher_layers, dtype=torch.bfloat16)
    alignment = MultiLayerAlignment(config, student_dim=4096, teacher_dim=teacher.embed_dim)
    output = alignment(hidden_states, vision_start=1, num_vision_tokens=512, teacher=teacher(images))
    loss = action_loss + config.coeff * output.loss
"""

# ruff: noqa: F401 - the names for type checkers are those of _NAMES

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rocket_align.config as recipes
    from rocket_align.alignment import AlignOutput, MultiLayerAlignment, cosine_loss
    from rocket_align.analysis.cka import cka_map, linear_cka
    from rocket_align.analysis.importance import layer_importance, residual_stream
    from rocket_align.analysis.matching import match_layers
    from rocket_align.analysis.selection import select_layers
    from rocket_align.config import AlignConfig
    from rocket_align.layers import resolve_layers, tap_names
    from rocket_align.pooling import pool_teacher, spread_views, token_mask
    from rocket_align.projector import AlignmentProjector, matryoshka_widths
    from rocket_align.taps import AlignedModel, Taps, attach
    from rocket_align.targets import TeacherTargets
    from rocket_align.teacher.base import Teacher, TeacherFeatures
    from rocket_align.teacher.frozen_copy import FrozenCopy
    from rocket_align.teacher.preprocess import preprocess_normed_images, unnormalize_views
    from rocket_align.teacher.vggt.config import VGGTConfig
    from rocket_align.teacher.vggt.teacher import VGGTTeacher

_NAMES = {
    "alignment": "AlignOutput MultiLayerAlignment cosine_loss",
    "analysis.cka": "cka_map linear_cka",
    "analysis.importance": "layer_importance residual_stream",
    "analysis.matching": "match_layers",
    "analysis.selection": "select_layers",
    "config": "AlignConfig",
    "layers": "resolve_layers tap_names",
    "pooling": "pool_teacher spread_views token_mask",
    "projector": "AlignmentProjector matryoshka_widths",
    "recipes": "recipes",
    "targets": "TeacherTargets",
    "taps": "AlignedModel Taps attach",
    "teacher.base": "Teacher TeacherFeatures",
    "teacher.frozen_copy": "FrozenCopy",
    "teacher.preprocess": "preprocess_normed_images unnormalize_views",
    "teacher.vggt.config": "VGGTConfig",
    "teacher.vggt.teacher": "VGGTTeacher",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)

# Modules that moved answer under their earlier names.
_EARLIER = {
    "rocket_align.analysis.cone": "rocket_align.analysis.cosines",
    "rocket_align.analysis.pairs": "rocket_align.layers",
    "rocket_align.analysis.projectors": "rocket_align.analysis.cosines",
    "rocket_align.analysis.streaming_cka": "rocket_align.analysis.cka",
    "rocket_align.analysis.theorem": "rocket_align.analysis.gradients",
    "rocket_align.layer_file": "rocket_align.layers",
    "rocket_align.loss": "rocket_align.alignment",
    "rocket_align.recipes": "rocket_align.config",
    "rocket_align.student": "rocket_align.alignment",
    "rocket_align.teacher.vggt.blocks": "rocket_align.teacher.vggt.aggregator",
    "rocket_align.teacher.vggt.checkpoint": "rocket_align.teacher.vggt.config",
    "rocket_align.teacher.vggt.heads": "rocket_align.teacher.vggt.geometry",
    "rocket_align.teacher.vggt.patch_embed": "rocket_align.teacher.vggt.aggregator",
}


class _EarlierNames(MetaPathFinder, Loader):
    """Imports a moved module under its earlier name, as the very same object."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, _EarlierNames()) if name in _EARLIER else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_EARLIER[spec.name])
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec  # The import system has just put the earlier name's on it.


sys.meta_path.insert(0, _EarlierNames())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    return module if name == _HOME[name] else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
