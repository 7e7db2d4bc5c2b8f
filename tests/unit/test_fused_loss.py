"""Projector and cosine as one function have the values and gradients of the two, one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rocket_align.alignment import MultiLayerAlignment, cosine_loss
from rocket_align.config import AlignConfig
from rocket_align.fused import fused_loss
from rocket_align.matmul import multiplies
from rocket_align.teacher.base import AlignmentTargets

MASK = torch.tensor([[True] * 9, [True] * 4 + [False] * 5, [False] * 9])


def pair_losses(alignment: MultiLayerAlignment, states: list[Tensor], targets: Tensor, mask: Tensor | None) -> Tensor:
    """(K,) losses by the projector and the cosine."""
    return cosine_loss(alignment.project(alignment.student_tokens(states, 1, 9)), targets, mask).mean(dim=0)


needs_one_function = pytest.mark.skipif(
    not multiplies(torch.zeros(1)), reason="without AVX-512 projector and cosine are never one function"
)


@needs_one_function
@pytest.mark.parametrize("projector", ["matryoshka", "shared", "independent"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("norm", [True, False])
def test_values_and_gradients_are_those_of_projector_and_cosine(
    projector: str, mask: Tensor | None, norm: bool
) -> None:
    torch.manual_seed(0)
    config = AlignConfig(
        student_layers=(1, 2, 4),
        teacher_layers=(0, 1, 2),
        projector=projector,  # type: ignore[arg-type]
        student_norm=norm,
        ensemble_size=2,
    )
    alignment = MultiLayerAlignment(config, 24, 10)
    states = [torch.randn(3, 14, 24, requires_grad=True) for _ in range(6)]
    targets = torch.randn(3, 3, 9, 20)
    results = []
    for fused in (True, False):
        if fused:
            losses = alignment.pair_losses(states, 1, 9, AlignmentTargets(targets), mask)
        else:
            losses = pair_losses(alignment, states, targets, mask)
        # Twice, as analysis asks for the gradients of one pair after another.
        losses[0].backward(retain_graph=True)
        (losses * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
        inputs = [*alignment.parameters(), states[1], states[2], states[4]]
        results.append([losses.detach(), *(part.grad for part in inputs)])
        for part in inputs:
            part.grad = None
    for one_function, two in zip(*results, strict=True):
        torch.testing.assert_close(one_function, two, rtol=1e-5, atol=1e-7)


def test_other_types_and_calls_without_gradients_are_left_to_projector_and_cosine() -> None:
    alignment = MultiLayerAlignment(AlignConfig(student_layers=(1,), teacher_layers=(0,)), 24, 10)
    tokens, target = torch.randn(2, 9, 24), torch.randn(2, 9, 20)
    projector, width = alignment.projector_of(0)
    assert (fused_loss(projector, width, tokens, target, None) is not None) == multiplies(tokens)
    assert fused_loss(projector, width, tokens.bfloat16(), target, None) is None
    assert fused_loss(projector, width, tokens[:0], target[:0], None) is None
    with torch.no_grad():
        assert fused_loss(projector, width, tokens, target, None) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_loss(projector, width, tokens, target, None) is None
