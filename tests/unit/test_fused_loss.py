"""Projector and cosine as one function have the values and gradients of the two, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rocket_align.alignment import MultiLayerAlignment, cosine_loss
from rocket_align.config import AlignConfig
from rocket_align.fused import fused_loss, fuses
from rocket_align.matmul import multiplies
from rocket_align.teacher.base import AlignmentTargets

WEIGHTS = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "vlm_norm.weight", "vlm_norm.bias"]
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


def one_pair(projector: str = "matryoshka", **settings: Any) -> MultiLayerAlignment:
    torch.manual_seed(0)
    config = AlignConfig(student_layers=(1,), teacher_layers=(0,), projector=projector, **settings)  # type: ignore[arg-type]
    return MultiLayerAlignment(config, 24, 10)


@needs_one_function
def test_calls_outside_of_its_limits_are_left_to_projector_and_cosine() -> None:
    projector, tokens, target = one_pair().projector_of(0)[0], torch.randn(3, 9, 24), torch.randn(3, 9, 20)
    assert fuses(projector, tokens, target, MASK)
    assert not fuses(projector, tokens.bfloat16(), target, None)
    assert not fuses(projector, tokens[:0], target[:0], None)
    assert not fuses(projector, tokens, target[:1], None)
    assert not fuses(projector, tokens, target, MASK[:1])
    assert not fuses(projector, tokens, target.clone().requires_grad_(), None)
    with torch.no_grad():
        assert not fuses(projector, tokens, target, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fuses(projector, tokens, target, None)
    projector.requires_grad_(False)
    assert not fuses(projector, tokens, target, None)
    assert fuses(projector, tokens.requires_grad_(), target, None)


@pytest.mark.parametrize("projector", ["matryoshka", "shared", "independent"])
def test_hooks_of_projectors_fire(projector: str) -> None:
    alignment = one_pair(projector)
    calls: list[object] = []
    alignment.projector_of(0)[0].register_forward_hook(lambda *call: calls.append(call))
    alignment.align(torch.randn(1, 3, 9, 24), AlignmentTargets(torch.randn(1, 3, 9, 20)))
    assert len(calls) == 1


def test_sharded_projectors_are_called_as_modules(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    tokens, targets = torch.randn(1, 3, 9, 24), AlignmentTargets(torch.randn(1, 3, 9, 20))
    expected = one_pair("independent").align(tokens, targets).loss
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        alignment = one_pair("independent")
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(alignment.projector_of(0)[0], mesh=mesh)
        loss = alignment.align(tokens, targets).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert all(parameter.grad is not None for parameter in alignment.parameters())
    finally:
        torch.distributed.destroy_process_group()


@needs_one_function
@pytest.mark.parametrize("frozen", ["fc1", "fc2.bias", "fc2", "vlm_norm", "tokens"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: str) -> None:
    alignment = one_pair()
    (projector, width), target = alignment.projector_of(0), torch.randn(3, 9, 20)
    named = {"tokens": torch.randn(3, 9, 24).requires_grad_()} | dict(projector.named_parameters())
    for name, part in named.items():
        part.requires_grad_(not name.startswith(frozen))
    fused = fused_loss(projector, 0, named["tokens"], target, MASK)
    plain = cosine_loss(projector.project(named["tokens"], width), target, MASK)
    wanted = [part for part in named.values() if part.requires_grad]
    expected = torch.autograd.grad(plain, wanted)
    node = fused.grad_fn
    assert [part is not None for part in node.saved_tensors[-len(named) :]] == [  # type: ignore[union-attr]
        named[name].requires_grad for name in ["tokens", *WEIGHTS]
    ]
    torch.testing.assert_close(torch.autograd.grad(fused, wanted), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_can_be_differentiated(norm: bool, fused: bool) -> None:
    alignment, target = one_pair(student_norm=norm), torch.randn(3, 9, 20)
    states, (projector, width) = torch.randn(3, 9, 24), alignment.projector_of(0)

    def curvature(tokens: Tensor, loss: Tensor) -> list[Tensor]:
        (gradient,) = torch.autograd.grad(loss, tokens, create_graph=True)
        wanted = [tokens, projector.fc1.weight, projector.fc2.weight, *projector.vlm_norm.parameters()]
        return [gradient, *torch.autograd.grad(gradient.square().sum(), wanted)]

    handle = projector.register_forward_hook(lambda *_: None)
    if fused:
        handle.remove()
    tokens = states.clone().requires_grad_()
    single = curvature(tokens, alignment.align(tokens[None], AlignmentTargets(target[None]), MASK).loss)
    projector.double()
    tokens = states.double().requires_grad_()
    distances = 1 - torch.cosine_similarity(projector.project(tokens, width), target.double(), dim=-1)
    loss = (distances * MASK / MASK.sum(dim=1, keepdim=True).clamp(min=1)).sum() / len(MASK)
    for part, expected in zip(single, curvature(tokens, loss), strict=True):
        torch.testing.assert_close(part.double(), expected, rtol=1e-3, atol=1e-7)


def test_transforms_of_functions_give_the_same_gradient() -> None:
    alignment, targets = one_pair(), AlignmentTargets(torch.randn(1, 3, 9, 20))
    tokens = torch.randn(1, 3, 9, 24, requires_grad=True)
    transformed = torch.func.grad(lambda states: alignment.align(states, targets).loss)(tokens)
    (expected,) = torch.autograd.grad(alignment.align(tokens, targets).loss, tokens)
    torch.testing.assert_close(transformed, expected, rtol=1e-5, atol=1e-7)


def test_tokens_that_do_not_count_may_hold_nan() -> None:
    alignment, targets = one_pair(), AlignmentTargets(torch.randn(1, 3, 9, 20))
    tokens = torch.randn(1, 3, 9, 24)
    expected = alignment.align(tokens, targets, MASK).loss
    tokens[:, ~MASK] = torch.nan
    torch.testing.assert_close(alignment.align(tokens, targets, MASK).loss, expected)


def test_pairs_of_equal_width_are_one_product() -> None:
    alignment = MultiLayerAlignment(
        AlignConfig(student_layers=(1, 2), teacher_layers=(0, 1), projector="shared"), 24, 10
    )
    projector, _ = alignment.projector_of(0)
    calls: list[object] = []
    projector.register_forward_hook(lambda *call: calls.append(call))
    tokens = torch.randn(2, 3, 9, 24)
    losses = alignment.align(tokens, AlignmentTargets(torch.randn(2, 3, 9, 20))).per_pair
    assert losses.shape == (2,) and len(calls) == 1
    apart = torch.stack([projector(part, pair) for pair, part in enumerate(tokens)])
    torch.testing.assert_close(projector.project_pairs(tokens), apart)
