"""Training flags: what needs no model is checked before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from accelerate import Accelerator

from prismatic.checkpoint.layout import last_checkpoint
from prismatic.training.config import TrainConfig
from prismatic.training.metrics import MetricLog
from prismatic.util.errors import UsageError


def _config(tmp_path: Path, **flags: object) -> TrainConfig:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    settings = {"vla_path": str(model), "data_root_dir": tmp_path, "run_root_dir": tmp_path / "runs", **flags}
    return TrainConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("flags", [{}, {"vla_path": "openvla/openvla-7b"}], ids=["folders", "hub id"])
def test_defaults_with_folders_that_exist_or_a_hub_id_are_accepted(flags: dict[str, object], tmp_path: Path) -> None:
    assert _config(tmp_path, **flags).validate() is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"use_diffusion": True}, "--use_l1_regression and --use_diffusion"),
        ({"trackers": "trackio"}, "trackio is not installed"),
        ({"vla_path": "./nowhere"}, "--vla_path"),
        ({"val_fraction": 0.1}, "--val_fraction: 0.1 without --use_val_set"),
        ({"run_root_dir": "/dev/null/runs"}, "--run_root_dir: /dev/null/runs cannot be a folder"),
    ],
)
def test_wrong_values_are_one_line(flags: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        _config(tmp_path, **flags).validate()


def test_a_run_is_not_overwritten_and_the_remedies_work(tmp_path: Path) -> None:
    log = tmp_path / "runs" / "mine" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.touch()
    _config(tmp_path, run_id_override="mine").validate()  # It stopped before its first step.
    log.write_text('{"step": 1}\n')
    with pytest.raises(UsageError, match=r"mine holds a run; accepted: another name, or --resume True$"):
        _config(tmp_path, run_id_override="mine").validate()
    _config(tmp_path, run_id_override="mine", resume=True).validate()
    checkpoint = tmp_path / "runs" / "mine--5_chkpt"
    (checkpoint / "training_state").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"another name, or --resume True --vla_path .*mine--5_chkpt$"):
        _config(tmp_path, run_id_override="mine").validate()
    _config(tmp_path, run_id_override="mine", resume=True, vla_path=str(checkpoint)).validate()


@pytest.mark.parametrize("name", ["..", "a/../../b", "/elsewhere/run"])
def test_a_run_stays_in_the_folder_of_runs(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--run_id_override: .* found; accepted: a folder in --run_root_dir"):
        _config(tmp_path, run_id_override=name).validate()
    _config(tmp_path, run_id_override="study/run").validate()


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    first = MetricLog(tmp_path, Accelerator())
    with pytest.raises(UsageError, match=r"--run_id_override: .* is being written; accepted: another name"):
        MetricLog(tmp_path, Accelerator())
    first.write(1, {})


def test_a_default_name_fits_however_many_stages_it_repeats(tmp_path: Path) -> None:
    folder, most = "base", os.pathconf(tmp_path, "PC_NAME_MAX")
    for stage in range(6):
        config = _config(
            tmp_path, vla_path=folder, dataset_name=f"libero_{stage}_no_noops", run_id_note=f"stage{stage}"
        )
        folder = f"{config.run_id()}--{config.max_steps}_chkpt"
        assert len(folder) <= most
        (tmp_path / f".{folder[1:]}").touch()
        assert config.run_id().startswith("base+libero_0") and config.run_id().endswith(f"--image_aug--stage{stage}")
    other = _config(tmp_path, vla_path=f"{folder}x", dataset_name="libero_5_no_noops", run_id_note="stage5")
    assert other.run_id() != config.run_id()


@pytest.mark.parametrize("name", ["n" * 250, "\u00e9" * 125])
def test_a_name_that_leaves_no_room_for_checkpoints_is_refused_before_training(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--run_id_override: a name of 250 bytes .*: at most 241, since check"):
        _config(tmp_path, run_id_override=name).validate()
    with pytest.raises(UsageError, match=r"--run_id_override: a name of 250 bytes"):
        _config(tmp_path, run_id_override=name, max_steps=1).validate()
    _config(tmp_path, run_id_override="n" * 241).validate()


def test_the_run_name_follows_upstreams_pattern() -> None:
    config = TrainConfig(vla_path="openvla/openvla-7b", dataset_name="libero_goal_no_noops", run_id_note="try")
    expected = "openvla-7b+libero_goal_no_noops+b8+lr-0.0005+lora-r32+dropout-0.0--image_aug--try"
    assert config.run_id() == expected


@pytest.mark.parametrize("folder", ["one--500_chkpt", "one", "one--500_chkpt/"])
def test_a_resumed_run_keeps_its_name(folder: str) -> None:
    assert TrainConfig(vla_path=f"runs/{folder}", resume=True).run_id() == "one"
    assert TrainConfig(vla_path=f"runs/{folder}", resume=True, run_id_override="two").run_id() == "two"


def test_the_last_checkpoint_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for name in ("run--9_chkpt", "run--100_chkpt", "run-b--500_chkpt", ".run--900_chkpt.7.tmp"):
        (tmp_path / name).mkdir()
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run--100_chkpt"
    assert last_checkpoint(tmp_path / "other") is None
