"""Activations that a training step of pi0 and pi0.5 computes again: gradients stay the same, hooks are respected."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.live_bytes import LiveBytes
from prismatic.models.lora import wrap_lora
from prismatic.models.pi import blocks
from prismatic.models.pi.model import PiPolicy
from prismatic.models.pi.trainable import lora_targets
from tests.helpers.tiny_pi import write_tiny_pi
from tests.unit.test_pi_repeats import gradients, observation


@pytest.fixture(params=["pi0", "pi05"])
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> PiPolicy:
    return PiPolicy.from_pretrained(write_tiny_pi(tmp_path / request.param, request.param)).train()


def step(policy: Any) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the bytes that the forward pass leaves behind."""
    torch.manual_seed(1)
    with LiveBytes() as tracker, tracker.phase("forward"):
        losses = policy(**observation(), noise=torch.randn(2, 4, 8), time=torch.rand(2)).losses
    return gradients(policy, losses.mean()), tracker.phases["forward"].bytes_after


def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_kept", lambda *_: nullcontext())


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_those_of_kept_activations(policy: PiPolicy, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    model: Any = policy
    if lora:
        torch.manual_seed(0)
        model = wrap_lora(policy, LoraConfig(r=2, target_modules=lora_targets(policy), init_lora_weights=False)).train()
    (actual, fewer), (again, _) = step(model), step(model)
    kept(monkeypatch)
    expected, more = step(model)
    assert expected.keys() == actual.keys() and fewer < more
    assert all(
        torch.equal(actual[name], gradient) and torch.equal(again[name], gradient)
        for name, gradient in expected.items()
    )


def test_what_a_hook_makes_of_a_norm_is_kept(policy: PiPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def doubled(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        calls.append(1)
        return 2 * output

    policy.language_model.layers[1].input_layernorm.register_forward_hook(doubled)
    actual, _ = step(policy)
    assert len(calls) == 1
    kept(monkeypatch)
    expected, _ = step(policy)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


def test_a_graph_is_walked_twice(policy: PiPolicy) -> None:
    losses = policy(**observation(), noise=torch.randn(2, 4, 8), time=torch.rand(2)).losses
    weight = policy.language_model.layers[0].self_attn.k_proj.weight
    first, second = (torch.autograd.grad(losses.mean(), weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
