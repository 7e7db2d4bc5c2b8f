"""The analysis commands on a checkpoint of the real fine-tuning script: each measures, writes JSON and a picture."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

import analyze
import finetune
from tests.helpers.training import training_flags, writable_copy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny dataset libero_spatial_no_noops."""
    return writable_copy(golden_dir / "rlds", tmp_path_factory.mktemp("data") / "rlds")


@pytest.fixture(scope="module")
def checkpoints(
    student_folder: Path, teacher_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One step of training with a shared and with independent projectors."""
    runs = tmp_path_factory.mktemp("runs")
    for recipe in ("rocket", "naive", "baseline"):
        AcceleratorState._reset_state(reset_partial_state=True)
        flags = training_flags(student_folder, data, runs) | {"run_id_override": recipe, "max_steps": 1}
        flags |= {"vggt_path": "" if recipe == "baseline" else str(teacher_folder), "learning_rate": 5e-4}
        assert finetune.main(finetune.FinetuneConfig(recipe=recipe, merge_lora_during_training=False, **flags)) == 0
    return {recipe: runs / f"{recipe}--1_chkpt" for recipe in ("rocket", "naive", "baseline")}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a command in this process; returns the JSON it wrote, after a look at its picture."""

    def call(command: str, *flags: object) -> dict[str, Any]:
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit) as end:
            analyze.main([command, *map(str, flags), "--out_dir", str(tmp_path)])
        assert end.value.code == 0, capsys.readouterr().err
        with Image.open(tmp_path / f"{command}.png") as picture:
            assert picture.info["dpi"][0] == pytest.approx(300, abs=1)
            assert len(picture.convert("RGB").getcolors(10**7) or []) > 50
        return json.loads((tmp_path / f"{command}.json").read_text())

    return call


def measured(checkpoints: dict[str, Path], *recipes: str) -> list[object]:
    folders = ",".join(str(checkpoints[recipe]) for recipe in recipes)
    return ["--checkpoint", folders, "--num_samples", 4, "--batch_size", 2]


def test_cka(run: Any, checkpoints: dict[str, Path], teacher_folder: Path) -> None:
    found = run("cka", *measured(checkpoints, "rocket", "baseline"), "--vggt_path", teacher_folder)
    rocket, baseline = found["subjects"]
    assert (rocket["label"], baseline["recipe"]) == ("rocket, step 1", "baseline")
    cka = np.array(rocket["cka"])
    depth = rocket["student_depth"]
    assert cka.shape == (depth + 1, 6)
    assert np.isfinite(cka).all()
    assert {pair["teacher"] for pair in rocket["matching"]} == set(range(6))
    assert (np.array(baseline["cka"]) != cka).any()
    assert rocket["samples"] == 4


def test_gradients(run: Any, checkpoints: dict[str, Path]) -> None:
    found = run("gradients", *measured(checkpoints, "rocket", "naive"))
    for subject in found["subjects"]:
        assert subject["losses"][-1] == "action"
        first = np.array(subject["groups"]["0"]["cosine"], dtype=float)
        assert first.shape == (6, 6)
        assert np.allclose(np.diag(first), 1)
        assert np.allclose(first, first.T)
        assert len(subject["groups"]) == subject["student_depth"] + 1
        # The first pair's state is the output of block 0, so its loss reaches no later block.
        later = subject["groups"]["1"]["cosine"]
        assert subject["student_layers"][0] == 1
        assert later[0] == [None] * 6
        assert math.isfinite(subject["groups"]["all"]["alignment_with_action"])


def test_projectors(run: Any, checkpoints: dict[str, Path]) -> None:
    rocket, naive = run("projectors", *measured(checkpoints, "rocket", "naive"))["subjects"]
    assert rocket["projector"] == "matryoshka"
    assert naive["projector"] == "independent"
    assert rocket["mean_between_pairs"]["fc1"] > 0.5
    assert abs(naive["mean_between_pairs"]["fc1"]) < 0.1
    assert rocket["mean_between_pairs"]["same_input"] > naive["mean_between_pairs"]["same_input"]


def test_cone(run: Any, checkpoints: dict[str, Path], teacher_folder: Path) -> None:
    found = run("cone", *measured(checkpoints, "naive", "baseline"), "--vggt_path", teacher_folder)
    naive, baseline = found["subjects"]
    assert len(naive["student"]["within_samples"]) == naive["student_depth"] + 1
    assert len(naive["teacher"]["overall"]) == 6
    assert len(naive["projected"]["within_samples"]) == 5
    assert baseline["projected"]["within_samples"] == []


def test_static(run: Any, student_folder: Path, teacher_folder: Path, data: Path) -> None:
    """Of a base model, before any training."""
    given = {"vggt_path": teacher_folder, "data_root_dir": data, "num_images_in_input": 2, "num_samples": 6}
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    layers = ["--vla_layers_align", "1,2,3", "--vggt_layers_align", "5,2,5", "--batch_size", 2]
    (part,) = run("static", "--checkpoint", student_folder, *flags, *layers)["subjects"]
    assert (part["samples"], part["teacher_layers"]) == (6, [5, 2, 5])
    plain, augmented = (np.array(part[name]["explained_by_place"]) for name in ("plain", "augmented"))
    assert plain.shape == augmented.shape == (3, 2)
    assert (plain > 0).all() and (plain < 1).all() and (plain != augmented).all()
    assert (plain[0] == plain[2]).all() and (plain[0] != plain[1]).all()
    loss = np.array(part["plain"]["loss_of_constant_per_place"])
    assert (loss > 0).all() and (loss < 1).all()


@pytest.mark.parametrize("reference", ["first", "mean"])
def test_theorem(run: Any, checkpoints: dict[str, Path], reference: str) -> None:
    found = run("theorem", *measured(checkpoints, "rocket", "naive"), "--reference", reference)
    for subject in found["subjects"]:
        assert subject["holds_for_every_pair"]
        assert subject["per_token"]["holds_share"] == 1
        assert subject["tokens"] == 4 * 2 * 36
        assert 0 <= subject["eta"] <= 1
        assert subject["c"] > 0
    assert found["subjects"][0]["residual_increment"][0] == pytest.approx(0) or reference == "mean"


def test_depth_of_real_frames(run: Any, tmp_path: Path) -> None:
    """The mini teacher on eight frames of the simulator that lie beside its weights."""
    teacher = ROOT / "experiments" / "mini" / "weights" / "teacher"
    with np.load(teacher / "examples.npz") as archive:
        images, depths = archive["images"].transpose(0, 1, 3, 4, 2), archive["depths"]
    frames = tmp_path / "frames"
    frames.mkdir()
    for task, part in ((0, slice(0, None, 2)), (1, slice(1, None, 2))):
        np.savez(frames / f"libero_object-{task}.npz", images=images[part], depths=depths[part])
    tasks = ["--train_tasks", "libero_object:0", "--test_tasks", "libero_object:1", "--cells", 2, "--pictures", 2]
    found = run("depth", "--vggt_path", teacher, "--ridge", 0.3, "--frames_dir", frames, *tasks)
    assert found["test_frames"] == 4
    assert list(found["layers"]) == [str(layer) for layer in range(6)]
    best = min(errors["abs_rel"] for errors in found["layers"].values())
    # Four frames are few to fit on, but one number for all depths would be off by more than half.
    assert best < 0.35


def test_depth_does_not_take_frames_of_others_for_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames, teacher = tmp_path / "frames", ROOT / "experiments" / "mini" / "weights" / "teacher"
    frames.mkdir()
    for task in (0, 1):
        np.savez(frames / f"libero_object-{task}.npz", images=np.zeros(0), depths=np.zeros(0))
    (frames / "frames.json").write_text('{"episodes": 3, "frames": 8, "image_size": 128, "seed": 1}')
    tasks = ["--train_tasks", "libero_object:0", "--test_tasks", "libero_object:1"]
    with pytest.raises(SystemExit) as end:
        analyze.main(["depth", "--vggt_path", str(teacher), *tasks, "--out_dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "--seed 1, not 0" in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["ckaa"], "did you mean 'cka'"),
        ([], "accepted: cka, cone"),
        (["cka", "--checkpoint", "x", "--estimator", "minibatch", "--debiased", "False"], "--estimator: minibatch"),
        (["depth"], "--vggt_path"),
        (["gradients", "--checkpoint", "nowhere"], "--data_root_dir"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        analyze.main(flags)
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and error.count("\n") == 1


def test_an_analysis_of_the_alignment_needs_one(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("gradients", "projectors", "theorem"):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit) as end:
            analyze.main([command, *map(str, measured(checkpoints, "baseline")), "--out_dir", str(tmp_path)])
        assert end.value.code == 2
        assert "no alignment (recipe baseline)" in capsys.readouterr().err


def test_a_moved_base_model_is_named_and_can_be_given(
    run: Any, checkpoints: dict[str, Path], student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "rocket--1_chkpt"
    shutil.copytree(checkpoints["rocket"], moved)
    adapter = moved / "lora_adapter" / "adapter_config.json"
    adapter.write_text(adapter.read_text().replace(str(student_folder), "/gone/student"))
    flags = ["--checkpoint", str(moved), "--num_samples", "1", "--batch_size", "1", "--out_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        analyze.main(["projectors", *flags])
    assert end.value.code == 2
    assert "/gone/student; accepted: another one with --base_checkpoint" in capsys.readouterr().err
    run("projectors", *flags[:-2], "--base_checkpoint", student_folder)
