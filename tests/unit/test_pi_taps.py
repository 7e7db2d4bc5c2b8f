"""Taps of rocket_align on pi0 and pi0.5: the prefix's stream, once a forward, with and without checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rocket_align
from tests.helpers.pi_models import PiRecord


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_taps_hold_the_recorded_states(kind: str, checkpointing: bool, golden_dir: Path) -> None:
    record = PiRecord(golden_dir, kind)
    policy, depth, batch = record.policy().train(), record.sizes["layers"], record.batch()
    policy.gradient_checkpointing_enable(checkpointing)
    images = record.sizes["cams"] * policy.tokens_per_image
    layers = ("embeddings", "block.0", f"block.{depth - 1}", "final_norm")
    taps = rocket_align.attach(policy, layers, image_tokens=range(images))
    losses = policy(**batch).losses
    tokens = taps.take()
    outputs = record.part("outputs")
    expected = [outputs[f"prefix_hidden.{index}"] for index in (0, 1, depth)] + [outputs["prefix_final_norm"]]
    seen = record.part("inputs")["image_masks"].repeat_interleave(policy.tokens_per_image, dim=1)
    for value, reference in zip(tokens, expected):
        torch.testing.assert_close(value[seen], reference[:, :images][seen], rtol=1e-4, atol=1e-4)
    (losses.mean() + tokens.square().mean()).backward()
    assert policy.language_model.norm.weight.grad is not None
    taps.detach()
    policy(**batch)
    assert policy.language_model.norm._forward_hooks == {}


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_gradients_of_an_aligned_step_do_not_depend_on_checkpointing(kind: str, golden_dir: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        record = PiRecord(golden_dir, kind)
        policy = record.policy().train()
        policy.gradient_checkpointing_enable(checkpointing)
        taps = rocket_align.attach(policy, ("block.1", "final_norm"), image_tokens=range(policy.tokens_per_image))
        loss = policy(**record.batch()).losses.mean()
        (loss + taps.take().square().mean()).backward()
        gradients.append([value.grad for value in policy.parameters()])
    for plain, recomputed in zip(*gradients):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)
