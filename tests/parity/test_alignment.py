"""Projectors with their gradients, and pooling, against the recorded reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rocket_align.alignment import MultiLayerAlignment, cosine_loss, vision_tokens
from rocket_align.config import AlignConfig
from rocket_align.pooling import pool_teacher, student_grid
from rocket_align.projector import AlignmentProjector, matryoshka_widths
from tests.helpers.student_helpers import beneath

PROJECTOR_CASES = [
    "matryoshka_default10",
    "matryoshka_default10_norm",
    "matryoshka_reversed10",
    "matryoshka_odd_hidden",
    "full_width_shared",
    "full_width_shared_norm",
    "custom_ratios",
    "custom_ratios_reversed",
    "single_default_20pct",
    "custom_tiny_ratio",
]
POOLING_CASES = ["n2_37x37_to_512", "n1_37x37_to_256", "n3_5x5_to_147", "n2_4x4_to_32", "n2_5x5_to_32"]

ROCKET = AlignConfig(student_layers=(1, 2, 3), teacher_layers=(1, 2, 3))


def widths_of(kwargs: dict[str, object]) -> tuple[int, ...]:
    """The widths that the reference's constructor arguments stand for."""
    layers = int(kwargs["num_layers"])  # type: ignore[call-overload]
    hidden = int(kwargs.get("hidden_dim", 2 * int(kwargs["vggt_dim"])))  # type: ignore[call-overload]
    widths = (hidden,) * layers
    if kwargs.get("use_matryoshka", True):
        widths = matryoshka_widths(hidden, layers, kwargs.get("width_ratios"))  # type: ignore[arg-type]
    return widths if kwargs.get("shallow_to_deep_increase", True) else widths[::-1]


@pytest.mark.parametrize("case", PROJECTOR_CASES)
def test_projector(golden_dir: Path, case: str) -> None:
    description = json.loads((golden_dir / "align_projector.json").read_text())["cases"][case]
    recorded = load_file(golden_dir / "align_projector.safetensors")
    kwargs = description["kwargs"]
    widths = widths_of(kwargs)
    assert list(widths) == description["info"]["layer_hidden_dims"]
    sizes = kwargs["llm_dim"], kwargs["vggt_dim"], kwargs.get("hidden_dim")
    projector = AlignmentProjector(*sizes, widths=widths, student_norm=kwargs.get("use_vlm_norm", False))
    projector.load_state_dict(beneath(recorded, f"{case}.weights."))
    for layer in description["layer_indices"]:
        name = f"{case}.layer{layer}"
        tokens = recorded[f"{case}.in.llm_emb"].clone().requires_grad_()
        projector.zero_grad()
        projected = projector(tokens, layer)
        loss = cosine_loss(projected, recorded[f"{case}.in.target_emb"])
        loss.backward()
        torch.testing.assert_close(projected, recorded[f"{name}.projected"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(loss, recorded[f"{name}.loss"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tokens.grad, recorded[f"{name}.grad.llm_emb"], atol=1e-6, rtol=1e-3)
        for key, parameter in projector.named_parameters():
            if f"{name}.grad.{key}" in recorded:
                torch.testing.assert_close(parameter.grad, recorded[f"{name}.grad.{key}"], atol=1e-6, rtol=1e-3)


def test_widths_at_real_size(golden_dir: Path) -> None:
    table = json.loads((golden_dir / "align_projector.json").read_text())["real_size_llm4096_vggt1024"]
    for layers, row in table.items():
        assert list(matryoshka_widths(2048, int(layers))) == row["layer_hidden_dims"]
    with torch.device("meta"):
        projector = AlignmentProjector(4096, 1024, widths=(2048,), student_norm=False)
    assert sum(parameter.numel() for parameter in projector.parameters()) == table["10"]["params"]


@pytest.mark.parametrize("case", POOLING_CASES)
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("mode", ["bilinear", "random"])
def test_pooling(golden_dir: Path, case: str, position: int, mode: str) -> None:
    description = json.loads((golden_dir / "pooling.json").read_text())["cases"][case]
    recorded = load_file(golden_dir / "pooling.safetensors")
    height, width = description["patch_hw"]
    features = recorded[f"{case}.in"].clone().requires_grad_()
    torch.manual_seed(description["random_seed"])
    sizes = (height, width), (14 * height, 14 * width), description["ref_len"]
    pooled = pool_teacher(features, *sizes, mode=mode, position_embedding=bool(position))
    torch.testing.assert_close(pooled, recorded[f"{case}.{mode}.pe{position}"], atol=1e-5, rtol=1e-4)
    gradient = recorded.get(f"{case}.{mode}.pe{position}.grad_in_of_sum_sq")
    if gradient is not None:
        pooled.square().sum().backward()
        torch.testing.assert_close(features.grad, gradient, atol=1e-5, rtol=1e-4)


def test_random_pooling_of_a_grid_without_square_student(golden_dir: Path) -> None:
    """The reference's bilinear pooling has no answer for this case; its random one has."""
    description = json.loads((golden_dir / "pooling.json").read_text())["cases"]["n2_9x7_to_32"]
    recorded = load_file(golden_dir / "pooling.safetensors")
    torch.manual_seed(description["random_seed"])
    features = recorded["n2_9x7_to_32.in"]
    pooled = pool_teacher(features, (9, 7), (126, 98), 32, mode="random", position_embedding=True)
    torch.testing.assert_close(pooled, recorded["n2_9x7_to_32.random.pe1"], atol=1e-5, rtol=1e-4)


def test_pooled_sizes_agree_wherever_the_reference_fits(golden_dir: Path) -> None:
    table = json.loads((golden_dir / "pooling.json").read_text())["size_table"]
    fitting = [row for row in table if row[3] == row[6]]
    assert fitting
    for views, height, width, tokens, out_height, out_width, _ in fitting:
        assert student_grid(tokens, views, (height, width)) == (out_height, out_width)


def test_shifted_vision_tokens(golden_dir: Path) -> None:
    recorded = load_file(golden_dir / "align_inputs_features.safetensors")
    hidden_states = [recorded[f"lora.hidden_states.{layer}"] for layer in range(5)]
    tokens = vision_tokens(hidden_states, (1, 2, 3), 1, 32, shift=True)
    for pair in range(3):
        torch.testing.assert_close(tokens[pair], recorded[f"pair{pair}.vision_hidden"])


def test_released_checkpoint_loads_and_keeps_its_layout(golden_dir: Path) -> None:
    path = golden_dir / "finetuned_ckpt_files" / "align_projectors--7_checkpoint.pt"
    released = torch.load(path, weights_only=True)
    alignment = MultiLayerAlignment(ROCKET, student_dim=64, teacher_dim=64)
    alignment.load_state_dict(released)
    expected = {key.removeprefix("module."): value for key, value in released.items()}
    assert list(alignment.state_dict()) == list(expected)
    torch.testing.assert_close(dict(alignment.state_dict()), expected, rtol=0, atol=0)
