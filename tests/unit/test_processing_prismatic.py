"""Image processor and processor: mistakes, batches, single backbones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor


def test_single_backbone_and_different_sizes() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    single = PrismaticImageProcessor(False, "resize-naive", [(3, 28, 28)])
    assert single.apply_transform(pixels).shape == (3, 28, 28)
    ones = [(1.0, 1.0, 1.0)] * 2
    zeros = [(0.0, 0.0, 0.0)] * 2
    fused = PrismaticImageProcessor(True, "resize-naive", [(3, 50, 40)] * 2, ["bicubic", "bilinear"], zeros, ones)
    output = fused.apply_transform(pixels)
    assert output.shape == (6, 50, 40) and not torch.equal(output[:3], output[3:])


def test_an_image_of_the_right_size_is_only_normalized() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    processor = PrismaticImageProcessor(False, "resize-naive", [(3, 28, 28)], ["bicubic"], [(0.5,) * 3], [(0.25,) * 3])
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(processor.apply_transform(pixels), expected, rtol=0, atol=1e-6)
    grey = Image.fromarray(pixels[..., 0])
    assert torch.equal(processor.apply_transform(grey)[0], processor.apply_transform(grey.convert("RGB"))[2])


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("side", [28, 20])
def test_arrays_become_what_pillows_images_become(strategy: str, side: int) -> None:
    planes = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)
    pixels = planes.transpose(1, 2, 0)  # As augmented frames lie in memory.
    processor = PrismaticImageProcessor(False, strategy, [(3, 28, 28)])
    expected = processor.apply_transform(Image.fromarray(np.ascontiguousarray(pixels)))
    assert torch.equal(processor.apply_transform(pixels), expected)
    turned = np.broadcast_to(pixels[::-1, ::-1], pixels.shape)  # Neither in order nor to be written to.
    expected = processor.apply_transform(Image.fromarray(np.ascontiguousarray(turned)))
    assert torch.equal(processor.apply_transform(turned), expected)


def test_letterbox_pads_with_the_mean_color() -> None:
    white = np.full((10, 20, 3), 255, dtype=np.uint8)
    processor = PrismaticImageProcessor(False, "letterbox", [(3, 20, 20)], ["nearest"], [(0.5,) * 3], [(0.5,) * 3])
    output = processor.apply_transform(white)
    assert output.shape == (3, 20, 20)
    torch.testing.assert_close(output[:, 10], torch.ones(3, 20))
    assert output[:, 0].abs().max() < 0.01


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'letterbox'"):
        PrismaticImageProcessor(image_resize_strategy="leterbox")
    with pytest.raises(ValueError, match="did you mean 'bicubic'"):
        PrismaticImageProcessor(interpolations=["bicubik"])
    with pytest.raises(ValueError, match="input_sizes: found 1 entries; accepted: 2"):
        PrismaticImageProcessor(use_fused_vision_backbone=True)
    with pytest.raises(ValueError, match=r"image: found float32 of shape \(4, 4, 3\)"):
        PrismaticImageProcessor().apply_transform(np.zeros((4, 4, 3), dtype=np.float32))
