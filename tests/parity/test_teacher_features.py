"""Teacher features and image preparation against the recorded reference of the released training step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rocket_align.pooling import pool_teacher
from rocket_align.teacher.base import TeacherFeatures
from rocket_align.teacher.preprocess import preprocess_normed_images, unnormalize_views
from rocket_align.teacher.vggt.config import save_folder
from rocket_align.teacher.vggt.teacher import VGGTTeacher
from tests.helpers.teacher_models import recorded_vggt


@pytest.fixture(scope="module")
def features(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TeacherFeatures:
    save_folder(folder := tmp_path_factory.mktemp("teacher"), *recorded_vggt(golden_dir))
    pixels = load_file(golden_dir / "forward_l1_discrete.safetensors")["pixel_values"]
    return VGGTTeacher.from_pretrained(folder, layers=[1, 2, 3])(unnormalize_views(pixels))


def test_images_of_the_training_step(golden_dir: Path) -> None:
    pixels = load_file(golden_dir / "forward_l1_discrete.safetensors")["pixel_values"]
    expected = load_file(golden_dir / "align_inputs_features.safetensors")["teacher_images_strided7"]
    torch.testing.assert_close(preprocess_normed_images(pixels)[..., ::7, ::7], expected, atol=1e-5, rtol=1e-4)


def test_features(golden_dir: Path, features: TeacherFeatures) -> None:
    recorded = load_file(golden_dir / "align_inputs_features.safetensors")
    assert features.grid_hw == (37, 37)
    assert features.image_hw == (518, 518)
    for layer, feature in zip((1, 2, 3), features.layers):
        # The record holds the first three tokens and every 97th, of which the first is special too; patches start at 5.
        expected = recorded[f"teacher_features.{layer}.first3_and_every97th_token"][:, :, 4:]
        torch.testing.assert_close(feature[:, :, 97 - 5 :: 97], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("position", [0, 1])
def test_pooled_features(golden_dir: Path, features: TeacherFeatures, position: int) -> None:
    recorded = load_file(golden_dir / "align_inputs_features.safetensors")
    for pair, feature in enumerate(features.layers):
        expected = recorded[f"pair{pair}.pooled_pe{position}"]
        grid, image, tokens = features.grid_hw, features.image_hw, expected.shape[1]
        pooled = pool_teacher(feature, grid, image, tokens, mode="bilinear", position_embedding=bool(position))
        torch.testing.assert_close(pooled, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["sq56_crop", "sq28_pad", "tall32x24_crop", "wide24x32_pad", "tall32x24_pad"])
def test_preprocess_normed_images(golden_dir: Path, case: str) -> None:
    description = json.loads((golden_dir / "preprocess_normed_images.json").read_text())
    recorded = load_file(golden_dir / "preprocess_normed_images.safetensors")
    statistics = description["dino_mean_std"]
    images = preprocess_normed_images(
        recorded[f"{case}.in"], statistics["mean"], statistics["std"], mode=description["cases"][case]["mode"]
    )
    assert list(images.shape) == description["cases"][case]["out_shape"]
    torch.testing.assert_close(images[..., ::7, ::7], recorded[f"{case}.out_strided7"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(images.mean(), recorded[f"{case}.out_mean"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(images[0, 0, :, 0], recorded[f"{case}.out_row0"], atol=1e-5, rtol=1e-4)


def test_wide_image_is_not_cut_to_a_strip(golden_dir: Path) -> None:
    """The reference cut with a negative start and kept 63 rows; the rows it kept are the last of the whole image."""
    recorded = load_file(golden_dir / "preprocess_normed_images.safetensors")
    images = preprocess_normed_images(recorded["wide24x32_crop_BUG.in"], mode="crop")
    assert tuple(images.shape) == (1, 1, 3, 392, 518)
    strip = images[:, :, :, -63:]
    torch.testing.assert_close(strip[..., ::7, ::7], recorded["wide24x32_crop_BUG.out_strided7"], atol=1e-5, rtol=1e-4)
