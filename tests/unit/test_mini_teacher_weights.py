"""The shipped mini teacher loads as a VGGT teacher, and its layers know the depth of frames it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.mini.make.teacher_model import READOUT_NAME, TeacherModel
from rocket_align.teacher.vggt.config import AGGREGATOR_PREFIX, find_weights, load_strictly, read_weights
from rocket_align.teacher.vggt.teacher import VGGTTeacher

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "mini" / "weights" / "teacher"


@pytest.fixture(scope="module")
def examples() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, V, 3, 84, 84) in [0, 1] and depths (B, V, G, G) in meters, of held-out tasks."""
    with np.load(FOLDER / "examples.npz", allow_pickle=False) as archive:
        return torch.from_numpy(archive["images"]).float() / 255, torch.from_numpy(archive["depths"]).float()


def test_is_small_and_loads_all_layers() -> None:
    teacher = VGGTTeacher.from_pretrained(FOLDER, layers=tuple(range(6)))
    assert len(teacher.layers) == teacher.config.depth == 6
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6_000_000
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_features_are_finite_deterministic_and_differ_between_layers_and_images(examples) -> None:
    images, _ = examples
    teacher = VGGTTeacher.from_pretrained(FOLDER, layers="0,2,-1")
    first, second = teacher(images), teacher(images)
    assert first.grid_hw == (6, 6)
    for mine, again in zip(first.layers, second.layers, strict=True):
        assert mine.shape == (len(images), 2, 36, 2 * teacher.embed_dim)
        assert mine.isfinite().all()
        assert torch.equal(mine, again)
        assert mine.std(dim=0).mean() > 0.1 * mine.std()
    flat = [layer.flatten(0, 2) for layer in first.layers]
    assert torch.cosine_similarity(flat[0], flat[2], dim=-1).mean() < 0.99


def test_larger_pictures_are_resized() -> None:
    teacher = VGGTTeacher.from_pretrained(FOLDER, layers="-1")
    assert teacher(torch.rand(1, 2, 3, 224, 224)).layers[0].shape[2] == 36


def _model_with_readouts() -> TeacherModel:
    weights, config = find_weights(FOLDER)
    readouts = load_file(FOLDER / READOUT_NAME)
    model = TeacherModel(config, cells=readouts["scale.depth_mean"].shape[1] // config.grid_size)
    aggregator = read_weights(weights, config.depth)
    named = {"aggregator." + name.removeprefix(AGGREGATOR_PREFIX): value for name, value in aggregator.items()}
    load_strictly(model, {**named, **readouts}, weights)
    return model.eval()


def test_every_layer_reads_depth_better_than_the_mean_scene(examples) -> None:
    images, depths = examples
    model = _model_with_readouts()
    mean = model.scale.depth_mean[..., 0].exp()
    baseline = ((mean - depths).abs() / depths).mean()
    with torch.no_grad():
        predictions = model(images)
    for layer, prediction in enumerate(predictions):
        read = model.scale.restore(prediction, torch.zeros_like(depths, dtype=torch.uint8)).depth_BVGG
        error = ((read - depths).abs() / depths).mean()
        assert error < 0.85 * baseline, f"layer {layer}: {error:.3f} against {baseline:.3f}"


def test_card_states_the_scores_of_the_evaluation() -> None:
    report = json.loads((FOLDER / "evaluation.json").read_text())
    card = (FOLDER / "README.md").read_text()
    for layer in range(6):
        assert f"{report['held_out'][f'layer_{layer}']['abs_rel']:.3f}" in card
    assert f"{report['steps']:,} steps" in card
