"""Two-layer MLPs that turn robot quantities into tokens of the language model."""

from __future__ import annotations

import torch
from torch import nn


class _TokenProjector(nn.Module):
    """Linear, GELU, linear: (..., in_dim) -> (..., llm_dim)."""

    def __init__(self, in_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.llm_dim = llm_dim
        self.fc1 = nn.Linear(in_dim, llm_dim)
        self.act_fn1 = nn.GELU()
        self.fc2 = nn.Linear(llm_dim, llm_dim)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act_fn1(self.fc1(values)))


class ProprioProjector(_TokenProjector):
    """Normalized proprioceptive state (B, proprio_dim) -> one token (B, llm_dim)."""

    def __init__(self, llm_dim: int, proprio_dim: int) -> None:
        super().__init__(proprio_dim, llm_dim)
        self.proprio_dim = proprio_dim


class NoisyActionProjector(_TokenProjector):
    """Each number of a noisy action chunk (B, T*A, 1) -> its token (B, T*A, llm_dim)."""

    def __init__(self, llm_dim: int) -> None:
        super().__init__(1, llm_dim)
        self.action_token_dim = 1
