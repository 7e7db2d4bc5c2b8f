"""The whole training step against the reference: student with LoRA, heads, teacher, alignment, optimizer."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from experiments.analysis.gradients import block_parameters
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.models.lora import load_lora
from prismatic.training.config import TrainConfig
from prismatic.training.module import TrainableVLA
from prismatic.training.objectives import DiscreteObjective, L1Objective, PolicyParts
from prismatic.training.schedule import make_optimizer
from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.platforms import LIBERO
from rocket_align import AlignConfig, MultiLayerAlignment, VGGTTeacher
from rocket_align.analysis.gradients import GradientCosines
from rocket_align.teacher.preprocess import unnormalize_views
from tests.helpers.student_helpers import beneath, load_heads, load_student
from tests.helpers.teacher_models import recorded_vggt

LAYERS = (1, 2, 3)
ROCKET = AlignConfig(student_layers=LAYERS, teacher_layers=LAYERS)
INDEPENDENT = replace(ROCKET, projector="independent", released_independent_width=True)
CASES = {
    "rocket": ROCKET,
    "reversed_nonorm_nope_coeff0.25": replace(
        ROCKET, widths_increase_with_depth=False, student_norm=False, teacher_pe=False, coeff=0.25
    ),
    "shared_full_width": replace(ROCKET, projector="shared"),
    "naive_multi_layer": INDEPENDENT,
    "spatial_forcing": None,
    "rocket_no_shift": replace(ROCKET, shift=False),
    "rocket_ensemble2": replace(ROCKET, ensemble_size=2),
    "rocket_random_pooling": replace(ROCKET, pooling="random"),
    "rocket_discrete": ROCKET,
}
FILES = {"reversed_nonorm_nope_coeff0.25": "rocket_reversed_nonorm_nope_coeff0.25"}


@pytest.fixture(scope="module")
def batch(golden_dir: Path) -> dict[str, Tensor]:
    inputs = load_file(golden_dir / "align_inputs_features.safetensors")
    pixels = load_file(golden_dir / "forward_l1_discrete.safetensors")["pixel_values"]
    names = ("input_ids", "attention_mask", "labels", "proprio", "actions")
    return {"pixel_values": pixels, **{name: inputs[name] for name in names}}


@pytest.fixture(scope="module")
def make_module(golden_dir: Path) -> Callable[[AlignConfig, dict[str, Tensor], bool], TrainableVLA]:
    def make(config: AlignConfig, projectors: dict[str, Tensor], discrete: bool = False) -> TrainableVLA:
        heads = load_heads(golden_dir)
        parts = PolicyParts(load_lora(load_student(golden_dir), golden_dir / "lora_adapter", is_trainable=True))
        parts.proprio_projector = heads["proprio_projector"]
        tokenizer = PrismaticProcessor.from_pretrained(golden_dir / "openvla_tiny").tokenizer
        objective: Any = DiscreteObjective(LIBERO, ActionTokenizer(tokenizer)) if discrete else L1Objective(LIBERO)
        if not discrete:
            parts.action_head = heads["action_head_l1"]
        alignment = MultiLayerAlignment(config, parts.vla.llm_dim, 64)
        alignment.load_state_dict(projectors)
        # The goldens were recorded in evaluation mode; nothing here depends on it but dropout, which is 0.
        return TrainableVLA(parts, objective, alignment, auxiliary_coeff=config.coeff).eval()

    return make


@pytest.fixture(scope="module")
def teacher(golden_dir: Path, batch: dict[str, Tensor]) -> Callable[[tuple[int, ...]], Any]:
    config, weights = recorded_vggt(golden_dir)

    @functools.cache
    def features(layers: tuple[int, ...]) -> Any:
        model = VGGTTeacher(config, layers)
        model.load_state_dict({key: weights[key] for key in model.state_dict()})
        return model(unnormalize_views(batch["pixel_values"]))

    return features


def _case_config(name: str, recorded: dict[str, Any]) -> AlignConfig:
    if (config := CASES[name]) is not None:
        return config
    kwargs = recorded["forward_kwargs"]
    layers = tuple(kwargs["vla_layers_align"]), tuple(kwargs["vggt_layers_align"])
    return replace(INDEPENDENT, student_layers=layers[0], teacher_layers=layers[1], coeff=kwargs["align_loss_coeff"])


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_of_one_step(
    name: str, golden_dir: Path, make_module: Any, teacher: Any, batch: dict[str, Tensor]
) -> None:
    stem = f"align_loss.{FILES.get(name, name)}"
    expected = load_file(golden_dir / f"{stem}.safetensors")
    recorded = json.loads((golden_dir / f"{stem}.json").read_text())
    config = _case_config(name, recorded)
    module = make_module(config, beneath(expected, "weights.align_projectors."), name == "rocket_discrete")
    targets = teacher(config.teacher_layers)
    torch.manual_seed(recorded["torch_manual_seed_before_forward"])
    output = module(dict(batch), targets)
    output.loss.backward()
    metrics = recorded["metrics"]
    assert output.loss.item() == pytest.approx(metrics["total_loss"], abs=1e-4)
    assert output.metrics["align_loss"].item() == pytest.approx(metrics["align_loss"], abs=1e-4)
    for metric in ("curr_action_l1_loss", "next_actions_l1_loss", "curr_action_accuracy", "next_actions_accuracy"):
        if metric in metrics:
            assert output.metrics[metric].item() == pytest.approx(metrics[metric], abs=1e-4)
    compared = 0
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for key, gradient in beneath(expected, "grad.").items():
        own = key.replace("action_head_l1.", "action_head.")
        if own not in parameters:
            continue
        actual = parameters[own].grad
        actual = torch.zeros_like(gradient) if actual is None else actual
        assert (actual - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, key
        compared += 1
    assert compared >= 15
    for key, (norm, _) in recorded["lora_grad_norm_and_sum"].items():
        gradient = parameters[f"vla.{key}"].grad
        found = 0.0 if gradient is None else gradient.norm().item()
        assert found == pytest.approx(norm, rel=1e-3, abs=1e-6), key


def test_five_optimizer_steps(golden_dir: Path, make_module: Any, teacher: Any, batch: dict[str, Tensor]) -> None:
    expected = load_file(golden_dir / "train_5_steps.safetensors")
    projectors = beneath(load_file(golden_dir / "align_loss.rocket.safetensors"), "weights.align_projectors.")
    module = make_module(ROCKET, projectors)
    config = TrainConfig(learning_rate=5e-4, num_steps_before_decay=3)
    optimizer, schedule = make_optimizer(module.trainable_parameters(), config)
    targets = teacher(LAYERS)
    for step in range(5):
        assert schedule.get_last_lr()[0] == pytest.approx(expected["train.lr_used"][step].item())
        output = module(dict(batch), targets)
        output.loss.backward()
        assert output.loss.item() == pytest.approx(expected["train.total_loss"][step].item(), rel=1e-3)
        assert output.metrics["align_loss"].item() == pytest.approx(expected["train.align_loss"][step].item(), rel=1e-3)
        assert output.metrics["action_loss"].item() == pytest.approx(expected["train.l1_loss"][step].item(), rel=1e-3)
        norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        assert norm.item() == pytest.approx(expected["train.grad_norm"][step].item(), rel=2e-3)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for key, value in beneath(expected, "final.").items():
        own = parameters[key.replace("action_head_l1.", "action_head.")]
        # AdamW divides by the gradient's size, so entries with gradients near zero may step either way.
        assert (own - value).abs().mean() < 2e-5, key


def test_gradient_conflict_between_pairs(
    golden_dir: Path, make_module: Any, teacher: Any, batch: dict[str, Tensor]
) -> None:
    """Cosines and norms of the pairs' gradients on the LoRA of the LLM's first block, before training.

    The released measurement drops the Matryoshka widths: every pair goes through the whole projector there.
    """
    expected = load_file(golden_dir / "train_5_steps.safetensors")
    names = json.loads((golden_dir / "train_5_steps.json").read_text())["grad_conflict_params"]
    projectors = beneath(load_file(golden_dir / "align_loss.rocket.safetensors"), "weights.align_projectors.")
    module = make_module(replace(ROCKET, projector="shared"), projectors)
    groups = block_parameters(module.vla)
    parameters = dict(module.vla.named_parameters())
    assert {id(parameter) for parameter in groups["0"]} == {id(parameters[name]) for name in names}
    output = module.vla(
        **{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels", "proprio")},
        proprio_projector=module.proprio_projector,
        output_hidden_states=True,
    )
    tokens = 2 * module.vla.vision_backbone.get_num_patches()
    cosines = GradientCosines(groups)
    cosines.update(module.align_projectors.pair_losses(output.hidden_states, 1, tokens, teacher(LAYERS)).unbind())
    report = cosines.result()["0"]
    torch.testing.assert_close(report.cosine_KK.float(), expected["grad_conflict.cosine"], atol=1e-3, rtol=1e-3)
    norms = expected["grad_conflict.per_layer_grad_norm"]
    torch.testing.assert_close(report.norm_K.float(), norms, atol=1e-6, rtol=2e-3)
