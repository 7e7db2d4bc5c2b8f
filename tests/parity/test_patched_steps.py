"""Five steps of a script with the alignment injected, and of this project's own module, on the recorded tiny models.

The forward pass is the injected text itself, taken from the rewritten stand-in for upstream's script; model, LoRA,
teacher, projectors and batch are the reference's. The stand-in's action loss is simpler than upstream's, so this
project's module is given the same one.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers.student_helpers import beneath, load_student

pytest.importorskip("libcst")

from patches.rewrite import inject
from patches.rocket_join import RocketJoin
from prismatic.models.lora import load_lora
from prismatic.training.config import TrainConfig
from prismatic.training.module import TrainableVLA
from prismatic.training.objectives import PolicyParts
from prismatic.training.schedule import make_optimizer
from rocket_align import AlignConfig, MultiLayerAlignment, VGGTTeacher
from rocket_align.targets import TeacherTargets
from rocket_align.teacher.preprocess import IMAGENET_MEAN, IMAGENET_STD, unnormalize_views
from tests.helpers.teacher_models import recorded_vggt

STAND_IN = Path(__file__).resolve().parents[1] / "helpers" / "openvla_oft_stand_in.py"
ALIGN = AlignConfig(student_layers=(1, 2, 3), teacher_layers=(1, 2, 3))
STEPS, LEARNING_RATE, NUM_PREFIX = 5, 5e-4, 33
MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values", "labels")


def injected_forward_pass() -> Any:
    """`run_forward_pass` as `python -m patches apply` leaves it in the stand-in."""
    tree = ast.parse(inject(STAND_IN.read_bytes()))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run_forward_pass")
    namespace: dict[str, Any] = {"nn": nn, "torch": torch}
    exec(compile(ast.Module([function], []), str(STAND_IN), "exec"), namespace)
    return namespace["run_forward_pass"]


@dataclass
class MeanObjective:
    """The stand-in's action loss: L1 of a linear layer on the mean of the last states behind the images."""

    needs_logits: bool = False

    def model_inputs(self, parts: PolicyParts, batch: dict[str, Any]) -> dict[str, Any]:
        return {}

    def loss(self, parts: PolicyParts, batch: dict[str, Any], output: Any) -> tuple[Tensor, dict[str, Tensor]]:
        predicted = parts.action_head(output.hidden_states[-1][:, NUM_PREFIX:].mean(dim=1))
        return nn.functional.l1_loss(predicted, batch["actions"]), {}


class ScriptsPolicy(nn.Module):
    """The policy as the script calls it; what the stand-in's call leaves out is taken from the batch."""

    def __init__(self, vla: Any, batch: dict[str, Tensor]) -> None:
        super().__init__()
        self.vla, self.batch = vla, batch

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Any:
        given = {**{name: self.batch[name] for name in MODEL_INPUTS}, "input_ids": input_ids}
        return self.vla(**{**given, "pixel_values": pixel_values}, output_hidden_states=True)


@pytest.fixture(scope="module")
def batch(golden_dir: Path) -> dict[str, Tensor]:
    inputs = load_file(golden_dir / "align_inputs_features.safetensors")
    found = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    pixels = load_file(golden_dir / "forward_l1_discrete.safetensors")["pixel_values"]
    return {**found, "actions": inputs["actions"][:, 0], "pixel_values": pixels}


@pytest.fixture(scope="module")
def alignment(golden_dir: Path) -> MultiLayerAlignment:
    recorded = load_file(golden_dir / "align_loss.rocket.safetensors")
    projectors = MultiLayerAlignment(ALIGN, 64, 64)
    projectors.load_state_dict(beneath(recorded, "weights.align_projectors."))
    return projectors


@pytest.fixture(scope="module")
def teacher(golden_dir: Path) -> VGGTTeacher:
    config, weights = recorded_vggt(golden_dir)
    model = VGGTTeacher(config, ALIGN.teacher_layers)
    model.load_state_dict({key: weights[key] for key in model.state_dict()})
    return model


def student(golden_dir: Path) -> tuple[Any, nn.Linear]:
    weights = golden_dir / "lora_adapter" / "adapter_config.json"
    torch.manual_seed(0)
    return load_lora(load_student(golden_dir), weights.parent, is_trainable=True).eval(), nn.Linear(64, 7)


def losses_of_the_patched_script(
    golden_dir: Path, batch: dict[str, Tensor], alignment: MultiLayerAlignment, teacher: VGGTTeacher
) -> list[tuple[float, ...]]:
    run_forward_pass = injected_forward_pass()
    vla, head = student(golden_dir)
    images = SimpleNamespace(means=[IMAGENET_MEAN, (0.5,) * 3], stds=[IMAGENET_STD, (0.5,) * 3])
    rocket = RocketJoin(alignment, TeacherTargets(teacher, images), num_vision_tokens=32)
    trainable_params = [parameter for parameter in vla.parameters() if parameter.requires_grad]
    trainable_params += [*head.parameters(), *rocket.parameters()]
    optimizer = torch.optim.AdamW(trainable_params, lr=LEARNING_RATE)
    found = []
    for _ in range(STEPS):
        loss, metrics = run_forward_pass(ScriptsPolicy(vla, batch), head, batch, NUM_PREFIX, rocket=rocket)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), metrics["loss_value"], metrics["align_loss"]))
    return found


def losses_of_this_project(
    golden_dir: Path, batch: dict[str, Tensor], alignment: MultiLayerAlignment, teacher: VGGTTeacher
) -> list[tuple[float, ...]]:
    vla, head = student(golden_dir)
    module = TrainableVLA(PolicyParts(vla, head), MeanObjective(), alignment, auxiliary_coeff=ALIGN.coeff).eval()
    optimizer, _ = make_optimizer(module.trainable_parameters(), TrainConfig(learning_rate=LEARNING_RATE))
    targets = teacher(unnormalize_views(batch["pixel_values"]))
    found = []
    for _ in range(STEPS):
        output = module(dict(batch), targets)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(tuple(output.metrics[name].item() for name in ("loss", "action_loss", "align_loss")))
    return found


def test_the_patched_script_and_this_project_give_the_same_losses(
    golden_dir: Path, batch: dict[str, Tensor], alignment: MultiLayerAlignment, teacher: VGGTTeacher
) -> None:
    patched = losses_of_the_patched_script(golden_dir, batch, copy.deepcopy(alignment), teacher)
    own = losses_of_this_project(golden_dir, batch, copy.deepcopy(alignment), teacher)
    for step, (theirs, ours) in enumerate(zip(patched, own, strict=True)):
        assert theirs == pytest.approx(ours, rel=1e-3), step
    totals = [row[0] for row in own]
    assert totals[-1] < totals[0] - 0.01  # They train: five equal numbers would prove nothing.
