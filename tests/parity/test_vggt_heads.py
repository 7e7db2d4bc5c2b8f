"""VGGT's camera, depth and point heads against recorded reference outputs, and their names against VGGT-1B's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rocket_align.teacher.vggt.config import VGGTConfig, save_folder
from rocket_align.teacher.vggt.geometry import Geometry, VGGTGeometry

HEADS = ("camera_head.", "depth_head.", "point_head.")


def tiny_config(golden: Path) -> VGGTConfig:
    description = json.loads((golden / "vggt_heads.json").read_text())
    sizes = description["config"]["heads_model"]
    return VGGTConfig(
        image_size=description["img_size"],
        embed_dim=sizes["embed_dim"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        vit_depth=sizes["vit"]["depth"],
        vit_num_heads=sizes["vit"]["num_heads"],
        # Named in the description's text only.
        camera_depth=2,
        camera_num_heads=4,
        dense_layers=(0, 1, 2, 3),
        dense_channels=(16, 24, 32, 40),
        dense_features=32,
    )


@pytest.fixture(scope="module")
def recorded(golden_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(golden_dir / "vggt_heads.safetensors")


@pytest.fixture(scope="module")
def folder(golden_dir: Path, recorded: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = "weights."
    weights = {key[len(prefix) :]: value for key, value in recorded.items() if key.startswith(prefix)}
    target = tmp_path_factory.mktemp("vggt")
    save_folder(target, tiny_config(golden_dir), weights)
    return target


@pytest.fixture(scope="module")
def geometry(folder: Path, recorded: dict[str, torch.Tensor]) -> Geometry:
    with torch.no_grad():
        return VGGTGeometry.from_pretrained(folder)(recorded["in.images"])


def test_cameras(geometry: Geometry, recorded: dict[str, torch.Tensor]) -> None:
    assert geometry.poses is not None
    for index, pose in enumerate(geometry.poses):
        torch.testing.assert_close(pose, recorded[f"pose_enc_list.{index}"], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(geometry.poses[-1], recorded["pose_enc"], atol=1e-5, rtol=1e-3)


def test_depth(geometry: Geometry, recorded: dict[str, torch.Tensor]) -> None:
    assert geometry.depth is not None
    torch.testing.assert_close(geometry.depth.values, recorded["depth"], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(geometry.depth.confidence, recorded["depth_conf"], atol=1e-5, rtol=1e-3)


def test_points(geometry: Geometry, recorded: dict[str, torch.Tensor]) -> None:
    assert geometry.points is not None
    torch.testing.assert_close(geometry.points.values, recorded["world_points"], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(geometry.points.confidence, recorded["world_points_conf"], atol=1e-5, rtol=1e-3)


def test_only_the_heads_asked_for_are_built(folder: Path, recorded: dict[str, torch.Tensor]) -> None:
    model = VGGTGeometry.from_pretrained(folder, heads=["camera"])
    assert not any(name.startswith(("depth_head", "point_head")) for name in model.state_dict())
    with torch.no_grad():
        geometry = model(recorded["in.images"])
    assert geometry.depth is None and geometry.points is None and geometry.poses is not None
    torch.testing.assert_close(geometry.poses[-1], recorded["pose_enc"], atol=1e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="track"):
        VGGTGeometry.from_pretrained(folder, heads=["track"])  # type: ignore[list-item]


def test_default_sizes_are_those_of_vggt_1b(golden_dir: Path) -> None:
    real = json.loads((golden_dir / "vggt1b_real_keys.json").read_text())["keys"]
    expected = {key: tuple(shape) for key, (shape, _) in real.items() if key.startswith(HEADS)}
    with torch.device("meta"):
        built = VGGTGeometry(VGGTConfig()).state_dict()
    assert {key: tuple(value.shape) for key, value in built.items() if key.startswith(HEADS)} == expected
