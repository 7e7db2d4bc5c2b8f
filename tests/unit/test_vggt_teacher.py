"""Loading, cutting and freezing the VGGT teacher."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rocket_align.teacher.vggt.aggregator import VGGTAggregator
from rocket_align.teacher.vggt.config import VGGTConfig, save_folder
from rocket_align.teacher.vggt.geometry import VGGTGeometry
from rocket_align.teacher.vggt.teacher import VGGTTeacher

CONFIG = VGGTConfig(image_size=28, embed_dim=16, depth=3, num_heads=2, vit_depth=1, vit_num_heads=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    weights = {f"aggregator.{key}": value for key, value in VGGTAggregator(CONFIG).state_dict().items()}
    save_folder(tmp_path / "teacher", CONFIG, {**weights, "depth_head.norm.weight": torch.ones(3)})
    return tmp_path / "teacher"


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors")


def images() -> torch.Tensor:
    return torch.rand(2, 2, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def test_stops_after_the_last_requested_layer_with_the_same_features(folder: Path) -> None:
    whole = VGGTTeacher.from_pretrained(folder, layers="0,1,2")
    cut = VGGTTeacher.from_pretrained(folder, layers=[1, 0])
    assert len(cut.aggregator.frame_blocks) == 2
    features = cut(images())
    assert features.grid_hw == (2, 2)
    assert features.layers[0].shape == (2, 2, 4, 32)
    expected = whole(images())
    assert torch.equal(features.layers[0], expected.layers[1])
    assert torch.equal(features.layers[1], expected.layers[0])


def test_runs_on_the_images_device_and_builds_no_heads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = VGGTTeacher.from_pretrained(folder, layers=[0])
    assert [name for name, _ in teacher.named_children()] == ["aggregator"]
    assert not any("head" in name for name, _ in teacher.named_parameters())
    # On the meta device nothing can be copied to the host or come from it: clamp, resize and normalization stay there.
    # It knows no autocast, which plays no part here.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    features = teacher.to("meta")(images().to("meta"))
    assert features.layers[0].device.type == "meta" and features.image_hw == (28, 28)


def test_later_layers_need_no_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    rewrite(folder, {key: value for key, value in weights.items() if "_blocks.2." not in key})
    VGGTTeacher.from_pretrained(folder, layers=[1])
    with pytest.raises(ValueError, match="missing"):
        VGGTTeacher.from_pretrained(folder, layers=[-1])


@pytest.mark.parametrize("layers", ["2,0,1", "1,1,1", [-1, 0, -1]])
def test_layers_come_in_the_order_asked_for_and_repeat(folder: Path, layers: str | list[int]) -> None:
    every = VGGTTeacher.from_pretrained(folder, layers="0,1,2")(images()).layers
    teacher = VGGTTeacher.from_pretrained(folder, layers=layers)
    for feature, layer in zip(teacher(images()).layers, teacher.layers, strict=True):
        torch.testing.assert_close(feature, every[layer])


def test_is_frozen_whatever_is_around_it(folder: Path) -> None:
    teacher = VGGTTeacher.from_pretrained(folder, layers=[0])
    torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(images().requires_grad_()).layers[0].requires_grad


def test_runs_in_the_precision_asked_for(folder: Path) -> None:
    exact = VGGTTeacher.from_pretrained(folder, layers=[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert exact(images()).layers[0].dtype == torch.float32
    half = VGGTTeacher.from_pretrained(folder, layers=[1], dtype=torch.bfloat16)
    feature = half(images()).layers[0]
    assert feature.dtype == torch.bfloat16
    torch.testing.assert_close(feature.float(), exact(images()).layers[0], atol=0.1, rtol=0.1)


def test_images_are_clamped_and_resized(folder: Path) -> None:
    teacher = VGGTTeacher.from_pretrained(folder, layers=[0])
    beyond = images() * 3 - 1
    assert torch.equal(teacher(beyond).layers[0], teacher(beyond.clamp(0, 1)).layers[0])
    assert teacher(images()).image_hw == (28, 28)
    assert teacher(torch.rand(1, 1, 3, 20, 40)).image_hw == (14, 28)


@pytest.mark.parametrize("layers", [[3], [-4], ""])
def test_refused_layers(folder: Path, layers: str | list[int]) -> None:
    with pytest.raises(ValueError, match="layers"):
        VGGTTeacher.from_pretrained(folder, layers=layers)


def test_torch_file_without_tensors_only_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: not a plain file of tensors"):
        VGGTTeacher.from_pretrained(tmp_path, layers=[0])


def test_torch_file_is_read(folder: Path) -> None:
    expected = VGGTTeacher.from_pretrained(folder, layers=[1])(images()).layers[0]
    torch.save(load_file(folder / "model.safetensors"), folder / "model.pt")
    (folder / "model.safetensors").unlink()
    for path in (folder, folder / "model.pt"):
        assert torch.equal(VGGTTeacher.from_pretrained(path, layers=[1])(images()).layers[0], expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "missing aggregator.camera_token"),
        ("unexpected", "unexpected aggregator.other"),
        ("shape", "wrong shapes: aggregator.camera_token"),
        ("broken", "not readable"),
        ("config", "unknown fields width"),
        ("nothing", "no teacher weights"),
    ],
)
def test_wrong_files_are_refused_in_one_line(folder: Path, change: str, said: str) -> None:
    weights = load_file(folder / "model.safetensors")
    if change == "missing":
        del weights["aggregator.camera_token"]
    elif change == "unexpected":
        weights["aggregator.other"] = torch.zeros(1)
    elif change == "shape":
        weights["aggregator.camera_token"] = torch.zeros(1, 2, 1, 8)
    if change in ("missing", "unexpected", "shape"):
        rewrite(folder, weights)
    elif change == "broken":
        (folder / "model.safetensors").write_bytes(b"not a safetensors file")
    elif change == "config":
        (folder / "config.json").write_text('{"width": 3}')
    elif change == "nothing":
        (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=said) as refused:
        VGGTTeacher.from_pretrained(folder, layers=[0])
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


def test_missing_path() -> None:
    with pytest.raises(ValueError, match="/no/such"):
        VGGTTeacher.from_pretrained("/no/such", layers=[0])


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 30},
        {"num_heads": 3},
        {"patch_embed": "vit"},
        {"depth": 0},
        {"vit_num_heads": 3},
        {"dense_layers": (1, 2)},
    ],
)
def test_sizes_that_cannot_be_built(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="accepted"):
        replace(CONFIG, **change)  # type: ignore[arg-type]


def test_aggregator_trains() -> None:
    aggregator = VGGTAggregator(replace(CONFIG, patch_embed="conv"))
    aggregator(torch.rand(1, 2, 3, 28, 28))[-1].square().mean().backward()
    assert all(parameter.grad is not None for parameter in aggregator.parameters())


def test_dense_layers_beyond_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="dense_layers"):
        VGGTGeometry(CONFIG, heads=["depth"])


def test_a_teacher_trained_with_heads_loads_without_them(tmp_path: Path) -> None:
    config = replace(CONFIG, dense_layers=(0, 1, 1, 2), dense_channels=(8, 8, 8, 8), dense_features=8)
    model = VGGTGeometry(config, heads=["depth"])
    depth = model(torch.rand(1, 2, 3, 28, 42)).depth
    assert depth is not None
    assert depth.values.shape == (1, 2, 28, 42, 1)
    depth.values.log().square().mean().backward()
    assert model.aggregator.camera_token.grad is not None
    save_folder(tmp_path, config, model.state_dict())
    teacher = VGGTTeacher.from_pretrained(tmp_path, layers="-1")
    with torch.no_grad():
        expected = model.aggregator(torch.ones(1, 1, 3, 28, 28), layers=[2])[0]
    assert torch.equal(teacher(torch.ones(1, 1, 3, 28, 28)).layers[0], expected)


def test_image_sides_must_fit_the_patches() -> None:
    with pytest.raises(ValueError, match="30 x 28"):
        VGGTAggregator(CONFIG)(torch.rand(1, 1, 3, 30, 28))
