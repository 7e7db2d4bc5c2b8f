"""The real fine-tuning script on real files: every recipe trains, saves and resumes; every objective runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from safetensors.torch import load_file, save_file

from prismatic.policies import openvla as family
from prismatic.training.config import TrainConfig
from prismatic.training.metrics import read_log
from prismatic.training.run import TrainingRun
from prismatic.util.errors import UsageError
from tests.helpers.noise import noise
from tests.helpers.programs import run_program
from tests.helpers.training import trained_weights, training_flags

RECIPES = ("baseline", "spatial_forcing", "naive", "shared", "rocket")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_and_resumes(recipe: str, finetune: Callable[..., Path], teacher_folder: Path) -> None:
    teacher = {"vggt_path": str(teacher_folder)} if recipe != "baseline" else {}
    runs = finetune(recipe=recipe, merge_lora_during_training=False, **teacher)
    first = runs / "run--2_chkpt"
    finetune(recipe=recipe, merge_lora_during_training=False, vla_path=str(first), resume=True, max_steps=3, **teacher)
    rows = read_log(runs / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["action_loss"] < 3 for row in rows)
    pairs = sum(key.startswith("align_loss_pair") for key in rows[0])
    assert pairs == {"baseline": 0, "spatial_forcing": 1}.get(recipe, 5)
    before, after = trained_weights(first), trained_weights(runs / "run--3_chkpt")
    assert before.keys() == after.keys()
    assert {key.split("/")[0] for key in after} == {"lora", "action_head", "proprio_projector"} | (
        set() if recipe == "baseline" else {"align_projectors"}
    )
    for part in {key.split("/")[0] for key in after}:
        assert any(not torch.equal(before[key], after[key]) for key in after if key.startswith(part)), part


RANDOM = {"lora_dropout": 0.5, "use_l1_regression": False, "use_diffusion": True, "num_diffusion_steps_train": 3}


@pytest.mark.parametrize("options", [{}, RANDOM], ids=["l1", "diffusion and dropout"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    options: dict[str, Any], finetune: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"vggt_path": str(teacher_folder), "merge_lora_during_training": False, **options}
    straight = finetune(run_root_dir=tmp_path / "a", max_steps=4, **flags)
    finetune(run_root_dir=tmp_path / "b", max_steps=4, save_freq=2, **flags)
    halfway = tmp_path / "b" / "run--2_chkpt"
    resumed = finetune(run_root_dir=tmp_path / "c", vla_path=str(halfway), resume=True, max_steps=4, **flags)
    expected, actual = trained_weights(straight / "run--4_chkpt"), trained_weights(resumed / "run--4_chkpt")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_same_command_goes_on_from_the_newest_intact_checkpoint(
    finetune: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a cluster starts a job again: it begins, goes on past a damaged checkpoint, ends as if nothing had been."""
    flags: dict[str, Any] = {"recipe": "baseline", "merge_lora_during_training": False, "save_freq": 1, "resume": True}
    straight = finetune(run_root_dir=tmp_path / "a", max_steps=3, **flags)
    runs = finetune(run_root_dir=tmp_path / "b", max_steps=2, **flags)
    damaged = runs / "run--2_chkpt" / "lora_adapter" / "adapter_model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    finetune(run_root_dir=tmp_path / "b", max_steps=3, **flags)
    assert f"left out: {damaged}: damaged" in capsys.readouterr().err
    assert [row["step"] for row in read_log(runs / "run" / "metrics.jsonl")] == [1, 2, 3]
    expected, actual = trained_weights(straight / "run--3_chkpt"), trained_weights(runs / "run--3_chkpt")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    with pytest.raises(UsageError, match=r"no checkpoint yet|no such folder"):
        finetune(**{**flags, "vla_path": str(tmp_path / "none")})
    (runs / "run--3_chkpt" / "training_state" / "checksums.json").unlink()
    finetune(vla_path=str(runs / "run"), run_root_dir=tmp_path / "b", max_steps=4, **flags)
    assert (runs / "run--4_chkpt").is_dir()
    damaged.write_bytes(content)
    with pytest.raises(UsageError, match=r"--resume: .*adapter_model.safetensors: damaged"):
        finetune(vla_path=str(damaged.parents[1]), run_root_dir=tmp_path / "b", max_steps=4, **flags)


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(finetune: Callable[..., Path], tmp_path: Path) -> None:
    flags: dict[str, Any] = {"recipe": "baseline", "merge_lora_during_training": False, "max_steps": 6}
    flags |= {"save_freq": 1, "wandb_log_freq": 5, "learning_rate": 1e30}
    with pytest.raises(
        UsageError, match=r"not finite at step \d, in the batch of epoch 0, libero_spatial_no_noops \d+:\d+ \d+:\d+ "
    ):
        finetune(**flags)
    for file in (tmp_path / "runs").glob("*_chkpt/action_head--*"):
        assert all(value.isfinite().all() for value in torch.load(file, weights_only=True).values())


class GivenLoss(torch.nn.Module):
    """An auxiliary loss that is what its target says."""

    def forward(self, hidden_states: tuple[torch.Tensor, ...], teacher: float, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(loss=hidden_states[0].mean() * teacher, per_pair=[])


def test_batches_that_are_not_finite_are_left_out_when_asked(
    student_folder: Path, rlds_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = training_flags(student_folder, rlds_root, tmp_path) | {"num_images_in_input": 1, "use_proprio": False}
    config = TrainConfig(**{**flags, "max_steps": 3}, skip_nonfinite=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    factors = iter([1.0, float("nan"), 1.0])
    TrainingRun(config, asdict(config)).fit(GivenLoss(), 1.0, lambda batch: next(factors))
    said = capsys.readouterr().err
    assert "step 2: loss or gradient is not finite; left out, worst in the batch of epoch 0, libero_spatial" in said
    rows = {row["step"]: row for row in read_log(tmp_path / "run" / "metrics.jsonl")}
    assert "loss" not in rows[2] and rows[3]["loss"] > 0
    assert all(value.isfinite().all() for value in trained_weights(tmp_path / "run--3_chkpt").values())


def test_older_checkpoints_are_removed_but_for_the_best(finetune: Callable[..., Path]) -> None:
    flags: dict[str, Any] = {"recipe": "baseline", "merge_lora_during_training": False, "max_steps": 5, "save_freq": 1}
    flags |= {"use_val_set": True, "val_fraction": 0.5, "val_freq": 1, "save_specific_steps": "2"}
    runs = finetune(keep_checkpoints=1, keep_best=True, **flags)
    losses = {row["step"]: row["val/loss"] for row in read_log(runs / "run/metrics.jsonl") if "val/loss" in row}
    kept = {f"run--{step}_chkpt" for step in {2, 5, min(losses, key=losses.__getitem__)}}
    assert {folder.name for folder in runs.iterdir()} - {"run"} == kept


def test_trackers_get_project_and_run(
    finetune: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights & Biases needs an account: a module of its name notes how it is called."""
    calls: list[dict[str, Any]] = []
    service = ModuleType("wandb")
    service.__spec__ = ModuleSpec("wandb", None)

    def init(**given: Any) -> SimpleNamespace:
        calls.append(given)
        return SimpleNamespace(log=lambda values, step: calls.append({"step": step, **values}), finish=lambda: None)

    monkeypatch.setattr(service, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    flags = {"recipe": "baseline", "max_steps": 1, "merge_lora_during_training": False}
    runs = finetune(trackers="tensorboard,wandb", wandb_project="arms", wandb_entity="lab", **flags)
    assert calls[0] == {"project": "arms", "entity": "lab", "name": "run"}
    assert calls[1]["step"] == 1 and calls[1]["loss"] > 0
    assert list((runs / "run").glob("events.out.tfevents.*"))


def test_upstreams_checkpoint_layout(finetune: Callable[..., Path], teacher_folder: Path) -> None:
    runs = finetune(vggt_path=str(teacher_folder), max_steps=1)
    folder = runs / "run--1_chkpt"
    names = {"lora_adapter", "model.safetensors", "tokenizer.json"}
    names |= {f"{name}.json" for name in ("config", "preprocessor_config", "dataset_statistics")}
    names |= {f"{name}--1_checkpoint.pt" for name in ("action_head", "proprio_projector", "align_projectors")}
    assert names <= {path.name for path in folder.iterdir()}
    statistics = json.loads((folder / "dataset_statistics.json").read_text())
    assert set(statistics["libero_spatial_no_noops"]["action"]) == {"mean", "std", "min", "max", "q01", "q99", "mask"}
    merged = load_file(folder / "model.safetensors")
    assert not [key for key in merged if "lora" in key or "base_layer" in key]
    assert "vision_backbone.featurizer.blocks.0.ls1.scale_factor" in merged


def test_latest_checkpoint_only_overwrites_one_folder(finetune: Callable[..., Path]) -> None:
    runs = finetune(max_steps=2, save_freq=1, save_latest_checkpoint_only=True, merge_lora_during_training=False)
    assert [path.name for path in runs.iterdir()] == ["run"]
    assert (runs / "run" / "action_head--latest_checkpoint.pt").is_file()
    assert [row["step"] for row in read_log(runs / "run" / "metrics.jsonl")] == [1, 2]
    assert torch.load(runs / "run/training_state/state.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize(
    "flags",
    [
        {"use_l1_regression": False},
        {"use_l1_regression": False, "use_diffusion": True, "num_diffusion_steps_train": 10},
        {"use_film": True},
        {"use_lora": False},
        {"num_images_in_input": 1, "use_proprio": False},
        {"grad_accumulation_steps": 2, "max_grad_norm": 1.0, "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "scheduler": "CosineAnnealingLR", "lr_warmup_steps": 1},
    ],
    ids=lambda flags: "-".join(flags),
)
def test_objectives_and_switches_combine_with_rocket(
    flags: dict[str, Any], finetune: Callable[..., Path], teacher_folder: Path
) -> None:
    runs = finetune(vggt_path=str(teacher_folder), merge_lora_during_training=False, **flags)
    rows = read_log(runs / "run" / "metrics.jsonl")
    assert len(rows) == 2
    assert all(torch.isfinite(torch.tensor([row["loss"], row["align_loss"]])).all() for row in rows)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"vla_layers_align": "1,40", "vggt_layers_align": "1,3"}, "--vla_layers_align"),
        ({"vla_layers_align": "", "vggt_layers_align": ""}, "--vla_layers_align: no layer found"),
        ({"dataset_name": "libero_spatal_no_noops"}, "did you mean"),
        ({"vggt_path": "/no/such/teacher"}, "--vggt_path"),
        ({"data_root_dir": Path("/no/such/data")}, "--data_root_dir"),
    ],
)
def test_wrong_flags_are_refused_before_any_weights_are_loaded(
    flags: dict[str, Any], words: str, finetune: Any, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "load_for_training", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=words):
        finetune(**{"vggt_path": str(teacher_folder), **flags})


def test_a_resume_with_another_alignment_is_refused(finetune: Callable[..., Path], teacher_folder: Path) -> None:
    flags: dict[str, Any] = {"merge_lora_during_training": False, "vggt_path": str(teacher_folder)}
    resumed = {**flags, "vla_path": str(finetune(max_steps=1, **flags) / "run--1_chkpt"), "resume": True}
    for change, words in (
        ({"recipe": "baseline"}, "alignment's student_layers is [], but [1, 2, 3, 4, 5] in"),
        ({"recipe": "shared"}, "alignment's projector is shared, but matryoshka in"),
        ({"use_lora": False}, "config.json: no such file"),
    ):
        with pytest.raises(UsageError) as refusal:
            finetune(**{**resumed, **change})
        assert words in str(refusal.value)
    finetune(**resumed, align_loss_coeff=0.1)


def test_a_base_model_that_is_none_is_refused(
    finetune: Callable[..., Path], student_folder: Path, tmp_path: Path
) -> None:
    """transformers would build a model of default size, or make missing weights up."""
    folder = Path(shutil.copytree(student_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "patch_embed" not in name}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"--vla_path: .*: 4 weights missing or .* shape: vision_backbone\.feat"):
        finetune(vla_path=str(folder), recipe="baseline")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"--vla_path: .*no file named model.safetensors"):
        finetune(vla_path=str(folder), recipe="baseline")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match=r"--vla_path: .*model_type 'llama' found; accepted: 'openvla'"):
        finetune(vla_path=str(folder), recipe="baseline")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves(
    number: signal.Signals, repo_root: Path, student_folder: Path, rlds_root: Path, tmp_path: Path
) -> None:
    """Ctrl-C and a cluster's SIGTERM reach the loader's process too, whose batches the step still needs."""
    command = f"""{sys.executable} vla-scripts/finetune.py --vla_path {student_folder} --data_root_dir {rlds_root}
        --run_root_dir {tmp_path} --run_id_override run --batch_size 2 --max_steps 100000 --wandb_log_freq 1
        --lora_rank 4 --num_workers 1 --trackers none --merge_lora_during_training False --grad_accumulation_steps 8"""
    process = subprocess.Popen(
        command.split(), cwd=repo_root, stderr=subprocess.PIPE, text=True, env=dict(os.environ), start_new_session=True
    )
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while len(read_log(log)) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 128 + number, errors
    steps = len(read_log(log))
    assert (tmp_path / f"run--{steps}_chkpt" / "training_state" / "state.pt").is_file()
    assert "Traceback" not in errors


def test_training_and_resuming_print_no_noise(
    repo_root: Path, student_folder: Path, teacher_folder: Path, rlds_root: Path, tmp_path: Path
) -> None:
    """Warnings of transformers, PEFT and torch, for the model that has all there is, with its base model moved."""
    moved = Path(shutil.copytree(student_folder, tmp_path / "moved"))
    flags = f"""--vggt_path {teacher_folder} --data_root_dir {rlds_root} --run_root_dir {tmp_path} --run_id_override run
        --use_film True --use_proprio True --num_images_in_input 2 --gradient_checkpointing True --batch_size 2
        --wandb_log_freq 1 --lora_rank 4 --use_val_set True --val_fraction 0.5 --val_freq 2"""
    resumed = f"--resume True --base_checkpoint {moved} --vla_path {tmp_path}/run--2_chkpt --max_steps 3"
    for further in (f"--vla_path {student_folder} --max_steps 2", resumed):
        command = [sys.executable, "vla-scripts/finetune.py", *flags.split(), *further.split()]
        done = run_program(command, cwd=repo_root)
        assert done.returncode == 0 and noise(done.stdout + done.stderr) == [], done.stdout + done.stderr
