"""Image and text processing against recorded reference outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor

MEANS, STDS = [(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)], [(0.229, 0.224, 0.225), (0.5, 0.5, 0.5)]


def image_processor(strategy: str, size: int) -> PrismaticImageProcessor:
    return PrismaticImageProcessor(True, strategy, [(3, size, size)] * 2, ["bicubic"] * 2, MEANS, STDS)


@pytest.mark.parametrize("image", ["sq256", "wide", "tall", "same224"])
@pytest.mark.parametrize("strategy", ["resize-naive", "letterbox", "resize-crop"])
def test_apply_transform(strategy: str, image: str, golden_dir: Path) -> None:
    golden = load_file(golden_dir / "image_processor.safetensors")
    pixels, processor = golden[f"{image}.in"].numpy(), image_processor(strategy, 32)
    expected = golden[f"{image}.{strategy}.out32"]
    torch.testing.assert_close(processor.apply_transform(Image.fromarray(pixels)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(processor.apply_transform(pixels), expected, rtol=0, atol=1e-5)
    batch = processor(np.stack([pixels, pixels[::-1]]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch[0], expected, rtol=0, atol=1e-5)
    assert batch.shape == (2, *expected.shape) and not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("image", ["sq256", "wide", "tall", "same224"])
def test_apply_transform_at_full_size(image: str, golden_dir: Path) -> None:
    golden = load_file(golden_dir / "image_processor.safetensors")
    output = image_processor("resize-naive", 224).apply_transform(golden[f"{image}.in"])
    torch.testing.assert_close(output[:, ::5, ::5], golden[f"{image}.resize-naive.out224_strided5"], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.mean((1, 2)), golden[f"{image}.resize-naive.out224_mean"], rtol=0, atol=1e-5)


def test_prompt_tokens_and_images(golden_dir: Path) -> None:
    processor = PrismaticProcessor.from_pretrained(golden_dir / "openvla_tiny")
    prompt = json.loads((golden_dir / "predict_action.json").read_text())["prompt"]
    expected = load_file(golden_dir / "predict_action.safetensors")["input_ids"]
    inputs = processor(prompt, Image.new("RGB", (70, 60)))
    assert inputs["input_ids"].tolist() == expected.tolist()
    assert inputs["attention_mask"].tolist() == [[1] * expected.shape[1]]
    assert inputs["pixel_values"].shape == (1, 6, 56, 56)


def test_saved_files_are_upstreams(golden_dir: Path, tmp_path: Path) -> None:
    source = golden_dir / "openvla_tiny"
    processor = PrismaticProcessor.from_pretrained(source)
    processor.save_pretrained(tmp_path)
    saved, original = (json.loads((f / "preprocessor_config.json").read_text()) for f in (tmp_path, source))
    assert saved == original
    again = PrismaticProcessor.from_pretrained(tmp_path)
    text = "In: What action should the robot take to open the drawer?\nOut:"
    assert again.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    # A class that transformers 4 knows, too.
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
