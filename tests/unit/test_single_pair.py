"""Analyses of an alignment with one pair, as spatial forcing's: no other pair to compare it with."""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.analysis.config import ConeConfig, GradientsConfig, ProjectorsConfig, TheoremConfig
from experiments.analysis.cosines import KINDS, draw_cone, draw_projectors
from experiments.analysis.gradients import describe_group, draw_gradients, draw_theorem
from rocket_align.analysis.gradients import GradientReport

PART = {"label": "spatial forcing", "student_layers": [3], "teacher_layers": [2], "projector": "shared"}


def test_every_picture_is_drawn(tmp_path: Path) -> None:
    place = {"checkpoint": "x", "out_dir": tmp_path}
    single = torch.ones(1, 1)
    draw_theorem(TheoremConfig(**place), [{**PART, "cosine": single, "inner": single, "relative_bound": single}])
    draw_projectors(ProjectorsConfig(**place), [{**PART, "similarity": dict.fromkeys(KINDS, single)}])
    cone = {name: {"within_samples": [0.5] * 4} for name in ("student", "teacher")}
    draw_cone(ConeConfig(**place), [{**PART, **cone, "projected": {"within_samples": [0.5]}}])
    both = torch.eye(2)
    group = describe_group(GradientReport(both, both, torch.zeros(2, 2), torch.ones(2)))
    losses = {"losses": ["pair 3-2", "action"], "groups": {"0": group, "all": group}}
    draw_gradients(GradientsConfig(**place), [{**PART, **losses}])
    assert {path.stem for path in tmp_path.iterdir()} == {"theorem", "projectors", "cone", "gradients"}
