"""Several noises and times of a sample, on one pass of the prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prismatic.models.pi.blocks import _attend
from prismatic.models.pi.model import PiPolicy
from prismatic.policies.pi import make_processor
from prismatic.policies.pi_data import PiBatchTransform, collate
from tests.helpers.tiny_pi import write_tiny_pi


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PiPolicy:
    return PiPolicy.from_pretrained(write_tiny_pi(tmp_path_factory.mktemp("pi") / request.param, request.param))


def observation() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "pixel_values": torch.rand(2, 2, 3, 42, 42) * 2 - 1,
        "image_masks": torch.tensor([[True, True], [True, False]]),
        "input_ids": torch.tensor([[3, 7, 9], [3, 8, 0]]),
        "attention_mask": torch.tensor([[True, True, True], [True, True, False]]),
        "state": torch.randn(2, 8),
        "actions": torch.randn(2, 4, 8),
    }


def gradients(policy: PiPolicy, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss.backward()
    return {name: value.grad for name, value in policy.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_loss_of_several_draws_is_the_mean_of_their_losses(policy: PiPolicy, checkpointed: bool) -> None:
    policy.train().gradient_checkpointing_enable(checkpointed)
    passes: list[int] = []
    hook = policy.language_model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    inputs = observation()
    noise, time = torch.randn(2, 3, 4, 8), torch.rand(2, 3)
    together = policy(**inputs, noise=noise, time=time)
    assert together.losses.shape == together.velocity.shape == (2, 3, 4, 8) and len(passes) == 1
    apart = [policy(**inputs, noise=noise[:, draw], time=time[:, draw]).losses for draw in range(3)]
    hook.remove()
    torch.testing.assert_close(together.losses, torch.stack(apart, dim=1), rtol=1e-5, atol=1e-6)
    expected, actual = gradients(policy, torch.stack(apart).mean()), gradients(policy, together.losses.mean())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1e-3))


def test_draws_come_with_the_sample_and_the_first_form_stays(tmp_path: Path) -> None:
    folder = write_tiny_pi(tmp_path / "pi05", "pi05")
    processor = make_processor(PiPolicy.from_pretrained(folder).config, folder)
    frame: Any = {
        "observation": {"image_primary": np.zeros((1, 42, 42, 3), np.uint8), "proprio": np.zeros((1, 8), np.float32)},
        "task": {"language_instruction": b"pick up the milk"},
        "action": np.zeros((4, 7), np.float32),
        "views": {"primary": (0, 0, 42, 42)},
        "draw": (0, 2, 5),
        "dataset_name": "d",
    }
    single, several = (PiBatchTransform(processor, "pi05", False, 1, draws)(frame) for draws in (1, 3))
    assert single["noise"].shape == (4, 8) and single["time"].shape == ()
    assert several["noise"].shape == (3, 4, 8) and len(several["time"].unique()) == 3
    assert several["time"][0] == single["time"]  # What earlier runs drew, a resumed run draws.
    assert collate([several, several])["time"].shape == (2, 3)


def test_bfloat16_attention_of_training_on_a_cpu_is_torchs() -> None:
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, length, 16).bfloat16() for length in (5, 9, 9))
    mask = torch.zeros(2, 1, 1, 9).masked_fill(torch.rand(2, 1, 1, 9) < 0.4, torch.finfo(torch.bfloat16).min).bfloat16()
    with torch.no_grad():
        expected = _attend(*(part.float() for part in (queries, keys, values, mask)))
    torch.testing.assert_close(_attend(queries, keys, values, mask).float(), expected, rtol=0.03, atol=0.03)
