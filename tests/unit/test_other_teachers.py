"""Any vision model of timm or transformers, and the student's own copy, as teachers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from experiments.analysis.select import _teacher_blocks
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from rocket_align import AlignConfig, FrozenCopy, MultiLayerAlignment, attach
from rocket_align.analysis.importance import residual_stream
from rocket_align.teacher.registry import TeacherInfo, describe_teacher, load_teacher, teacher_hash
from tests.helpers.teacher_models import save_timm
from tests.helpers.tiny_vlms import IMAGE, TEXT_WIDTH, paligemma, paligemma_batch

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
BY_TRANSFORMERS = ("siglip", "clip", "vit", "vit_classifier", "dinov3", "paligemma")


def build(name: str) -> tuple[Any, Any]:
    """A model, and the vision transformer in it."""
    torch.manual_seed(0)
    if name == "paligemma":
        model: Any = paligemma()
        return model, model.model.vision_tower
    if name in ("siglip", "clip"):
        config = transformers.SiglipConfig if name == "siglip" else transformers.CLIPConfig
        model = transformers.AutoModel.from_config(config(vision_config=SIZES, text_config=TEXT))
        return model, model.vision_model
    if name == "vit_classifier":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES))
        return model, model.vit
    config = transformers.ViTConfig if name == "vit" else transformers.DINOv3ViTConfig
    model = transformers.AutoModel.from_config(config(**SIZES))
    return model, model


def images(size: int) -> Tensor:
    return torch.rand(2, 2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BY_TRANSFORMERS)
def test_vision_transformers_of_transformers(name: str, tmp_path: Path) -> None:
    model, encoder = build(name)
    model.eval().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    config = encoder.config
    depth, size = config.num_hidden_layers, config.image_size
    assert describe_teacher(tmp_path) == TeacherInfo("transformers", depth, config.hidden_size)
    teacher = load_teacher(tmp_path, (-1, 0), "transformers")
    features = teacher(images(size))
    side = size // 14
    assert features.grid_hw == (side, side)
    with torch.no_grad():
        states = encoder(2 * images(size).flatten(0, 1) - 1, output_hidden_states=True).hidden_states
    for layer, block in zip(features.layers, (depth - 1, 0)):
        torch.testing.assert_close(layer.flatten(0, 1), states[block + 1][:, -side * side :], rtol=1e-5, atol=1e-5)
    assert len(teacher_hash(tmp_path)) == 64
    if name == "vit":
        with pytest.raises(ValueError, match="image_size: found 56; accepted for vit: 28"):
            type(teacher).from_pretrained(tmp_path, layers="0", image_size=56)  # type: ignore[call-arg]


def test_a_model_that_drops_patches_is_refused(tmp_path: Path) -> None:
    transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="found 2 tokens; accepted: one of each patch"):
        load_teacher(tmp_path, "0")(images(28))


@pytest.mark.parametrize("registers", [0, 4])
def test_vision_transformers_of_timm(registers: int, tmp_path: Path) -> None:
    options = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 4, "num_heads": 2, "reg_tokens": registers}
    model = save_timm(tmp_path, "vit_tiny_patch16_224", 28, **options)
    assert describe_teacher(tmp_path) == TeacherInfo("timm", 4, 24)
    teacher = load_teacher(tmp_path, "2,0,2")
    assert sum(p.numel() for p in teacher.parameters()) < sum(p.numel() for p in model.parameters())
    features = teacher(images(28))
    with torch.no_grad():
        hidden = model._pos_embed(model.patch_embed(2 * images(28).flatten(0, 1) - 1))
        states = [hidden := block(hidden) for block in model.blocks]
    for layer, block in zip(features.layers, (2, 0, 2)):
        torch.testing.assert_close(layer.flatten(0, 1), states[block][:, 1 + registers :], rtol=1e-5, atol=1e-5)
    assert not layer.requires_grad and features.image_hw == (28, 28)


def test_layers_of_timms_transformers_are_measured_as_others(tmp_path: Path) -> None:
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 4, "num_heads": 2}
    save_timm(tmp_path, "vit_tiny_patch16_224", 28, **sizes)
    teacher = load_teacher(tmp_path, "-1")
    with residual_stream(*_teacher_blocks(teacher)) as states:
        features = teacher(images(28))
    assert len(states) == 5
    torch.testing.assert_close(states[4][:, 1:], features.layers[0].flatten(0, 1))


def test_convolutional_networks_of_timm(tmp_path: Path) -> None:
    save_timm(tmp_path, "convnext_atto", 64, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    assert describe_teacher(tmp_path) == TeacherInfo("timm", 4, 32)
    features = load_teacher(tmp_path, "-1")(images(50))
    assert features.layers[0].shape == (2, 2, 49, 32) and features[1:3] == ((7, 7), (224, 224))
    with pytest.raises(ValueError, match=r"found grids .* accepted: layers of one grid"):
        load_teacher(tmp_path, "2,3")(images(64))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "vit_nowhere"}, "vit_nowhere: timm .* cannot build it"),
        ({"pretrained_cfg": {}}, "not a model of timm or OpenVLA"),
        ({"model_args": {"depth": 5}}, r"missing .* \("),
    ],
)
def test_wrong_timm_folders_are_refused_in_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_timm(tmp_path, "vit_tiny_patch16_224", 28, img_size=28, patch_size=14, embed_dim=24, depth=2, num_heads=2)
    config = json.loads((tmp_path / "config.json").read_text())
    merged = {**config, **change}
    if "model_args" in change:
        merged["model_args"] = {**config["model_args"], **change["model_args"]}
    (tmp_path / "config.json").write_text(json.dumps(merged))
    with pytest.raises(ValueError, match=said) as refused:
        load_teacher(tmp_path, "-1")
    assert "\n" not in str(refused.value)


def test_the_students_own_vision_encoder(repo_root: Path) -> None:
    folder = repo_root / "experiments" / "mini" / "weights" / "student"
    assert describe_teacher(folder) == TeacherInfo("openvla", 3, 96)
    student = OpenVLAForActionPrediction.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = images(84)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normed = (pixels.flatten(0, 1) - mean[:, None, None]) / std[:, None, None]
    expected = student.vision_backbone.featurizer.get_intermediate_layers(normed, n=[1])[0]
    features = load_teacher(folder, "1,2")(pixels)
    torch.testing.assert_close(features.layers[0].flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


def test_the_students_own_frozen_copy() -> None:
    model, batch = paligemma(), paligemma_batch()
    layers = ("block.0", "block.2")
    taps = attach(model, layers, IMAGE)
    anchor = FrozenCopy(model, layers, IMAGE)
    alignment = MultiLayerAlignment(
        AlignConfig(student_layers=(1, 3), teacher_layers=(0, 2)), TEXT_WIDTH, TEXT_WIDTH // 2
    )
    optimizer = torch.optim.SGD([*model.parameters(), *alignment.parameters()], lr=0.1)
    first = anchor(**batch).pooled_KBNC
    for step in range(2):
        loss = model(**batch).loss
        rows, targets = taps.take(), anchor(**batch)
        assert torch.equal(rows, targets.pooled_KBNC) is (step == 0)
        assert torch.equal(targets.pooled_KBNC, first)
        (loss + alignment.align(rows, targets).loss).backward()
        optimizer.step()
    assert not first.requires_grad
