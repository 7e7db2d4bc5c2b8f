"""VGGT's camera, depth and point heads against recorded reference outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rocket_align.teacher.vggt.config import VGGTConfig, save_folder
from rocket_align.teacher.vggt.geometry import Geometry, VGGTGeometry
from tests.helpers.student_helpers import beneath


def tiny_config(golden: Path) -> VGGTConfig:
    description = json.loads((golden / "vggt_heads.json").read_text())
    sizes = description["config"]["heads_model"]
    given = {name: sizes[name] for name in ("embed_dim", "depth", "num_heads")}
    given |= {f"vit_{name}": sizes["vit"][name] for name in ("depth", "num_heads")}
    # Named in the description's text only.
    given |= {"camera_depth": 2, "camera_num_heads": 4, "dense_layers": (0, 1, 2, 3), "dense_features": 32}
    return VGGTConfig(image_size=description["img_size"], dense_channels=(16, 24, 32, 40), **given)


@pytest.fixture(scope="module")
def recorded(golden_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(golden_dir / "vggt_heads.safetensors")


@pytest.fixture(scope="module")
def folder(golden_dir: Path, recorded: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("vggt")
    save_folder(target, tiny_config(golden_dir), beneath(recorded, "weights."))
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
