"""Training that begins from a fine-tuned policy with another head, robot or adapter rank; acting takes no such file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prismatic.checkpoint.folder import StartingPoint
from prismatic.checkpoint.load import PolicyParts, build_parts, load_component, make_head, prepare_for_training
from prismatic.training.config import TrainConfig
from prismatic.util.errors import UsageError
from prismatic.vla.platforms import ALOHA, LIBERO, Platform
from tests.helpers.student_helpers import tiny_batch, tiny_student


def parts(config: TrainConfig, folder: Path, platform: Platform = LIBERO, report: Any = print) -> PolicyParts:
    vla: Any = prepare_for_training(tiny_student(num_images=1), config, platform)
    return build_parts(config, StartingPoint("", folder, 0), vla, platform, report)


@pytest.fixture
def l1_policy(tmp_path: Path) -> Path:
    """The files of an L1 policy of LIBERO with proprio."""
    torch.manual_seed(1)
    for name, module in parts(TrainConfig(use_proprio=True, lora_rank=2), tmp_path).heads.items():
        torch.save(module.state_dict(), tmp_path / f"{name}--5_checkpoint.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "platform", "anew"),
    [
        ({"use_l1_regression": False, "use_diffusion": True}, LIBERO, ["action_head"]),
        ({}, ALOHA, ["action_head", "proprio_projector"]),
        ({}, LIBERO, []),
    ],
    ids=["diffusion", "aloha", "the same"],
)
def test_what_does_not_fit_begins_anew_and_says_so(
    flags: dict[str, Any], platform: Platform, anew: list[str], l1_policy: Path
) -> None:
    lines: list[str] = []
    config = TrainConfig(**{"use_proprio": True, "lora_rank": 2, **flags})
    loaded = parts(config, l1_policy, platform, lines.append)
    assert [line.split(" begins anew: ")[0] for line in lines] == anew
    for name, module in loaded.heads.items():
        file = l1_policy / f"{name}--5_checkpoint.pt"
        if file.is_file() and name not in anew:
            for key, value in torch.load(file).items():
                assert torch.equal(module.state_dict()[key], value)


def test_a_resume_and_acting_refuse_it_in_one_line(l1_policy: Path) -> None:
    file = l1_policy / "action_head--5_checkpoint.pt"
    config = TrainConfig(resume=True, use_l1_regression=False, use_diffusion=True, lora_rank=2)
    wanted = r"does not fit the model: .*; accepted: a file of the same kind and width"
    with pytest.raises(UsageError, match=wanted):
        parts(config, l1_policy)
    with pytest.raises(UsageError, match=wanted) as refusal:
        load_component(make_head("action_head", config, 16, action_dim=7, proprio_dim=8), file)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("flags", [{"lora_rank": 3}, {"use_lora": False}], ids=["another rank", "no adapters"])
def test_a_film_backbone_of_another_rank_keeps_what_it_learned(flags: dict[str, Any], tmp_path: Path) -> None:
    trained: Any = prepare_for_training(tiny_student(), TrainConfig(use_film=True, lora_rank=2), LIBERO)
    for name, weight in trained.vision_backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    torch.save(trained.vision_backbone.state_dict(), tmp_path / "vision_backbone--5_checkpoint.pt")
    new = parts(TrainConfig(use_film=True, **flags), tmp_path).vla
    pixels = tiny_batch(tiny_student(), (4,))["pixel_values"]
    language = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    expected, fresh = (
        model.eval().vision_backbone(pixels, language)
        for model in (trained, prepare_for_training(tiny_student(), TrainConfig(use_film=True), LIBERO))
    )
    torch.testing.assert_close(new.eval().vision_backbone(pixels, language), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(fresh, expected, atol=1e-2)


def test_a_backbone_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"vision_backbone.other": torch.zeros(2)}, tmp_path / "vision_backbone--5_checkpoint.pt")
    with pytest.raises(UsageError, match=r"vision_backbone--5_checkpoint.pt: does not fit the model"):
        parts(TrainConfig(use_film=True, lora_rank=2), tmp_path)
