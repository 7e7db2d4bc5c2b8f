"""Continuous actions as the last tokens of the language model's vocabulary (RT-2 / OpenVLA style), after a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from prismatic.vla.constants import ACTION_DIM, ACTION_TOKEN_BEGIN_IDX, IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ActionBins:
    """Uniform bins on [min_action, max_action] and the token ids that stand for them.

    `bins` holds `num_bins` edges, so there are `num_bins - 1` centers; an action at or above the last edge gets the
    last center. The token id of bin k (counted from 1) is `vocab_size - k`.
    """

    def __init__(self, vocab_size: int, num_bins: int = 256, min_action: float = -1.0, max_action: float = 1.0) -> None:
        if num_bins < 2 or num_bins >= vocab_size:
            raise ValueError(f"num_bins is {num_bins}; accepted: 2 to {vocab_size - 1} (the vocabulary size less one)")
        self._vocabulary, self.num_bins = vocab_size, num_bins
        self.min_action, self.max_action = float(min_action), float(max_action)
        self.bins = np.linspace(min_action, max_action, num_bins)
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2.0

    @property
    def token_begin_idx(self) -> int:
        """Ids above this one are action tokens: 31743 for 32000 tokens and 256 bins, as upstream."""
        return self._vocabulary - (self.num_bins + 1)

    def encode(self, action: np.ndarray) -> np.ndarray:
        """Token ids (int64, same shape) of normalized actions; values outside the range are clipped."""
        clipped = np.clip(action, self.min_action, self.max_action)
        return self._vocabulary - np.digitize(clipped, self.bins)

    def decode(self, token_ids: np.ndarray) -> np.ndarray:
        """Bin centers (float64, same shape) of token ids; ids that are no action tokens give the nearest end."""
        index = np.clip(self._vocabulary - np.asarray(token_ids) - 1, 0, len(self.bin_centers) - 1)
        return self.bin_centers[index]


class ActionTokenizer(ActionBins):
    """Turns normalized actions into text made of the tokenizer's last tokens, and token ids back into actions.

    Source: upstream behavior; the released checkpoints use 256 bins on [-1, 1] at the end of 32000 tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, bins: int = 256, min_action: float = -1.0, max_action: float = 1.0
    ) -> None:
        super().__init__(tokenizer.vocab_size, bins, min_action, max_action)
        self.tokenizer = tokenizer

    def __call__(self, action: np.ndarray) -> str | list[str]:
        """One action (A,) -> its text; a batch or chunk of actions (T, A) -> a list of T texts."""
        token_ids = self.encode(action)
        if token_ids.ndim == 1:
            return str(self.tokenizer.decode(token_ids.tolist()))
        return [str(self.tokenizer.decode(row)) for row in token_ids.tolist()]

    # Upstream's names.
    encode_actions_to_token_ids = ActionBins.encode
    decode_token_ids_to_actions = ActionBins.decode
    action_token_begin_idx = ActionBins.token_begin_idx

    @property
    def vocab_size(self) -> int:
        """Number of bins, under upstream's name."""
        return self.num_bins


def action_prompt(instruction: str) -> str:
    """OpenVLA's question for an instruction (lower-cased); the action tokens follow after it.

    The tokenized prompt must be followed by the lone word-boundary token (id 29871) before the first action token.
    """
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


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
