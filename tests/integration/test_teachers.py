"""The real training script with every kind of teacher, running or stored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import build_feature_store as script
from prismatic.training.metrics import read_log
from prismatic.util.errors import UsageError
from tests.helpers.teacher_models import VIT_TEACHERS, save_vit

LIGHT: dict[str, Any] = {"merge_lora_during_training": False}


def align_losses(runs: Path) -> list[float]:
    return [row["align_loss"] for row in read_log(runs / "run" / "metrics.jsonl")]


@pytest.fixture
def build_store(student_folder: Path, teacher_folder: Path, rlds_root: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the building script's own main; returns the store's folder."""

    def run(**flags: Any) -> Path:
        given: dict[str, Any] = {
            "feature_store": str(tmp_path / "store"),
            "vla_path": str(student_folder),
            "vggt_path": str(teacher_folder),
            "data_root_dir": rlds_root,
            "num_images_in_input": 2,
            "num_workers": 0,
            "mixed_precision": "no",
            **flags,
        }
        script.main(script.StoreConfig(**given))
        return Path(given["feature_store"])

    return run


@pytest.mark.parametrize("model", VIT_TEACHERS)
def test_two_steps_with_a_transformers_teacher(model: str, finetune: Callable[..., Path], tmp_path: Path) -> None:
    teacher = save_vit(model, tmp_path / "teacher")
    kind = "auto" if model == "dinov2" else model.removesuffix("_with_registers")
    losses = align_losses(finetune(teacher_path=str(teacher), teacher_type=kind, **LIGHT))
    assert len(losses) == 2 and all(0 < loss < 2 for loss in losses)


def test_the_store_gives_the_online_loss_without_augmentation(
    finetune: Callable[..., Path], build_store: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    """The teacher's layers in any order, and one of them twice."""
    layers = {"vla_layers_align": "1,2,3", "vggt_layers_align": "3,1,3"}
    store = build_store(store_dtype="float16", grid_scale=9.0, **layers)
    build_store(store_dtype="float16", grid_scale=9.0, verify=True, **layers)
    plain = {"image_aug": False, **layers, **LIGHT}
    online = align_losses(finetune(vggt_path=str(teacher_folder), run_root_dir=tmp_path / "online", **plain))
    stored = align_losses(finetune(feature_store=str(store), run_root_dir=tmp_path / "stored", num_workers=1, **plain))
    assert stored == pytest.approx(online, abs=2e-3)


def test_the_store_works_with_augmentation_and_refuses_other_teachers(
    finetune: Callable[..., Path], build_store: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    store = build_store()
    losses = align_losses(finetune(feature_store=str(store), vggt_path=str(teacher_folder), image_aug=True, **LIGHT))
    assert len(losses) == 2 and all(0 < loss < 2 for loss in losses)
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    again = {"run_id_override": "again", "feature_store": str(store), **LIGHT}
    for flags, said in (
        ({"vggt_path": str(other)}, "made with another teacher"),
        ({"vla_layers_align": "0,1", "vggt_layers_align": "0,1"}, "holds no teacher layers 0"),
        ({"use_val_set": True}, "--use_val_set"),
        ({"pooling_func": "random"}, "--pooling_func"),
        ({"feature_store": str(tmp_path / "nowhere")}, "no index of a feature store"),
    ):
        with pytest.raises(UsageError, match=said):
            finetune(**{**again, **flags})


def test_building_refuses_what_cannot_be(build_store: Callable[..., Path], tmp_path: Path) -> None:
    build_store(vggt_layers_align="0", vla_layers_align="0", recipe="spatial_forcing", fit_frames=2)
    for flags, said in (
        ({}, "--feature_store: .*holds another store"),
        ({"store_dtype": "int4"}, "--store_dtype"),
        ({"grid_scale": 0.0}, "--grid_scale"),
        ({"vggt_path": ""}, "no teacher"),
        ({"feature_store": ""}, "--feature_store: empty"),
        ({"feature_store": str(tmp_path / "none"), "verify": True}, "no index of a feature store"),
    ):
        with pytest.raises(UsageError, match=said):
            build_store(**flags)


def test_a_defect_while_building_is_no_wrong_flag(
    build_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("shapes do not fit")

    monkeypatch.setattr("rocket_align.teacher.store.writer.encode", broken)
    with pytest.raises(ValueError, match="shapes do not fit") as defect:
        build_store(fit_frames=2)
    assert not isinstance(defect.value, UsageError)
