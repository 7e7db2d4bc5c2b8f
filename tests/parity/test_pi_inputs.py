"""Images, prompts and normalization of pi0 and pi0.5 against what openpi's and LeRobot's code gave.

`openpi_images.safetensors`: noise of several sizes, letterboxed to 28 pixels by `resize_with_pad_torch` of rlinf-openpi
0.1.1 (`float` on [-1, 1], `uint8`) and by `image_tools.resize_with_pad` of openpi-client 0.1.2 (`pil`).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, trainers

from prismatic.models.pi.images import letterbox, pil_letterbox, to_pixel_values
from prismatic.models.pi.normalization import Normalizer
from prismatic.models.pi.prompts import load_tokenizer, prompt_text, tokenize
from prismatic.util.errors import UsageError

IMAGES = load_file(Path(__file__).with_name("openpi_images.safetensors"))
NUMBERS = sorted({name.partition(".")[0] for name in IMAGES})
STATISTICS = {
    "mean": np.array([0.5, -2.0, 0.0]),
    "std": np.array([0.25, 3.0, 0.0]),
    "q01": np.array([-1.0, 0.0, 2.0]),
    "q99": np.array([1.0, 0.5, 2.0]),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_letterbox(number: str) -> None:
    image = IMAGES[f"{number}.image"]
    channels_first = image.permute(2, 0, 1)
    expected = IMAGES[f"{number}.float"].reshape(28, 28, 3)
    torch.testing.assert_close(letterbox(to_pixel_values(channels_first), 28).permute(1, 2, 0), expected)
    pairs = letterbox(channels_first.expand(2, 1, 3, *image.shape[:2]), 28)
    assert pairs.shape == (2, 1, 3, 28, 28)
    levels = pairs[1, 0].permute(1, 2, 0).int() - IMAGES[f"{number}.uint8"].reshape(28, 28, 3).int()
    assert levels.abs().max() <= 1  # theirs interpolates bytes, which torch rounds another way at halves
    assert np.array_equal(pil_letterbox(image.numpy(), 28), IMAGES[f"{number}.pil"].numpy())


def test_an_image_of_the_right_size_stays() -> None:
    image = IMAGES["0.image"][:28, :28]
    assert torch.equal(letterbox(image.permute(2, 0, 1), 28), image.permute(2, 0, 1))
    assert np.array_equal(pil_letterbox(image.numpy(), 28), image.numpy())


def test_prompts_with_a_state(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "pi0" / "pi05_prompts.json").read_text())
    texts = [prompt_text(task, np.float32(state)) for task, state in zip(cases["tasks"], cases["state"])]
    assert texts == cases["prompts"]


def test_a_prompt_without_a_state_ends_in_a_line_break() -> None:
    assert prompt_text("  pick_up the\nbowl \n") == "pick up the bowl\n"


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A tokenizer of PaliGemma's kind, with few words."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["pick up the black bowl"] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tokens_begin_once_and_are_padded_or_cut(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids, mask = tokenize(tokenizer, ["pick up the black bowl\n", "\n"], 12)
    assert ids.shape == mask.shape == (2, 12)
    assert ids[:, 0].tolist() == [2, 2]
    assert tokenizer.decode(ids[0][mask[0]][1:]) == "pick up the black bowl\n"
    assert mask[1].tolist() == [True, True] + [False] * 10
    assert ids[1, 1] == tokenizer.convert_tokens_to_ids("<0x0A>")
    assert ids[1, 2:].eq(0).all()
    cut, full = tokenize(tokenizer, ["pick up the black bowl\n"], 3)
    assert torch.equal(cut, ids[:1, :3]) and full.all()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer found; accepted: .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UsageError, match=r"cannot be read .*; accepted: tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_normalization_by_mean_and_deviation() -> None:
    """Numbers are openpi's `Normalize` and `Unnormalize`; the last is padding, which stays."""
    normalizer = Normalizer(**STATISTICS)
    expected = [[-0.999996000016, 0.9999996666667778, 2e6], [9.99996000016, -0.6666664444445185, 5e5]]
    values = np.array([[0.25, 1.0, 2.0], [3.0, -4.0, 0.5]])
    np.testing.assert_allclose(normalizer.normalize(values), expected, rtol=1e-12)
    np.testing.assert_allclose(normalizer.normalize(values[:, :2]), np.array(expected)[:, :2], rtol=1e-12)
    unnormalized = normalizer.unnormalize(np.array([0.5, -1.0, 0.25, 0.75, 0.0]))
    np.testing.assert_allclose(unnormalized, [0.6250005, -5.000001, 2.5e-07, 0.75, 0.0], rtol=2e-6)


def test_normalization_by_quantiles() -> None:
    normalizer = Normalizer(**STATISTICS, quantiles=True)
    expected = [[0.24999937500031244, 2.999992000016, -1.0], [2.999998000001, -16.999968000064, -3000001.0]]
    values = np.array([[0.25, 1.0, 2.0], [3.0, -4.0, 0.5]])
    np.testing.assert_allclose(normalizer.normalize(values), expected, rtol=1e-12)
    unnormalized = normalizer.unnormalize(np.array([0.5, -1.0, 0.25, 0.75, 0.0]))
    np.testing.assert_allclose(unnormalized, [0.50000075, 0.0, 2.000000625, 0.75, 0.0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(normalizer.unnormalize(normalizer.normalize(values)), values, rtol=1e-9)
