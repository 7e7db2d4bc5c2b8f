"""DINOv2 and Depth Anything as teachers: the same features as transformers' own models, cut and frozen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rocket_align.pooling import pool_teacher
from rocket_align.teacher.base import TeacherFeatures
from rocket_align.teacher.vit import ViTTeacher
from tests.helpers.teacher_models import DEPTH, MEAN, REGISTERS, STD, VIT_TEACHERS, WIDTH, build_vit, save_vit


@pytest.fixture(scope="module", params=VIT_TEACHERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    return save_vit("dinov2", tmp_path / "dinov2")


def views(size: int = 84) -> torch.Tensor:
    return torch.rand(2, 3, 3, size, size, generator=torch.Generator().manual_seed(1))


def hidden_states(model_type: str, images_BV3HW: torch.Tensor, size: int) -> list[torch.Tensor]:
    """transformers' own states of each view alone, without class and register tokens: after each block (BV, P, C)."""
    model = build_vit(model_type)
    resized = F.interpolate(images_BV3HW.flatten(0, 1), size=(size, size), mode="bicubic")
    pixels = (resized - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    backbone = getattr(model, "backbone", model)
    special = 1 + (REGISTERS if "registers" in model_type else 0)
    with torch.no_grad():
        states = [backbone(pixel[None], output_hidden_states=True).hidden_states for pixel in pixels]
    return [torch.cat([of_view[i + 1] for of_view in states])[:, special:] for i in range(DEPTH)]


def test_features_are_transformers_hidden_states(folder: Path) -> None:
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    size = 70 if model_type == "depth_anything" else 56
    teacher = ViTTeacher.from_pretrained(folder, layers=[2, 0, -1])
    features = teacher(views())
    assert isinstance(features, TeacherFeatures)
    assert (features.grid_hw, features.image_hw) == ((size // 14, size // 14), (size, size))
    expected = hidden_states(model_type, views(), size)
    for layer, feature in zip((2, 0, 3), features.layers):
        assert feature.shape == (2, 3, (size // 14) ** 2, WIDTH)
        torch.testing.assert_close(feature.flatten(0, 1), expected[layer], atol=1e-5, rtol=1e-5)


def test_blocks_after_the_last_layer_are_neither_read_nor_built(folder: Path, tmp_path: Path) -> None:
    whole = ViTTeacher.from_pretrained(folder, layers=[1, 3])
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if ".layer.2." not in k and ".layer.3." not in k and "neck" not in k}
    assert len(kept) < len(weights)
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({k: v for k, v in kept.items() if not k.startswith("head")}, tmp_path / "model.safetensors")
    cut = ViTTeacher.from_pretrained(tmp_path, layers=[1])
    assert torch.equal(cut(views()).layers[0], whole(views()).layers[0])
    count = {name: sum(p.numel() for p in teacher.parameters()) for name, teacher in (("cut", cut), ("whole", whole))}
    assert count["cut"] < count["whole"]
    with pytest.raises(ValueError, match="missing"):
        ViTTeacher.from_pretrained(tmp_path, layers=[3])


def test_views_are_independent(folder: Path) -> None:
    teacher = ViTTeacher.from_pretrained(folder, layers=[3])
    images = views()
    together, alone = teacher(images).layers[0], teacher(images[:, 1:2]).layers[0]
    torch.testing.assert_close(together[:, 1:2], alone, atol=1e-5, rtol=1e-5)


def test_size_and_colors_without_a_preprocessor(dinov2: Path) -> None:
    (dinov2 / "preprocessor_config.json").unlink()
    assert ViTTeacher.from_pretrained(dinov2, layers=[0]).image_size == 56
    teacher = ViTTeacher.from_pretrained(dinov2, layers=[0], image_size=28)
    assert teacher(views()).grid_hw == (2, 2)
    assert teacher(torch.rand(1, 1, 3, 20, 40)).image_hw == (14, 28)
    with pytest.raises(ValueError, match="image_size: found 30"):
        ViTTeacher.from_pretrained(dinov2, layers=[0], image_size=30)


def test_pools_with_the_position_embedding(folder: Path) -> None:
    features = ViTTeacher.from_pretrained(folder, layers=[1])(views())
    layer, grid, image = features.layers[0], features.grid_hw, features.image_hw
    pooled = {
        pe: pool_teacher(layer, grid, image, 3 * 9, mode="bilinear", position_embedding=pe) for pe in (True, False)
    }
    assert pooled[True].shape == (2, 27, WIDTH)
    assert not torch.equal(pooled[True], pooled[False])


WEIGHTS, INDEX, PREPROCESSOR = "model.safetensors", "model.safetensors.index.json", "preprocessor_config.json"


def reshape_the_token(at: Path) -> None:
    save_file({**load_file(at / WEIGHTS), "embeddings.cls_token": torch.zeros(1, 1, 8)}, at / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda at: (at / WEIGHTS).rename(at / "pytorch_model.bin"), "accepted: a teacher's weights as safetensors"),
        (lambda at: (at / WEIGHTS).write_bytes(b"nothing of the kind"), "not readable as safetensors"),
        (reshape_the_token, "do not fit"),
        (lambda at: (at / "config.json").write_text('{"model_type": "llama"}'), "accepted: dinov2"),
        (lambda at: (at / "config.json").unlink(), "no config.json"),
        (lambda at: (at / PREPROCESSOR).write_text("{"), "not valid JSON"),
        (lambda at: (at / PREPROCESSOR).write_text("[]"), "found JSON of type list"),
        (lambda at: (at / WEIGHTS).rename(at / INDEX).write_text("{"), "index.json: not valid JSON"),
        (lambda at: (at / WEIGHTS).rename(at / INDEX).write_text("{}"), "index.json: no weight_map"),
    ],
)
def test_wrong_files_are_refused_in_one_line(dinov2: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(dinov2)
    with pytest.raises(ValueError, match=said) as refused:
        ViTTeacher.from_pretrained(dinov2, layers=[0])
    assert "\n" not in str(refused.value) and str(dinov2) in str(refused.value)
