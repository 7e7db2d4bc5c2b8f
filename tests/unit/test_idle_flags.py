"""Flags that would have no effect, or another than they say, are told or refused before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.analysis.cka import measure_cka
from experiments.analysis.config import CkaConfig, SelectConfig
from prismatic.training.config import _ADAPTER_FLAGS, TrainConfig
from prismatic.util.errors import UsageError


def config(folder: Path, **flags: Any) -> TrainConfig:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    places = {"vla_path": str(folder / "model"), "data_root_dir": folder, "run_root_dir": folder / "runs"}
    return TrainConfig(**{"run_id_override": "run", **places, **flags})


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / "runs" / f"run--{step}_chkpt"
    (path / "training_state").mkdir(parents=True)
    return path


def test_settings_of_adapters_without_adapters_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags: dict[str, Any] = {"lora_rank": 64, "lora_dropout": 0.1, "use_dora": True}
    for quiet in ({**flags}, {"use_lora": False}):
        config(tmp_path, **quiet).validate()
    # What an earlier run was begun with goes on.
    config(tmp_path, **flags, use_lora=False, resume=True, vla_path=str(checkpoint(tmp_path, 3))).validate()
    assert capsys.readouterr().err == ""
    config(tmp_path, **flags, use_lora=False).validate()
    said = "warning: --lora_rank, --use_dora, --lora_dropout without effect: --use_lora is False\n"
    assert capsys.readouterr().err == said


def test_every_setting_of_adapters_is_known_as_one() -> None:
    names = {field.name for field in fields(TrainConfig) if "lora" in field.name or "dora" in field.name}
    assert set(_ADAPTER_FLAGS) == names - {"use_lora"}


def test_a_step_to_resume_needs_its_checkpoint(tmp_path: Path) -> None:
    config(tmp_path, resume=True).validate()
    with pytest.raises(UsageError, match=r"^--resume_step: 5 found, but .*runs/run has no checkpoint yet; accepted"):
        config(tmp_path, resume=True, resume_step=5).validate()
    five = checkpoint(tmp_path, 5)
    going_on = config(tmp_path, resume=True, resume_step=5)
    going_on.validate()
    assert going_on.vla_path == str(five)
    checkpoint(tmp_path, 7)
    config(tmp_path, resume=True).validate()
    with pytest.raises(UsageError, match=r"^--resume_step: 5 found, but .*run--7_chkpt, is of step 7; accepted: 7 or"):
        config(tmp_path, resume=True, resume_step=5).validate()
    config(tmp_path, resume=True, resume_step=5, vla_path=str(five)).validate()


def test_cka_of_samples_needs_four_of_them() -> None:
    few: dict[str, Any] = {"checkpoint": "x", "rows": "samples", "estimator": "minibatch"}
    exact = {**few, "estimator": "exact"}
    with pytest.raises(UsageError, match=r"^--batch_size: 3 found; accepted for minibatch: 4 or more"):
        CkaConfig(**few, batch_size=3)
    with pytest.raises(UsageError, match=r"^--num_samples: 3 found; accepted with --rows samples: 4 or more"):
        CkaConfig(**exact, num_samples=3, batch_size=3)
    with pytest.raises(UsageError, match=r"^--num_samples: 1 found; .*: 2 or more"):
        CkaConfig(**exact, num_samples=1, batch_size=1, debiased=False)
    CkaConfig(**exact, num_samples=3, batch_size=3, debiased=False)
    CkaConfig(**exact, num_samples=3, batch_size=2)  # Rounded up to whole batches.
    CkaConfig(**few | {"rows": "tokens"}, batch_size=1)
    flags: dict[str, Any] = {"strategy": "cka", "count": 1, "batch_size": 3}
    SelectConfig(**exact, **flags).validate_selection()
    with pytest.raises(UsageError, match=r"^--batch_size: 3 found"):
        SelectConfig(**few, **flags).validate_selection()
    SelectConfig(**few, **flags | {"strategy": "uniform"}).validate_selection()


@pytest.mark.parametrize("estimator", ["exact", "minibatch"])
def test_cka_of_few_rows_that_count_is_refused(estimator: Any) -> None:
    """Skipped where a batch has too few of them for an estimate of its own."""
    tokens = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    full, few = torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    few[0, :3] = True

    def measured(*masks: torch.Tensor) -> torch.Tensor:
        passes = [SimpleNamespace(mask_BN=mask) for mask in masks]
        loaded: Any = SimpleNamespace(passes=lambda: iter(passes), flags=SimpleNamespace(num_samples=3, batch_size=3))
        loaded.student_states, loaded.teacher_blocks = lambda _: tokens, lambda _: tokens.square()
        return measure_cka(loaded, "tokens", debiased=True, estimator=estimator)

    with pytest.raises(UsageError, match=r"^--num_samples: 3 found in batches of 3, which gives [03] rows that count"):
        measured(few)
    assert torch.equal(measured(full, few), measured(full)) == (estimator == "minibatch")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": "x"}, "--batch_size: 'x' found; accepted: a whole number"),
        ({"image_aug": {}}, "--image_aug: {} found; accepted: True or False"),
        ({"learning_rate": [1]}, r"--learning_rate: \[1\] found; accepted: a number"),
    ],
)
def test_a_record_whose_numbers_are_none_is_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^{said}"):
        config(tmp_path, **change).validate()


def test_a_record_with_idle_flags_is_analyzed(tmp_path: Path) -> None:
    from experiments.analysis.config import SubjectFlags, training_config

    folder = checkpoint(tmp_path, 3)
    (folder / "lora_adapter").mkdir()
    (folder / "run_config.json").write_text(json.dumps({"use_lora": False, "use_dora": True}))
    flags: Any = SubjectFlags
    flags = flags(checkpoint=str(folder), data_root_dir=tmp_path)
    training_config(flags, str(folder)).validate()
