"""What the injected lines of an OpenVLA-OFT script call gives the reference's losses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from patches.rocket_join import RocketJoin
from rocket_align.alignment import cosine_loss
from rocket_align.flags import AlignFlags
from rocket_align.teacher.preprocess import IMAGENET_MEAN, IMAGENET_STD
from rocket_align.teacher.vggt.config import save_folder
from tests.helpers.student_helpers import beneath
from tests.helpers.teacher_models import recorded_vggt

RELEASED_SINGLE = {"vla_layers_align": "3", "vggt_layers_align": "-1", "use_matryoshka": True}
CASES: dict[str, dict[str, Any]] = {
    "rocket": {},
    "rocket_no_shift": {"gain_feat_1move": False},
    "rocket_random_pooling": {"pooling_func": "random"},
    "rocket_ensemble2": {"ensemble_size": 2},
    "rocket_reversed_nonorm_nope_coeff0.25": {
        "align_loss_coeff": 0.25,
        "projector_shallow_to_deep_increase": False,
        "use_vlm_norm": False,
        "use_vggt_pe": False,
    },
    "shared_full_width": {"recipe": "shared"},
    "naive_multi_layer": {"recipe": "naive", "use_matryoshka": True},
    "spatial_forcing": {"recipe": "spatial_forcing", **RELEASED_SINGLE},
}


@dataclass
class ScriptConfig(AlignFlags):
    """What the injection reads of the script's own flags."""

    vla_path: str = ""
    resume: bool = False
    resume_step: int | None = None


class Policy(nn.Module):
    """The attributes of the policy that the injection reads, with the sizes of the recorded one."""

    def __init__(self) -> None:
        super().__init__()
        self.llm_dim = 64
        self.config = SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=4))
        self.vision_backbone = SimpleNamespace(get_num_patches=lambda: 16, get_num_images_in_input=lambda: 2)
        self.weight = nn.Parameter(torch.zeros(1))


IMAGES = SimpleNamespace(means=[IMAGENET_MEAN, (0.5,) * 3], stds=[IMAGENET_STD, (0.5,) * 3])
PROCESSOR = SimpleNamespace(image_processor=IMAGES)


@pytest.fixture(scope="module")
def teacher_path(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded teacher as a folder."""
    folder = tmp_path_factory.mktemp("teacher")
    save_folder(folder, *recorded_vggt(golden_dir))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(golden_dir: Path, teacher_path: Path, tmp_path: Path, case: str) -> None:
    description = json.loads((golden_dir / f"align_loss.{case}.json").read_text())
    recorded = load_file(golden_dir / f"align_loss.{case}.safetensors")
    projectors = beneath(recorded, "weights.align_projectors.").items()
    torch.save({f"module.{key}": value for key, value in projectors}, tmp_path / "align_projectors--7_checkpoint.pt")
    flags = {"recipe": "rocket", "vla_layers_align": "1,2,3", "vggt_layers_align": "1,2,3", **CASES[case]}
    config = ScriptConfig(vggt_path=str(teacher_path), vla_path=str(tmp_path), resume=True, resume_step=7, **flags)
    join = RocketJoin.build(config, Policy(), PROCESSOR)

    features = load_file(golden_dir / "align_inputs_features.safetensors")
    states = tuple(features[f"lora.hidden_states.{layer}"] for layer in range(5))
    pixels = load_file(golden_dir / "forward_l1_discrete.safetensors")["pixel_values"]
    expected = description["metrics"]
    action_loss = torch.tensor(expected["loss_value"], requires_grad=True)
    torch.manual_seed(description["torch_manual_seed_before_forward"])
    total, metrics = join.add_loss(action_loss, {"loss_value": expected["loss_value"]}, states, pixels)
    total.backward()

    assert total.item() == pytest.approx(expected["total_loss"], abs=1e-5)
    assert metrics["total_loss"] == pytest.approx(expected["total_loss"], abs=1e-5)
    assert metrics["align_loss"] == pytest.approx(expected["align_loss"], abs=1e-5)
    assert metrics["loss_value"] == expected["loss_value"]
    for pair in range(join.config.num_pairs):
        assert metrics[f"align_loss_pair_{pair}"] == pytest.approx(expected[f"align_loss_layer_{pair}_avg"], abs=1e-5)
    assert action_loss.grad is not None and action_loss.grad.item() == 1
    for name, parameter in join.alignment.named_parameters():
        torch.testing.assert_close(parameter.grad, recorded[f"grad.align_projectors.{name}"], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("layers", ["3,1,2", "2,2,2"])
def test_teacher_layers_in_any_order_and_repeated(golden_dir: Path, teacher_path: Path, layers: str) -> None:
    """Each pair's loss is that of its projector on its own teacher layer, as recorded."""
    config = ScriptConfig(vggt_path=str(teacher_path), vla_layers_align="1,2,3", vggt_layers_align=layers)
    join = RocketJoin.build(config, Policy(), PROCESSOR)
    features = load_file(golden_dir / "align_inputs_features.safetensors")
    states = tuple(features[f"lora.hidden_states.{layer}"] for layer in range(5))
    pixels = load_file(golden_dir / "forward_l1_discrete.safetensors")["pixel_values"]
    _, metrics = join.add_loss(torch.zeros(()), {}, states, pixels)
    tokens = join.alignment.student_tokens(states, 1, 32)
    for pair, layer in enumerate(map(int, layers.split(","))):
        pooled = features[f"pair{layer - 1}.pooled_pe1"]  # Pair i was recorded with layer i + 1.
        expected = cosine_loss(join.alignment.project_pair(tokens[pair], pair), pooled)
        assert metrics[f"align_loss_pair_{pair}"] == pytest.approx(expected.item(), abs=1e-5)


def test_without_alignment_nothing_changes(tmp_path: Path) -> None:
    join = RocketJoin.build(ScriptConfig(), Policy(), PROCESSOR)
    loss, metrics = torch.ones(()), {"loss_value": 1.0}
    states = tuple(torch.zeros(1, 40, 64) for _ in range(5))
    total, found = join.add_loss(loss, metrics, states, torch.zeros(1, 12, 56, 56))
    assert total is loss and found == {"loss_value": 1.0}
    assert join.parameters() == []
    join.save(tmp_path / "align_projectors--1_checkpoint.pt")
    assert not list(tmp_path.iterdir())


def test_projectors_that_do_not_fit_are_refused(
    teacher_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "align_projectors--7_checkpoint.pt"
    torch.save({"0.0.fc1.weight": torch.zeros(2, 2)}, path)
    config = ScriptConfig(vggt_path=str(teacher_path), vla_path=str(tmp_path), resume=True, resume_step=7)
    with pytest.raises(SystemExit) as ended:
        RocketJoin.build(config, Policy(), PROCESSOR)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and f"{path}: does not fit" in message and message.count("\n") == 1
