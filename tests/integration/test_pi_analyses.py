"""Feature store, layer selection and analyses of a pi0.5 policy, by the commands that OpenVLA's have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import analyze
import build_feature_store
import select_layers
from prismatic.training.metrics import read_log
from prismatic.util.cli import run as run_command
from tests.helpers.tiny_pi import write_tiny_pi


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_pi(tmp_path / "pi05", "pi05")


def flags_of(base: Path, teacher: Path, data: Path, out: Path) -> dict[str, Any]:
    return {"vla_path": str(base), "vggt_path": str(teacher), "data_root_dir": data, "run_root_dir": out / "runs"}


def test_stored_features_give_the_alignment_of_the_teacher(
    base: Path, teacher_folder: Path, rlds_root: Path, tmp_path: Path, finetune: Callable[..., Path]
) -> None:
    store = tmp_path / "store"
    flags = flags_of(base, teacher_folder, rlds_root, tmp_path) | {"feature_store": str(store), "batch_size": 8}
    flags |= {"num_images_in_input": 2, "num_workers": 0, "mixed_precision": "no", "trackers": "none"}
    AcceleratorState._reset_state(reset_partial_state=True)
    exact = {"store_dtype": "float16", "components": 64, "fit_frames": 64}
    build_feature_store.main(build_feature_store.StoreConfig(**flags, **exact))
    losses = []
    for stored in ("", str(store)):
        runs = finetune(vla_path=str(base), vggt_path=str(teacher_folder), feature_store=stored, image_aug=False,
                        merge_lora_during_training=False, run_root_dir=tmp_path / f"runs{bool(stored)}")  # fmt: skip
        losses.append([row["align_loss"] for row in read_log(runs / "run" / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("strategy", ["sim_top", "cka", "uniform"])
def test_layers_are_selected(
    strategy: str, base: Path, teacher_folder: Path, rlds_root: Path, tmp_path: Path, finetune: Callable[..., Path]
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    file = tmp_path / "layers.json"
    command = ["--checkpoint", base, "--vggt_path", teacher_folder, "--data_root_dir", rlds_root, "--batch_size", 2]
    command += ["--num_images_in_input", 2, "--num_samples", 4, "--strategy", strategy, "--count", 2, "--out", file]
    with pytest.raises(SystemExit) as end:
        run_command(select_layers.SelectConfig, select_layers.main, list(map(str, command)))
    assert not end.value.code
    chosen = json.loads(file.read_text())
    assert chosen["student_depth"] == 4 and len(chosen["student_layers"]) == 2
    finetune(vla_path=str(base), vggt_path=str(teacher_folder), align_layers_file=str(file), max_steps=1)


def test_analyses_measure(
    base: Path, teacher_folder: Path, rlds_root: Path, tmp_path: Path, finetune: Callable[..., Path]
) -> None:
    run = finetune(vla_path=str(base), vggt_path=str(teacher_folder), max_steps=1, merge_lora_during_training=False)
    for name in ("cka", "gradients", "projectors", "cone", "theorem", "static"):
        AcceleratorState._reset_state(reset_partial_state=True)
        command = [name, "--checkpoint", run / "run--1_chkpt", "--num_samples", 2, "--batch_size", 2]
        command += ["--vggt_path", teacher_folder, "--out_dir", tmp_path / name]
        with pytest.raises(SystemExit) as end:
            analyze.main(list(map(str, command)))
        assert end.value.code == 0
        report = json.loads((tmp_path / name / f"{name}.json").read_text())
        (subject,) = report["subjects"]
        if name == "cka":
            assert len(subject["cka"]) == 5 and subject["student_layers"] == [1, 2, 3, 4]
        if name == "gradients":
            assert list(subject["groups"]) == ["0", "1", "2", "3", "all"]
