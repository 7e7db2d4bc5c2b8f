"""Loading and cutting the VGGT teacher, from folders, released configurations and hub ids."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rocket_align.teacher.vggt.aggregator import VGGTAggregator
from rocket_align.teacher.vggt.config import VGGTConfig, find_weights, save_folder
from rocket_align.teacher.vggt.geometry import VGGTGeometry
from rocket_align.teacher.vggt.teacher import VGGTTeacher
from tests.helpers.teacher_models import VGGT, save_teacher


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_teacher("vggt", tmp_path / "teacher")


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of the aggregator; None takes one out."""
    named = {f"aggregator.{name}": value for name, value in changes.items()}
    weights = {**load_file(folder / "model.safetensors"), **named}
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors")


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
    kept = {key: value for key, value in weights.items() if "_blocks.2." not in key}
    save_file(kept, folder / "model.safetensors")
    VGGTTeacher.from_pretrained(folder, layers=[1])
    with pytest.raises(ValueError, match="missing"):
        VGGTTeacher.from_pretrained(folder, layers=[-1])


def test_images_are_resized(folder: Path) -> None:
    teacher = VGGTTeacher.from_pretrained(folder, layers=[0])
    assert teacher(images()).image_hw == (28, 28)
    assert teacher(torch.rand(1, 1, 3, 20, 40)).image_hw == (14, 28)


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
    ("spoil", "said"),
    [
        (lambda at: rewrite(at, camera_token=None), "missing aggregator.camera_token"),
        (lambda at: rewrite(at, other=torch.zeros(1)), "unexpected aggregator.other"),
        (lambda at: rewrite(at, camera_token=torch.zeros(1, 2, 1, 8)), "wrong shapes: aggregator.camera_token"),
        (lambda at: (at / "model.safetensors").write_bytes(b"not a safetensors file"), "not readable"),
        (lambda at: (at / "config.json").write_text('{"width": 3}'), "unknown fields width"),
        (lambda at: (at / "model.safetensors").unlink(), "no teacher weights"),
    ],
)
def test_wrong_files_are_refused_in_one_line(folder: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=said) as refused:
        VGGTTeacher.from_pretrained(folder, layers=[0])
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


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
        replace(VGGT, **change)  # type: ignore[arg-type]


def test_aggregator_trains() -> None:
    aggregator = VGGTAggregator(replace(VGGT, patch_embed="conv"))
    aggregator(torch.rand(1, 2, 3, 28, 28))[-1].square().mean().backward()
    assert all(parameter.grad is not None for parameter in aggregator.parameters())


def test_dense_layers_beyond_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="dense_layers"):
        VGGTGeometry(VGGT, heads=["depth"])


def test_a_teacher_trained_with_heads_loads_without_them(tmp_path: Path) -> None:
    config = replace(VGGT, dense_layers=(0, 1, 1, 2), dense_channels=(8, 8, 8, 8), dense_features=8)
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
        VGGTAggregator(VGGT)(torch.rand(1, 1, 3, 30, 28))


def test_a_released_configuration_is_understood(tmp_path: Path) -> None:
    released = {"img_size": 518, "patch_size": 14, "embed_dim": 1024, "enable_track": True}
    (tmp_path / "config.json").write_text(json.dumps(released))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_weights(tmp_path) == (tmp_path / "model.safetensors", VGGTConfig())


def test_a_hub_id_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^nobody/no-such-vggt: no such file or folder here, and not .*hub") as caught:
        find_weights("nobody/no-such-vggt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["missing", "/no/such/folder", "./no/such", "a/b/c"])
def test_what_is_no_hub_id_is_never_asked_of_the_hub(path: str) -> None:
    with pytest.raises(ValueError, match="no such file or folder; accepted"):
        find_weights(path)
