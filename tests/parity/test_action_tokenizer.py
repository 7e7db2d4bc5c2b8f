"""Action tokens, their masks and the metrics of discrete prediction against recorded reference outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.training import train_utils
from prismatic.training.train_utils import get_current_action_mask, get_next_actions_mask
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


def test_masks_of_hand_made_rows(golden_dir: Path) -> None:
    golden = load_tensors(golden_dir / "action_masks.safetensors")
    assert torch.equal(get_current_action_mask(golden["token_ids"]), golden["current"])
    assert torch.equal(get_next_actions_mask(golden["token_ids"]), golden["next"])


@pytest.mark.parametrize("prefix", ["discrete", "discrete2"])
def test_metrics(prefix: str, tokenizer: ActionTokenizer, golden_dir: Path) -> None:
    golden = load_tensors(golden_dir / "forward_l1_discrete.safetensors")
    truth, predicted = golden["labels"][:, 1:], golden[f"{prefix}.predicted_token_ids"]
    masks = {
        "curr_action": get_current_action_mask(truth),
        "next_actions": get_next_actions_mask(truth),
    }
    assert torch.equal(masks["curr_action"], golden["masks.current_on_labels_shift1"])
    assert torch.equal(masks["next_actions"], golden["masks.next_on_labels_shift1"])
    for name, mask in masks.items():
        accuracy = train_utils.compute_token_accuracy(predicted, truth, mask)
        torch.testing.assert_close(accuracy, golden[f"{prefix}.{name}_accuracy"])
        l1 = train_utils.compute_actions_l1_loss(tokenizer, predicted, truth, mask)
        torch.testing.assert_close(l1, golden[f"{prefix}.{name}_l1_loss"], rtol=0, atol=1e-9)
