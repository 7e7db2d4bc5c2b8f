"""Flags of an analysis over those that the checkpoint's run recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.analysis.config import SelectConfig, SubjectFlags, training_config
from experiments.analysis.select import _check_sizes
from experiments.join import FinetuneConfig, build_alignment
from prismatic.policies import get_family
from prismatic.util.errors import UsageError
from prismatic.vla.platforms import NormalizationType, Platform, get_platform


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A checkpoint of a run with VGGT and layers by hand, as far as its flags are concerned."""
    recorded = {"vggt_path": "/recorded", "vla_layers_align": "1,2", "vggt_layers_align": "0,1"}
    recorded |= {"shuffle_buffer_size": 7, "use_val_set": True, "val_fraction": 0.1}
    (tmp_path / "lora_adapter").mkdir()
    (tmp_path / "run_config.json").write_text(json.dumps(recorded))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"vggt_path": "/recorded", "teacher_path": "", "vla_layers_align": "1,2", "align_layers_file": ""}),
        ({"teacher_path": "/other"}, {"vggt_path": "", "teacher_path": "/other", "vla_layers_align": "1,2"}),
        ({"vggt_path": "/other"}, {"vggt_path": "/other", "teacher_path": ""}),
        (
            {"align_layers_file": "layers.json"},
            {"align_layers_file": "layers.json", "vla_layers_align": None, "vggt_layers_align": None},
        ),
        ({"vla_layers_align": "3,4"}, {"vla_layers_align": "3,4", "vggt_layers_align": "0,1"}),
    ],
)
def test_a_given_flag_replaces_what_was_recorded_in_its_place(
    run_folder: Path, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = training_config(SubjectFlags(**given), str(run_folder))
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.shuffle_buffer_size, config.use_val_set, config.val_fraction) == (7, False, 0.0)


def test_a_platform_of_ones_own_comes_from_the_checkpoint(run_folder: Path) -> None:
    arm = Platform("my_arm", 4, 8, 8, NormalizationType.BOUNDS)
    record = {"platform": "/gone/my_arm.json", "platform_numbers": arm.to_json()}
    (run_folder / "run_config.json").write_text(json.dumps(record))
    assert get_platform(training_config(SubjectFlags(), str(run_folder)).platform) == arm
    assert training_config(SubjectFlags(platform="aloha"), str(run_folder)).platform == "aloha"


def test_more_blocks_than_the_models_have_are_refused_before_anything_is_loaded() -> None:
    depths = {"student": 6, "teacher": 4}
    _check_sizes(SelectConfig(strategy="sim_top", count=4, window=4), depths)
    with pytest.raises(UsageError, match="--count: 5 found; accepted: 1 to 4"):
        _check_sizes(SelectConfig(strategy="sim_top", count=5), depths)
    with pytest.raises(UsageError, match="--window: 5 found; accepted: 1 to 4, the blocks of the teacher"):
        _check_sizes(SelectConfig(strategy="sim_top", count=2, window=5), depths)
    _check_sizes(SelectConfig(strategy="sim_top", teacher_strategy="deep", count=2, window=5), depths)


@pytest.mark.parametrize("flag", ["vggt_path", "teacher_path"])
def test_a_damaged_teacher_is_refused_by_its_flag(repo_root: Path, tmp_path: Path, flag: str) -> None:
    shutil.copy(repo_root / "experiments/mini/weights/teacher/config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    config = FinetuneConfig(**{flag: str(tmp_path)})
    training: Any = SimpleNamespace(
        config=config,
        parts=SimpleNamespace(vla=SimpleNamespace(llm_dim=8)),
        family=get_family("openvla"),
        device="cpu",
        compute_dtype=None,
        processor=None,
    )
    with pytest.raises(UsageError, match=f"^--{flag}: .*not readable as VGGT weights"):
        build_alignment(training, config.align_config(6, 6), 4)
