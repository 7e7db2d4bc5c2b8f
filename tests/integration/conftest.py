"""Fixtures of the training tests: a random mini student and teacher on disk, a tiny dataset, the script's main."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import finetune as script
from tests.helpers.launch import FLAGS, launcher
from tests.helpers.training import training_flags, writable_copy


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mini student with random weights and its processor."""
    from experiments.mini.make.pretrain_student import build_student

    folder = tmp_path_factory.mktemp("student")
    model, processor = build_student(seed=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VGGT teacher of the smallest sizes with random weights."""
    from rocket_align.teacher.vggt import VGGTConfig, VGGTTeacher
    from rocket_align.teacher.vggt.config import save_folder

    folder = tmp_path_factory.mktemp("teacher")
    config = VGGTConfig(image_size=84, embed_dim=32, depth=6, num_heads=2, vit_depth=2, vit_num_heads=2)
    torch.manual_seed(0)
    save_folder(folder, config, VGGTTeacher(config, tuple(range(6))).state_dict())
    return folder


@pytest.fixture
def rlds_root(golden_dir: Path, tmp_path: Path) -> Path:
    """A writable copy of the tiny dataset libero_spatial_no_noops."""
    return writable_copy(golden_dir / "rlds", tmp_path / "rlds")


@pytest.fixture
def finetune(student_folder: Path, rlds_root: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the script's own main with the given flags; returns the folder of the runs."""

    def run(**flags: Any) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)  # One process runs the script many times here.
        defaults = training_flags(student_folder, rlds_root, tmp_path / "runs")
        config = script.FinetuneConfig(**{**defaults, **flags})
        assert script.main(config) == 0
        return Path(config.run_root_dir)

    return run


@pytest.fixture
def launch(student_folder: Path, teacher_folder: Path, rlds_root: Path, tmp_path: Path) -> Callable[..., None]:
    """Run the script's main with flags after flags, in the processes of one launch."""
    common = training_flags(student_folder, rlds_root, tmp_path / "runs") | {"vggt_path": str(teacher_folder)}
    return launcher(common | FLAGS, tmp_path / "cases.json")
