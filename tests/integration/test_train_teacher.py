"""The mini teacher's own main: trains, resumes at the very next step, saves what VGGTTeacher loads."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.mini.make.teacher_data import TrainTeacherConfig
from experiments.mini.make.teacher_frames import load_frames
from experiments.mini.make.teacher_training import Trainer, learning_rate
from experiments.mini.make.train_teacher import main
from prismatic.util.cli import parse
from prismatic.util.errors import UsageError
from rocket_align.teacher.vggt.teacher import VGGTTeacher


def _write_shard(path: Path, seed: int, frames: int = 12, size: int = 32) -> None:
    """Views of a slanted wall, brighter where it is nearer: something that can be learned."""
    rng = np.random.default_rng(seed)
    distance = rng.uniform(0.5, 1.5, (frames, 2, 1, 1))
    slant = rng.uniform(-0.01, 0.01, (frames, 2, 1, 1)) * np.arange(size)
    depths = np.broadcast_to(distance + slant, (frames, 2, size, size))
    images = np.repeat((255 / (1 + depths)).astype(np.uint8)[..., None], 3, axis=-1)
    intrinsics = np.array([[-30.0, 0, size / 2], [0, 30.0, size / 2], [0, 0, 1]], dtype=np.float32)
    poses = np.tile(np.eye(4, dtype=np.float32), (frames, 2, 1, 1))
    poses[:, 1, :3, 3] = rng.uniform(-0.2, 0.2, (frames, 3))
    np.savez(
        path,
        images=images,
        depths=depths.astype(np.float16),
        kinds=np.full((frames, 2, size, size), 2, dtype=np.uint8),
        intrinsics=np.tile(intrinsics, (frames, 2, 1, 1)),
        camera_to_world=poses,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for task in (0, 1):
        _write_shard(folder / f"libero_object-{task}.npz", seed=task)
    return folder


def _config(data: Path, out: Path, **changes: object) -> TrainTeacherConfig:
    sizes = {"image_size": 28, "embed_dim": 16, "depth": 2, "num_heads": 2, "vit_depth": 1, "cells": 2}
    run = {"steps": 6, "batch_size": 4, "warmup_steps": 2, "save_every": 3, "log_every": 2, "threads": 1}
    tasks = {"train_tasks": "libero_object:0", "held_out_tasks": "libero_object:1"}
    return TrainTeacherConfig(data=data, out=out, **{**sizes, **run, **tasks, **changes})


class _Stop(Exception):
    pass


def test_resumed_run_gives_the_weights_of_an_uninterrupted_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(_config(data, tmp_path / "straight", weights=tmp_path / "straight" / "weights"))
    step = Trainer.train_step

    def interrupted(trainer: Trainer) -> float:
        if trainer.step == 4:
            raise _Stop
        return step(trainer)

    cut = _config(data, tmp_path / "cut", weights=tmp_path / "cut" / "weights")
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(_Stop):
        main(cut)
    monkeypatch.setattr(Trainer, "train_step", step)
    main(cut)
    straight = load_file(tmp_path / "straight" / "weights" / "model.safetensors")
    resumed = load_file(tmp_path / "cut" / "weights" / "model.safetensors")
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)
    with pytest.raises(UsageError, match="learning_rate"):
        main(_config(data, tmp_path / "cut", learning_rate=0.5))


def test_training_lowers_the_loss_and_saves_a_teacher(data: Path, tmp_path: Path) -> None:
    main(_config(data, tmp_path / "run", steps=80, weights=tmp_path / "weights", ema_decay=0.5))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    report = json.loads((tmp_path / "weights" / "evaluation.json").read_text())
    assert report["held_out_frames"] == 12
    assert report["held_out"]["layer_1"]["abs_rel"] < 0.85 * report["held_out"]["mean_of_cell"]["abs_rel"]
    teacher = VGGTTeacher.from_pretrained(tmp_path / "weights", layers="0,-1")
    features = teacher(torch.rand(1, 2, 3, 40, 40))
    assert features.grid_hw == (2, 2)
    assert features.layers[1].shape == (1, 2, 4, 32)


def test_control_leaves_the_aggregator_as_it_was(data: Path, tmp_path: Path) -> None:
    frames = load_frames(data, [("libero_object", 0)], 28)
    trainer = Trainer(_config(data, tmp_path, control=True), frames, frames)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for _ in range(3):
        trainer.train_step()
    after = trainer.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("readouts.") for name in changed)


def test_learning_rate_warms_up_and_ends_near_zero(data: Path, tmp_path: Path) -> None:
    cfg = _config(data, tmp_path, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(cfg, step) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[9:]))
    assert rates[-1] < 0.001


def test_a_control_leaves_no_weights_behind() -> None:
    with pytest.raises(UsageError, match="--weights"):
        parse(TrainTeacherConfig, ["--data", "d", "--out", "o", "--control", "true", "--weights", "w"])
