"""Action tokens against recorded reference outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.vla.action_tokenizer import ActionTokenizer


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, np.ndarray]:
    return load_file(golden_dir / "action_tokenizer.safetensors")


@pytest.fixture(scope="module")
def tokenizer(golden_dir: Path) -> ActionTokenizer:
    return ActionTokenizer(PrismaticProcessor.from_pretrained(golden_dir / "openvla_tiny").tokenizer)


def test_bins_and_ids(tokenizer: ActionTokenizer, golden: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(tokenizer.bins, golden["bins"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(tokenizer.bin_centers, golden["bin_centers"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(tokenizer.encode_actions_to_token_ids(golden["actions"]), golden["token_ids"])
    np.testing.assert_array_equal(
        tokenizer.encode_actions_to_token_ids(golden["actions_f32"]), golden["token_ids_from_f32"]
    )


def test_decoding(tokenizer: ActionTokenizer, golden: dict[str, np.ndarray]) -> None:
    for ids, actions in (("token_ids", "decoded"), ("all_ids", "all_decoded")):
        decoded = tokenizer.decode_token_ids_to_actions(golden[ids])
        np.testing.assert_allclose(decoded, golden[actions], rtol=0, atol=1e-12)


def test_text(tokenizer: ActionTokenizer, golden: dict[str, np.ndarray], golden_dir: Path) -> None:
    recorded = json.loads((golden_dir / "action_tokenizer.json").read_text())
    assert tokenizer(golden["actions"]) == recorded["strings"]
    assert tokenizer(golden["actions"][0]) == recorded["single_string"]
    assert tokenizer.action_token_begin_idx == recorded["action_token_begin_idx"]
    ids = [tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in recorded["strings"]]
    assert ids == recorded["reencoded_ids"]
