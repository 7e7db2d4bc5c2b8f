"""The projector from the student's hidden states to the teacher's stream, one for all pairs, with nested widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rocket_align.matmul import autocasts, linear


def matryoshka_widths(hidden_dim: int, num_layers: int, ratios: Sequence[float] | None = None) -> tuple[int, ...]:
    """Hidden units per pair, shallow to deep: rho_i = 0.2 + 0.8 i / (N - 1), i from 0, rounded down, at least 1.

    The paper rounds up; the released code, followed here, rounds down. A single pair gets 20%. Raises ValueError: as
    many ratios as layers are needed, each above 0 and up to 1.
    """
    if num_layers < 1 or hidden_dim < 1:
        raise ValueError(f"matryoshka_widths: found {num_layers} layers of {hidden_dim} units; accepted: 1 or more")
    if ratios is None:
        # Multiplied before divided: the order decides which way products that should be whole numbers are rounded.
        ratios = [min(1.0, 0.2 + 0.8 * index / max(num_layers - 1, 1)) for index in range(num_layers)]
    if len(ratios) != num_layers or not all(0 < ratio <= 1 for ratio in ratios):
        raise ValueError(f"width_ratios: found {tuple(ratios)}; accepted: {num_layers} numbers above 0 and up to 1")
    return tuple(max(1, int(hidden_dim * ratio)) for ratio in ratios)


class AlignmentProjector(nn.Module):
    """p(x) = W2 GELU(W1 norm(x)), where a pair uses the first hidden units of W1 and W2 only (nested prefixes).

    Args:
        student_dim: width D of the student's hidden states.
        teacher_dim: width of one teacher stream; the output has twice as many channels.
        hidden_dim: hidden units (default 2 * teacher_dim).
        widths: hidden units used by each pair.
        student_norm: LayerNorm on the input.

    Raises:
        ValueError: no width, or one that is not between 1 and `hidden_dim`.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        hidden_dim: int | None = None,
        *,
        widths: Sequence[int],
        student_norm: bool,
    ) -> None:
        super().__init__()
        hidden = 2 * teacher_dim if hidden_dim is None else hidden_dim
        self.widths = tuple(widths)
        if not self.widths or not all(1 <= width <= hidden for width in self.widths):
            raise ValueError(f"widths: found {self.widths}; accepted: at least one, each from 1 to {hidden}")
        self.fc1 = nn.Linear(student_dim, hidden)
        self.fc2 = nn.Linear(hidden, 2 * teacher_dim)
        self.vlm_norm: nn.Module = nn.LayerNorm(student_dim) if student_norm else nn.Identity()
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def weights(self, width: int) -> list[Tensor]:
        """Weight and bias of fc1 and fc2 for the first `width` hidden units, and of the norm where there is one."""
        fc1, fc2 = self.fc1, self.fc2
        return [fc1.weight[:width], fc1.bias[:width], fc2.weight[:, :width], fc2.bias, *self.vlm_norm.parameters()]

    def project(self, tokens: Tensor, width: int) -> Tensor:
        """Project tokens (..., D) by the first `width` hidden units: (..., 2 * teacher_dim)."""
        if not autocasts(tokens.device.type):
            tokens = tokens.to(self.fc1.weight.dtype)
        fc1, bias1, fc2, bias2, *_ = self.weights(width)
        return linear(F.gelu(linear(self.vlm_norm(tokens), fc1, bias1)), fc2, bias2)

    def forward(self, tokens_BND: Tensor, pair: int) -> Tensor:
        """Project the tokens of one pair.

        Args:
            pair: index into `widths`; a negative or too large one means the last, as in the released code.

        Returns:
            (B, N, 2 * teacher_dim).
        """
        width = self.widths[pair] if 0 <= pair < len(self.widths) else self.widths[-1]
        return self.project(tokens_BND, width)

    def project_pairs(self, tokens_KBND: Tensor | Sequence[Tensor]) -> Tensor:
        """Project all pairs together: (K, B, N, D) -> (K, B, N, 2 * teacher_dim), K = len(widths).

        Equal widths are one matrix product, others one of a prefix each.
        """
        if len(set(self.widths)) == 1:
            return self(tokens_KBND if isinstance(tokens_KBND, Tensor) else torch.stack(list(tokens_KBND)), 0)
        return torch.stack([self(tokens_BND, pair) for pair, tokens_BND in enumerate(tokens_KBND)])
