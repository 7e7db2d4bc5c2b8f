"""Tokens that do not count (missing cameras, padding) change neither loss nor gradient."""

from __future__ import annotations

import pytest
import torch

from rocket_align import AlignConfig, MultiLayerAlignment, TeacherFeatures, cosine_loss


def test_a_sample_is_the_mean_over_its_own_tokens_and_without_any_it_is_zero() -> None:
    torch.manual_seed(0)
    projected = torch.randn(2, 3, 4, 6, requires_grad=True)
    target = torch.randn(2, 3, 4, 6)
    mask = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    target[:, ~mask] = 0  # as the features of a missing camera are
    loss = cosine_loss(projected, target, mask)
    distances = 1 - torch.cosine_similarity(projected, target, dim=-1)
    expected = torch.stack([distances[:, 0].mean(-1), distances[:, 1, [0, 2]].mean(-1), torch.zeros(2)]).mean(0)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    assert projected.grad is not None and torch.isfinite(projected.grad).all()
    assert not projected.grad[:, ~mask].any()
    torch.testing.assert_close(cosine_loss(projected, target, torch.ones_like(mask)), cosine_loss(projected, target))


def test_rows_of_taps_are_aligned_as_hidden_states_are() -> None:
    torch.manual_seed(0)
    config = AlignConfig(student_layers=(1, 3), teacher_layers=(0, 1), shift=False)
    alignment = MultiLayerAlignment(config, student_dim=8, teacher_dim=4)
    states = torch.randn(5, 2, 7, 8)
    teacher = TeacherFeatures(tuple(torch.randn(2, 1, 16, 8) for _ in range(2)), (4, 4), (56, 56))
    output = alignment.align(states[[1, 3], :, 1:5], teacher)
    torch.testing.assert_close(output.loss, alignment(list(states), 1, 4, teacher).loss)
    with pytest.raises(ValueError, match="found 3 taps; accepted: 2, one a pair"):
        alignment.align(states[:3, :, 1:5], teacher)
