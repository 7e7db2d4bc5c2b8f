"""Analyses leave out the tokens of missing cameras and of a letterbox's bars."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from experiments.analysis import cosines
from experiments.analysis.cka import layer_features, measure_cka
from experiments.analysis.config import ConeConfig
from experiments.analysis.cosines import measure_cone
from experiments.analysis.loaded_checkpoint import counted_tokens
from experiments.analysis.select import student_importance

MASK = torch.tensor([[True, True, False, True], [False, False, False, False], [True, False, True, False]])
TOKENS = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def forward(mask: torch.Tensor | None) -> Any:
    return SimpleNamespace(mask_BN=mask)


@pytest.mark.parametrize("mask", [None, torch.ones(3, 4, dtype=torch.bool)])
def test_where_all_count_tokens_are_as_they_were(mask: torch.Tensor | None) -> None:
    for by_sample in (False, True):
        (tokens,) = counted_tokens(forward(mask), TOKENS, by_sample=by_sample)
        assert tokens is TOKENS


def test_others_are_left_out_and_samples_without_any_too() -> None:
    (together,) = counted_tokens(forward(MASK), TOKENS)
    expected = torch.cat([TOKENS[:, 0, [0, 1, 3]], TOKENS[:, 2, [0, 2]]], dim=1)
    assert torch.equal(together, expected[:, None])
    first, second = counted_tokens(forward(MASK), TOKENS, by_sample=True)
    assert torch.equal(first[:, 0], expected[:, :3]) and torch.equal(second[:, 0], expected[:, 3:])


def test_a_batch_without_any_gives_nothing() -> None:
    none = forward(torch.zeros(3, 4, dtype=torch.bool))
    assert not counted_tokens(none, TOKENS) and not counted_tokens(none, TOKENS, by_sample=True)


@pytest.mark.parametrize("rows", ["tokens", "samples"])
def test_cka_skips_a_batch_without_any(rows: str) -> None:
    def measured(*masks: torch.Tensor) -> torch.Tensor:
        checkpoint: Any = SimpleNamespace(
            passes=lambda: (forward(mask) for mask in masks),
            student_states=lambda _: TOKENS,
            teacher_blocks=lambda _: TOKENS.square(),
        )
        return measure_cka(checkpoint, rows, debiased=False, estimator="exact")

    counted = torch.tensor([[True, False, True, True]] * 3)
    none = torch.zeros_like(counted)
    assert torch.equal(measured(none, counted, none), measured(counted))


def test_the_cone_skips_a_sample_of_a_single_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(mask: torch.Tensor, tokens: torch.Tensor) -> Any:
        checkpoint = SimpleNamespace(
            passes=lambda: [forward(mask)],
            autocast=nullcontext,
            student_states=lambda _: tokens,
            teacher_blocks=lambda _: tokens,
            align=SimpleNamespace(num_pairs=0),
            describe=dict,
        )
        monkeypatch.setattr(cosines, "LoadedCheckpoint", lambda *_, **__: checkpoint)
        return measure_cone(ConeConfig(), "folder")

    mask = torch.tensor([[True, True, False, True], [False, False, True, False]])
    assert measured(mask, TOKENS[:, :2]) == measured(mask[:1], TOKENS[:, :1])


@pytest.mark.parametrize("rows", ["tokens", "samples"])
def test_rows_of_cka_do_not_depend_on_what_does_not_count(rows: str) -> None:
    def features(tokens: torch.Tensor) -> list[torch.Tensor]:
        checkpoint: Any = SimpleNamespace(student_states=lambda _: tokens, teacher_blocks=lambda _: tokens * 2)
        students, teachers = layer_features(checkpoint, forward(MASK), rows)
        assert all(torch.equal(teacher, 2 * student) for student, teacher in zip(students, teachers))
        return students

    seen = features(TOKENS)
    assert len(seen) == 2 and seen[0].shape == ((5, 5) if rows == "tokens" else (2, 5))
    for actual, expected in zip(features(TOKENS.masked_fill(~MASK[..., None], 1e3)), seen):
        assert torch.equal(actual, expected)


def test_layers_are_chosen_by_what_counts() -> None:
    """Blocks that turn the tokens that do not count, and no other, change nothing."""
    text = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    counted = torch.cat([text[:, :1], MASK, text[:, 1:]], dim=1)  # Image tokens stand behind the first of the text.

    class Turn(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return torch.where(counted[..., None], hidden_states, -hidden_states)

    blocks = nn.ModuleList([Turn(), Turn()])

    def passes() -> Any:
        blocks[1](blocks[0](torch.ones(3, 7, 5)))
        yield SimpleNamespace(mask_BN=MASK, attention_mask=text, vision_start=1, num_vision_tokens=4)

    training = SimpleNamespace(family=SimpleNamespace(blocks=lambda _: blocks), parts=None)
    checkpoint: Any = SimpleNamespace(training=training, passes=passes)
    assert student_importance(checkpoint, 1) == pytest.approx([1.0, 1.0])
