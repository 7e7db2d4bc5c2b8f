"""ROCKET: align several layers of a student policy with several layers of a frozen 3D teacher, through one projector.

Plain tensors in, a loss out: nothing here knows any particular policy. Names are imported when first used, so that
`import rocket_align` does not import torch.

    config = recipes.rocket(num_student_layers=32, num_teacher_layers=24)
    teacher = VGGTTeacher.from_pretrained("VGGT-1B", layers=config.teacher_layers, dtype=torch.bfloat16)
    alignment = MultiLayerAlignment(config, student_dim=4096, teacher_dim=teacher.embed_dim)
    output = alignment(hidden_states, vision_start=1, num_vision_tokens=512, teacher=teacher(images))
    loss = action_loss + config.coeff * output.loss
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rocket_align import recipes
    from rocket_align.alignment import AlignOutput, MultiLayerAlignment
    from rocket_align.analysis.cka import cka_map, linear_cka
    from rocket_align.analysis.importance import layer_importance, residual_stream
    from rocket_align.analysis.matching import match_layers
    from rocket_align.analysis.selection import select_layers
    from rocket_align.config import AlignConfig
    from rocket_align.layers import resolve_layers
    from rocket_align.loss import cosine_loss
    from rocket_align.pooling import pool_teacher
    from rocket_align.projector import AlignmentProjector, matryoshka_widths
    from rocket_align.teacher.base import Teacher, TeacherFeatures
    from rocket_align.teacher.preprocess import preprocess_normed_images, unnormalize_views
    from rocket_align.teacher.vggt.config import VGGTConfig
    from rocket_align.teacher.vggt.teacher import VGGTTeacher

__all__ = [
    "AlignConfig",
    "AlignOutput",
    "AlignmentProjector",
    "MultiLayerAlignment",
    "Teacher",
    "TeacherFeatures",
    "VGGTConfig",
    "VGGTTeacher",
    "cka_map",
    "cosine_loss",
    "layer_importance",
    "linear_cka",
    "match_layers",
    "matryoshka_widths",
    "pool_teacher",
    "preprocess_normed_images",
    "recipes",
    "residual_stream",
    "resolve_layers",
    "select_layers",
    "unnormalize_views",
]

_HOME = {
    "AlignConfig": "config",
    "AlignOutput": "alignment",
    "AlignmentProjector": "projector",
    "MultiLayerAlignment": "alignment",
    "Teacher": "teacher.base",
    "TeacherFeatures": "teacher.base",
    "VGGTConfig": "teacher.vggt.config",
    "VGGTTeacher": "teacher.vggt.teacher",
    "cka_map": "analysis.cka",
    "cosine_loss": "loss",
    "layer_importance": "analysis.importance",
    "linear_cka": "analysis.cka",
    "match_layers": "analysis.matching",
    "matryoshka_widths": "projector",
    "pool_teacher": "pooling",
    "preprocess_normed_images": "teacher.preprocess",
    "residual_stream": "analysis.importance",
    "resolve_layers": "layers",
    "select_layers": "analysis.selection",
    "unnormalize_views": "teacher.preprocess",
}


def __getattr__(name: str) -> Any:
    if name == "recipes":
        return importlib.import_module(f"{__name__}.recipes")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
