"""Properties of the image path that no reference image shows."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image

from prismatic.vla.datasets import image_transforms as images
from prismatic.vla.datasets.image_transforms import AugmentRanges, PolicyImageTransform, decode_image
from prismatic.vla.datasets.resampling import crop_filters, lanczos_crop_axis
from prismatic.vla.datasets.rlds_writer import encode_jpeg as jpeg


def _image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(256, 256), (128, 96), (50, 70)])
def test_lanczos_agrees_with_pillow(shape: tuple[int, int]) -> None:
    # Away from black and white, since Pillow also clips between its two passes.
    soft = _image(16, 16) // 2 + 64
    smooth = np.array(Image.fromarray(soft).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
    expected = np.array(Image.fromarray(smooth).resize((84, 72), Image.Resampling.LANCZOS))
    assert np.abs(images.resize_lanczos(smooth, (72, 84)).astype(int) - expected).max() <= 1


def test_resize_to_the_same_size_changes_nothing() -> None:
    image = _image(64, 48)
    np.testing.assert_array_equal(images.resize_lanczos(image, (64, 48)), image)


def test_saturation_and_hue_agree_with_hsv() -> None:
    rng = np.random.default_rng(1)
    rgb = rng.random((3, 8, 8)).astype(np.float32)
    rgb[:, 0, 0] = 0.5  # gray has no hue
    rgb[:, 0, 1] = 0.0
    for saturation, hue in ((1.2, 0.05), (0.8, -0.05), (3.0, 0.4), (0.0, 0.0)):
        found = images.adjust_saturation_hue(rgb.copy(), saturation, hue)
        for row in range(8):
            for column in range(8):
                h, s, v = colorsys.rgb_to_hsv(*rgb[:, row, column].tolist())
                expected = colorsys.hsv_to_rgb((h + hue) % 1.0, min(s * saturation, 1.0), v)
                np.testing.assert_allclose(found[:, row, column], expected, atol=2e-6)


def test_draws_fill_their_ranges() -> None:
    ranges, rng = AugmentRanges(), np.random.default_rng(0)
    draws = [ranges.draw(rng) for _ in range(500)]
    for draw in draws:
        assert draw.crop.height == draw.crop.width == pytest.approx(0.9**0.5)
        assert 0 <= draw.crop.top <= 1 - draw.crop.height and 0 <= draw.crop.left <= 1 - draw.crop.width
    ends = {"brightness": (-0.2, 0.2), "contrast": (0.8, 1.2), "saturation": (0.8, 1.2), "hue": (-0.05, 0.05)}
    for name, (low, high) in ends.items():
        values = np.array([getattr(draw, name) for draw in draws])
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


def test_crop_geometry_is_the_part_of_the_image_that_is_seen() -> None:
    # A horizontal ramp from 0 to 255: after a crop, the first and last column show the box's edges.
    ramp = np.repeat(np.linspace(0, 255, 224)[None, :, None], 224, axis=0).repeat(3, axis=2).astype(np.uint8)
    box = AugmentRanges().draw(np.random.default_rng(3)).crop
    planar = images.resize_and_crop(ramp, (224, 224), box)
    assert planar[0, 100, 0] == pytest.approx(255 * box.left, abs=1.5)
    assert planar[0, 100, -1] == pytest.approx(255 * (box.left + box.width), abs=1.5)


def test_train_and_rollout_agree_at_the_center() -> None:
    # Without color changes and with the center crop, a training frame is what a rollout shows of the same scene.
    scene = np.array(Image.fromarray(_image(12, 12)).resize((128, 128), Image.Resampling.BICUBIC))
    transform = PolicyImageTransform((84, 84), AugmentRanges())
    neutral = AugmentRanges(brightness=0.0, contrast=(1.0, 1.0), saturation=(1.0, 1.0), hue=0.0)
    draw = neutral.draw(np.random.default_rng(0))._replace(crop=images.center_crop_box())
    trained = transform.train(decode_image(jpeg(scene)), draw)
    difference = np.abs(trained.astype(int) - transform.rollout(scene).astype(int))
    assert difference.mean() < 0.5 and difference.max() <= 4


def test_rollout_without_augmentation_does_not_crop() -> None:
    scene = np.array(Image.fromarray(_image(12, 12) // 2 + 64).resize((84, 84), Image.Resampling.BICUBIC))
    whole, cropped = (images.prepare_policy_image(scene, 84, False), images.prepare_policy_image(scene, 84, True))
    assert np.abs(whole.astype(int) - scene).mean() < 2.5
    assert np.abs(cropped.astype(int) - scene).mean() > 5
    assert PolicyImageTransform((84, 84)).draw(np.random.default_rng(0)) is None
    np.testing.assert_array_equal(PolicyImageTransform((84, 84)).rollout(scene), whole)


@pytest.mark.parametrize("side", [32, 84, 96, 160, 256, 480])
def test_a_crop_has_the_weights_of_its_whole_filters(side: int) -> None:
    for start in np.linspace(0.0, 0.05, 7):
        weights, _ = crop_filters(side, 224, start, 0.95)
        for outputs, inputs, kept in lanczos_crop_axis(side, 224, start, 0.95):
            assert torch.equal(kept, weights[outputs, inputs])
            assert weights[outputs].count_nonzero() == kept.count_nonzero()


def test_threads_do_not_change_a_pixel() -> None:
    image, threads = _image(256, 256), torch.get_num_threads()
    box = images.center_crop_box()
    try:
        torch.set_num_threads(1)
        one = images.resize_and_crop(image, (224, 224), box)
        torch.set_num_threads(2)
        two = images.resize_and_crop(image, (224, 224), box)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(one, two)
    assert box != images.FULL_IMAGE


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)]
)
def test_wrong_images_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(H, W, 3\)"):
        images.prepare_policy_image(image, 8, True)


def test_damaged_images_are_refused() -> None:
    whole = jpeg(_image(32, 32))
    assert decode_image(whole).shape == (32, 32, 3)
    for damaged in (b"", whole[: len(whole) // 2], whole[:-2], b"\xff\xd8" + b"\x00" * 98, b"\x00" * 100):
        with pytest.raises(ValueError, match="no complete JPEG"):
            decode_image(damaged)


def test_stray_bytes_in_a_jpeg_are_skipped_as_tensorflow_does() -> None:
    whole = jpeg(_image(32, 32))
    for stray in (whole + b"\x00" * 9, whole[:-2] + b"\x00\x01" + whole[-2:]):
        np.testing.assert_array_equal(decode_image(stray), decode_image(whole))


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 100} if kind == "JPEG" else {}))
    return buffer.getvalue()


def test_colors_that_are_not_rgb() -> None:
    """Inks multiply with black, as TensorFlow has it; gray is repeated; 16 bits lose their lower eight."""
    inks = Image.new("CMYK", (16, 16), (255, 155, 55, 55))
    np.testing.assert_array_equal(decode_image(_encoded(inks, "JPEG"))[3, 3], [0, 100 * 200 // 255, 200 * 200 // 255])
    gray = Image.new("L", (9, 9), 77)
    deep = Image.fromarray(np.full((9, 9), 77 * 256 + 200, np.uint16))
    clear = Image.new("RGBA", (9, 9), (77, 77, 77, 10))
    for encoded in (_encoded(gray, "JPEG"), _encoded(gray, "PNG"), _encoded(deep, "PNG"), _encoded(clear, "PNG")):
        np.testing.assert_array_equal(decode_image(encoded), np.full((9, 9, 3), 77))
