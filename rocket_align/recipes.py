"""The five methods compared in the paper, as configurations. Each differs from `rocket` only where the method does.

`num_student_layers` and `num_teacher_layers` are the models' depths (32 and 24 for OpenVLA-7B and VGGT-1B); layers are
returned as plain indices.
"""

from __future__ import annotations

from dataclasses import replace

from rocket_align.analysis.selection import select_layers
from rocket_align.config import AlignConfig

_PAIRS = 10


def paper_pairs(
    num_student_layers: int = 32, num_teacher_layers: int = 24, count: int = _PAIRS
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Student and teacher layers of the multi-layer methods: 2, 4, ..., 18 and the one before the student's last state
    / the teacher's last block; models too shallow for that get consecutive layers from 1, and as many pairs as fit."""
    count = min(count, num_student_layers - 1, num_teacher_layers - 1)
    shallow = min(num_student_layers, num_teacher_layers)
    early = select_layers("e2m_last1", num_layers=shallow, count=count)[:-1]
    return (*early, num_student_layers - 1), (*early, num_teacher_layers - 1)


def rocket(num_student_layers: int = 32, num_teacher_layers: int = 24) -> AlignConfig:
    """One shared projector whose width grows with depth (the paper's method)."""
    student, teacher = paper_pairs(num_student_layers, num_teacher_layers)
    return AlignConfig(student_layers=student, teacher_layers=teacher)


def shared(num_student_layers: int = 32, num_teacher_layers: int = 24) -> AlignConfig:
    """One shared projector, full width for every pair."""
    return replace(rocket(num_student_layers, num_teacher_layers), projector="shared")


def naive(num_student_layers: int = 32, num_teacher_layers: int = 24) -> AlignConfig:
    """One independent projector per pair."""
    return replace(rocket(num_student_layers, num_teacher_layers), projector="independent")


def spatial_forcing(num_student_layers: int = 32, num_teacher_layers: int = 24) -> AlignConfig:
    """A single pair: the student's state at three quarters of its depth, the teacher's last block."""
    return replace(
        naive(num_student_layers, num_teacher_layers),
        student_layers=(num_student_layers * 3 // 4,),
        teacher_layers=(num_teacher_layers - 1,),
    )


def baseline(num_student_layers: int = 32, num_teacher_layers: int = 24) -> AlignConfig:
    """No alignment."""
    return replace(rocket(num_student_layers, num_teacher_layers), coeff=0.0, student_layers=(), teacher_layers=())


RECIPES = {
    "rocket": rocket,
    "shared": shared,
    "naive": naive,
    "spatial_forcing": spatial_forcing,
    "baseline": baseline,
}
