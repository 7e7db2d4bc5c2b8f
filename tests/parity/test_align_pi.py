"""The alignment of pi0.5's states, with missing cameras and padded images, against the release's PyTorch path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rocket_align.alignment import MultiLayerAlignment, cosine_loss
from rocket_align.config import AlignConfig
from rocket_align.teacher.base import TeacherFeatures

CASES = {"shared_matryoshka": {}, "independent": {"projector": "independent", "released_independent_width": True}}


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    folder = golden_dir / "pi0"
    record = json.loads((folder / "align_pi05.json").read_text())
    return record, load_file(folder / "align_pi05.safetensors"), load_file(folder / "pi05.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_pair_losses_and_gradients(
    golden: tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]], case: str
) -> None:
    record, tensors, policy = golden
    expected = record["records"][case]
    states = [policy[f"outputs.prefix_hidden.{layer}"] for layer in range(4)] + [policy["outputs.prefix_final_norm"]]
    states = [state.clone().requires_grad_() for state in states]
    config = AlignConfig(student_layers=(1, 2, 3, 4), teacher_layers=(0, 1, 2, 3), shift=False, **CASES[case])
    alignment = MultiLayerAlignment(config, student_dim=48, teacher_dim=12)
    prefix = f"{case}.projector."
    alignment.load_state_dict(
        {
            f"{pair}.0.{name}": tensors.get(f"{prefix}{pair}.{name}", tensors[f"{prefix}0.{name}"])
            for pair in range(4)
            for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "vlm_norm.weight", "vlm_norm.bias")
        }
    )
    side = record["teacher"]["grid"]
    features = TeacherFeatures(tuple(tensors["teacher_features"]), (side, side), (42, 42))
    losses = alignment.pair_losses(states, 0, 27, features, tensors["align_mask"])
    assert list(alignment.widths) == expected["widths"]
    assert losses.tolist() == pytest.approx(expected["per_pair"], abs=1e-5)
    (0.5 * losses.mean()).backward()
    for name, parameter in alignment[0][0].named_parameters():
        torch.testing.assert_close(parameter.grad, tensors[f"{case}.projector_grad.0.{name}"], rtol=1e-3, atol=1e-6)


def test_samples_without_a_token_add_nothing() -> None:
    projected, target = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    cosines = 1 - torch.nn.functional.cosine_similarity(projected, target, dim=-1)
    expected = (cosines[:, 0, :2].mean(-1) + cosines[:, 2, 0]) / 3
    torch.testing.assert_close(cosine_loss(projected, target, mask), expected)
    assert cosine_loss(projected, target, torch.zeros_like(mask)).tolist() == [0, 0]
