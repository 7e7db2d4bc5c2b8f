"""Which of the student's hidden states meet the teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def vision_tokens(
    hidden_states: Sequence[Tensor], layers: Sequence[int], start: int, count: int, *, shift: bool
) -> Tensor:
    """Hidden states of the vision tokens at some layers.

    With `shift` the slice moves one position to the right, as position i of a causal language model was trained to
    predict token i + 1; its last position is then the token after the images (proprio, or the first text token).

    Args:
        hidden_states: L + 1 tensors (B, S, D); 0 is the input embeddings.
        layers: indices into `hidden_states`.
        start: position of the first vision token in the sequence.
        count: number of vision tokens over all views.

    Returns:
        (K, B, N, D) for K layers.

    Raises:
        ValueError: a slice that leaves the sequence.
    """
    first = start + int(shift)
    length = hidden_states[0].shape[1]
    if first < 0 or first + count > length:
        raise ValueError(f"vision tokens: found positions {first} to {first + count - 1}; accepted: 0 to {length - 1}")
    return torch.stack([hidden_states[layer][:, first : first + count] for layer in layers])
