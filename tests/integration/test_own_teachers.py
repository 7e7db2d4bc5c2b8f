"""The real training script with the student's own vision encoder, timm's and other models as teachers, also stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.teacher_models import save_timm
from tests.integration.test_teachers import LIGHT, align_losses, build_store

__all__ = ["build_store"]  # a fixture


def save_siglip(folder: Path) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=56, patch_size=14)).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["openvla", "timm", "transformers"])
def test_running_and_stored_features_give_the_same_loss(
    kind: str, finetune: Callable[..., Path], build_store: Callable[..., Path], student_folder: Path, tmp_path: Path
) -> None:
    folder = student_folder if kind == "openvla" else tmp_path / "teacher"
    if kind == "timm":
        sizes = {"img_size": 56, "patch_size": 14, "embed_dim": 24, "depth": 4, "num_heads": 2}
        save_timm(folder, "vit_tiny_patch16_224", 56, **sizes)
    elif kind == "transformers":
        save_siglip(folder)
    plain = {"image_aug": False, "vla_layers_align": "1,3", "vggt_layers_align": "0,-1", **LIGHT}
    online = finetune(teacher_path=str(folder), teacher_type=kind, run_root_dir=tmp_path / "online", **plain)
    store = build_store(vggt_path="", teacher_path=str(folder), store_dtype="float16", grid_scale=9.0, **plain)
    stored = finetune(feature_store=str(store), teacher_path=str(folder), run_root_dir=tmp_path / "stored", **plain)
    losses = align_losses(online)
    assert len(losses) == 2 and all(0 < loss < 2 for loss in losses)
    assert align_losses(stored) == pytest.approx(losses, abs=2e-3)
