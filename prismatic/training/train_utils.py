"""Masks over action tokens and the metrics of discrete action prediction, under upstream's names."""

from __future__ import annotations

import numpy as np
import torch

from prismatic.vla.action_tokenizer import (  # noqa: F401 - upstream's code has the masks from here
    ActionTokenizer,
    get_all_actions_mask,
    get_current_action_mask,
    get_next_actions_mask,
)


def compute_token_accuracy(
    predicted_token_ids: torch.Tensor, ground_truth_token_ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Share (scalar) of positions under `mask` whose predicted token is the true one."""
    correct = (predicted_token_ids == ground_truth_token_ids) & mask
    return correct.sum().float() / mask.sum().float()


def compute_actions_l1_loss(
    action_tokenizer: ActionTokenizer,
    predicted_token_ids: torch.Tensor,
    ground_truth_token_ids: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Mean absolute difference (scalar, float64) of the normalized actions that the tokens under `mask` stand for."""

    def actions(token_ids: torch.Tensor) -> np.ndarray:
        return action_tokenizer.decode_token_ids_to_actions(token_ids[mask].cpu().numpy())

    return torch.tensor(np.abs(actions(predicted_token_ids) - actions(ground_truth_token_ids)).mean())
