"""Action masks and the metrics of discrete prediction against recorded reference outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.training.train_utils import (
    compute_actions_l1_loss,
    compute_token_accuracy,
    get_current_action_mask,
    get_next_actions_mask,
)
from prismatic.vla.action_tokenizer import ActionTokenizer


def test_masks_of_hand_made_rows(golden_dir: Path) -> None:
    golden = load_file(golden_dir / "action_masks.safetensors")
    assert torch.equal(get_current_action_mask(golden["token_ids"]), golden["current"])
    assert torch.equal(get_next_actions_mask(golden["token_ids"]), golden["next"])


@pytest.mark.parametrize("prefix", ["discrete", "discrete2"])
def test_metrics(prefix: str, golden_dir: Path) -> None:
    golden = load_file(golden_dir / "forward_l1_discrete.safetensors")
    tokenizer = ActionTokenizer(PrismaticProcessor.from_pretrained(golden_dir / "openvla_tiny").tokenizer)
    truth, predicted = golden["labels"][:, 1:], golden[f"{prefix}.predicted_token_ids"]
    masks = {"curr_action": get_current_action_mask(truth), "next_actions": get_next_actions_mask(truth)}
    assert torch.equal(masks["curr_action"], golden["masks.current_on_labels_shift1"])
    assert torch.equal(masks["next_actions"], golden["masks.next_on_labels_shift1"])
    for name, mask in masks.items():
        accuracy = compute_token_accuracy(predicted, truth, mask)
        torch.testing.assert_close(accuracy, golden[f"{prefix}.{name}_accuracy"])
        l1 = compute_actions_l1_loss(tokenizer, predicted, truth, mask)
        torch.testing.assert_close(l1, golden[f"{prefix}.{name}_l1_loss"], rtol=0, atol=1e-9)
