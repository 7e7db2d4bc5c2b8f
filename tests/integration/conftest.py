"""Fixtures of the training tests: a random mini student and teacher on disk, a tiny dataset, the script's main."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import finetune as script


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
    from safetensors.torch import save_file

    from rocket_align.teacher.vggt import VGGTConfig, VGGTTeacher

    folder = tmp_path_factory.mktemp("teacher")
    config = VGGTConfig(
        image_size=84, embed_dim=32, depth=6, num_heads=2, patch_embed="dinov2", vit_depth=2, vit_num_heads=2
    )
    torch.manual_seed(0)
    teacher = VGGTTeacher(config, tuple(range(6)))
    save_file(teacher.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json())
    return folder


@pytest.fixture
def rlds_root(golden_dir: Path, tmp_path: Path) -> Path:
    """A writable copy of the tiny dataset libero_spatial_no_noops."""
    root = tmp_path / "rlds"
    shutil.copytree(golden_dir / "rlds", root)
    for path in root.rglob("*"):
        path.chmod(0o755)
    return root


@pytest.fixture
def finetune(student_folder: Path, rlds_root: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the script's own main with the given flags; returns the folder of the runs."""

    def run(**flags: Any) -> Path:
        defaults: dict[str, Any] = {
            "vla_path": str(student_folder),
            "data_root_dir": rlds_root,
            "run_root_dir": tmp_path / "runs",
            "run_id_override": "run",
            "num_images_in_input": 2,
            "use_proprio": True,
            "batch_size": 2,
            "max_steps": 2,
            "num_workers": 0,
            "lora_rank": 4,
            "learning_rate": 1e-3,
            "wandb_log_freq": 1,
            "mixed_precision": "no",
            "trackers": "none",
        }
        AcceleratorState._reset_state(reset_partial_state=True)  # One process runs the script many times here.
        config = script.FinetuneConfig(**{**defaults, **flags})
        assert script.main(config) == 0
        return Path(config.run_root_dir)

    return run
