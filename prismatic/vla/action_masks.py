"""Masks of the action tokens, read off a row of labels."""

from __future__ import annotations

import torch

from prismatic.vla.constants import ACTION_DIM, ACTION_TOKEN_BEGIN_IDX, IGNORE_INDEX


def _label_rank(token_ids: torch.Tensor) -> torch.Tensor:
    """Count the labels that stand at or before each position of its row (B, S); padding does not count."""
    return (token_ids != IGNORE_INDEX).cumsum(dim=1)


def get_current_action_mask(
    token_ids: torch.Tensor, action_dim: int = ACTION_DIM, action_token_begin_idx: int = ACTION_TOKEN_BEGIN_IDX
) -> torch.Tensor:
    """Positions (bool, B x S) of the tokens of the chunk's first action, in labels `token_ids` (B x S)."""
    rank = _label_rank(token_ids)
    return (rank >= 1) & (rank <= action_dim) & (token_ids > action_token_begin_idx)


def get_next_actions_mask(
    token_ids: torch.Tensor, action_dim: int = ACTION_DIM, action_token_begin_idx: int = ACTION_TOKEN_BEGIN_IDX
) -> torch.Tensor:
    """Positions (bool, B x S) of the tokens of the chunk's later actions, in labels `token_ids` (B x S)."""
    return (_label_rank(token_ids) > action_dim) & (token_ids > action_token_begin_idx)


def get_all_actions_mask(
    token_ids: torch.Tensor, action_dim: int = ACTION_DIM, action_token_begin_idx: int = ACTION_TOKEN_BEGIN_IDX
) -> torch.Tensor:
    """Positions (bool, B x S) of all action tokens: the union of the current and the next mask."""
    return get_current_action_mask(token_ids, action_dim, action_token_begin_idx) | get_next_actions_mask(
        token_ids, action_dim, action_token_begin_idx
    )
