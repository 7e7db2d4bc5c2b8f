"""The release's alignment on pi0.5's hidden states: its loss, its indexing in PyTorch and in JAX, its masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prismatic.models.pi.weights import published_name
from rocket_align import AlignConfig, MultiLayerAlignment, TeacherFeatures, attach, pool_teacher, tap_names, token_mask
from tests.helpers.pi_models import PiRecord

RECORDS = ("shared_matryoshka", "independent")


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Tensor]:
    return load_file(golden_dir / "pi0" / "align_pi05.safetensors")


@pytest.fixture(scope="module")
def description(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "pi0" / "align_pi05.json").read_text())


@pytest.fixture(scope="module")
def states(golden_dir: Path) -> dict[str, Tensor]:
    """The prefix's states at every tap."""
    recorded = load_file(golden_dir / "pi0" / "pi05.safetensors")
    places = {f"block.{index}": recorded[f"outputs.prefix_hidden.{index + 1}"] for index in range(4)}
    return {**places, "final_norm": recorded["outputs.prefix_final_norm"]}


def alignment(record: str, golden: dict[str, Tensor]) -> MultiLayerAlignment:
    """The recorded projectors; what the config says of student layers does not matter to `align`."""
    independent = record == "independent"
    config = AlignConfig(
        student_layers=(0, 1, 2, 3),
        teacher_layers=(0, 1, 2, 3),
        projector="independent" if independent else "matryoshka",
        released_independent_width=independent,
    )
    module = MultiLayerAlignment(config, student_dim=48, teacher_dim=12)
    prefix = f"{record}.projector."
    weights = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    module.load_state_dict({key.replace(".", ".0.", 1): value for key, value in weights.items()})
    return module


def teacher(golden: dict[str, Tensor]) -> TeacherFeatures:
    return TeacherFeatures(tuple(golden["teacher_features"]), (6, 6), (84, 84))


def test_pooled_teacher_and_mask_are_the_release_s(golden: dict[str, Tensor], golden_dir: Path) -> None:
    for layer, features in enumerate(golden["teacher_features"]):
        pooled = pool_teacher(features, (6, 6), (84, 84), 27, mode="bilinear", position_embedding=True)
        torch.testing.assert_close(pooled, golden[f"pooled_teacher.{layer}"], rtol=1e-5, atol=1e-6)
    cameras = load_file(golden_dir / "pi0" / "pi05.safetensors")["inputs.image_masks"]
    assert torch.equal(token_mask(cameras, 27, golden["padding_mask"]), golden["align_mask"])


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize(
    ("convention", "key"), [("openpi-torch", "per_pair"), ("openpi-jax", "per_pair_block_output_indexing")]
)
def test_loss_of_each_pair_in_both_of_its_indexings(
    record: str, convention: Any, key: str, golden: Any, description: Any, states: Any
) -> None:
    names = tap_names(description["pairs"]["student"], 4, convention=convention)
    rows = torch.stack([states[name][:, :27] for name in names])
    output = alignment(record, golden).align(rows, teacher(golden), golden["align_mask"])
    expected = torch.tensor(description["records"][record][key])
    torch.testing.assert_close(output.per_pair, expected, rtol=1e-5, atol=1e-6)
    if key == "per_pair":
        assert output.loss.item() == pytest.approx(description["records"][record]["align_loss"], rel=1e-5)


@pytest.mark.parametrize("record", RECORDS)
def test_gradients_at_the_projectors(record: str, golden: Any, description: Any, states: Any) -> None:
    names = tap_names(description["pairs"]["student"], 4, convention="openpi-torch")
    module = alignment(record, golden)
    rows = torch.stack([states[name][:, :27] for name in names])
    (0.5 * module.align(rows, teacher(golden), golden["align_mask"]).loss).backward()
    prefix = f"{record}.projector_grad."
    expected = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    assert expected
    for name, gradient in expected.items():
        computed = module.get_parameter(name.replace(".", ".0.", 1)).grad
        torch.testing.assert_close(computed, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("record", RECORDS)
def test_an_aligned_step_of_the_policy(record: str, golden: Any, description: Any, golden_dir: Path) -> None:
    """Taps, loss and gradients of the whole model, as the release's step has them."""
    recorded = PiRecord(golden_dir, "pi05")
    policy = recorded.policy()
    names = tap_names(description["pairs"]["student"], 4, convention="openpi-torch")
    taps = attach(policy, names, range(27))
    losses = policy(**recorded.batch()).losses
    aligned = alignment(record, golden).align(taps.take(), teacher(golden), golden["align_mask"])
    total = losses.mean() + 0.5 * aligned.loss
    total.backward()
    assert total.item() == pytest.approx(description["records"][record]["total_lambda_0_5"], rel=1e-5)
    gradients = {published_name(name): value.grad for name, value in policy.named_parameters()}
    prefix = f"{record}.student_grad."
    expected = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    assert expected and expected.keys() <= gradients.keys()
    for name, gradient in expected.items():
        computed = gradients[name]
        assert computed is not None and (computed - gradient).norm() <= 1e-3 * gradient.norm(), name
