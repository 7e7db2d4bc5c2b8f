"""The fine-tuning script on tiny pi0 and pi0.5 policies: it trains, saves, resumes exactly; nothing dead trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from experiments.join import FinetuneConfig, Targets, build_alignment, plan_alignment
from prismatic.models.pi.model import PiPolicy
from prismatic.training.metrics import read_log
from prismatic.training.run import TrainingRun
from prismatic.util.errors import UsageError
from rocket_align.alignment import MultiLayerAlignment
from tests.helpers.tiny_pi import write_tiny_pi


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def pi_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pi(tmp_path_factory.mktemp(request.param) / request.param, request.param)


def start(folder: Path, data: Path, out: Path, **flags: Any) -> tuple[TrainingRun, MultiLayerAlignment, Targets]:
    """A run as the script builds it, with its alignment."""
    AcceleratorState._reset_state(reset_partial_state=True)
    defaults: dict[str, Any] = {"num_images_in_input": 2, "batch_size": 2, "num_workers": 0, "lora_rank": 4}
    defaults |= {"mixed_precision": "no", "trackers": "none", "data_root_dir": data, "run_root_dir": out / "runs"}
    config = FinetuneConfig(vla_path=str(folder), **{**defaults, **flags})
    config.validate()
    align, teacher_dim = plan_alignment(config)
    training = TrainingRun(config, asdict(config), align.student_layers)
    return training, *build_alignment(training, align, teacher_dim)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that trained, adapters or whole model, and the projectors."""
    files = [checkpoint / "lora_adapter" / "adapter_model.safetensors", checkpoint / "model.safetensors"]
    state = load_file(next(file for file in files if file.is_file()))
    for file in checkpoint.glob("align_projectors--*"):
        state |= torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    lora: bool, pi_folder: Path, finetune: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"vla_path": str(pi_folder), "vggt_path": str(teacher_folder), "use_lora": lora}
    flags |= {"merge_lora_during_training": False, "max_steps": 3, "gradient_checkpointing": lora}
    straight = finetune(run_root_dir=tmp_path / "a", save_freq=2, **flags)
    halfway = tmp_path / "a" / "run--2_chkpt"
    resumed = finetune(run_root_dir=tmp_path / "b", **{**flags, "vla_path": str(halfway)}, resume=True)
    before, expected, actual = (weights(f) for f in (halfway, straight / "run--3_chkpt", resumed / "run--3_chkpt"))
    assert expected.keys() == actual.keys()
    assert not [name for name in expected if not torch.equal(expected[name], actual[name])]
    rows = read_log(straight / "run" / "metrics.jsonl")
    assert all(0 < row["align_loss"] < 2 and row["action_loss"] > 0 for row in rows)
    changed = [name for name in expected if not torch.equal(before[name], expected[name])]
    unchanged = [name for name in expected if name not in changed]
    assert changed and not [name for name in unchanged if "lora" in name or "action" in name]


@pytest.mark.parametrize("recipe", ["baseline", "rocket", "spatial_forcing"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_every_parameter_that_trains_gets_a_gradient(
    lora: bool, recipe: str, pi_folder: Path, teacher_folder: Path, rlds_root: Path, tmp_path: Path
) -> None:
    """DDP therefore need not look for unused ones."""
    flags: dict[str, Any] = {"recipe": recipe} | ({} if recipe == "baseline" else {"vggt_path": str(teacher_folder)})
    training, alignment, targets = start(pi_folder, rlds_root, tmp_path, use_lora=lora, use_proprio=True, **flags)
    module = training.make_module(alignment, 0.5)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.01)
    batch = next(training.batches())
    module(batch, targets(batch)).loss.backward()
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    # A text embedding gets zeros where its word is absent; k_proj's bias in the tower has no effect.
    assert not [name for name, p in trained.items() if not p.grad.any() and "k_proj.bias" not in name]
    final = any("language_model.layers.3.mlp" in name for name in trained)
    assert final == (recipe == "rocket") and not training.family.unused_parameters


def test_the_action_loss_is_that_of_the_policy_alone(
    pi_folder: Path, teacher_folder: Path, rlds_root: Path, tmp_path: Path
) -> None:
    """Alignment does not touch the flow-matching loss, whose noise and time come with the sample."""
    training, alignment, targets = start(pi_folder, rlds_root, tmp_path, vggt_path=str(teacher_folder), use_lora=False)
    batch = next(training.batches())
    output = training.make_module(alignment, 0.5)(batch, targets(batch))
    policy = PiPolicy.from_pretrained(pi_folder)
    alone = policy(
        batch["pixel_values"].unflatten(1, (2, 3)), batch["image_masks"], batch["input_ids"], batch["attention_mask"],
        batch["proprio"], batch["actions"], noise=batch["noise"], time=batch["time"],
    )  # fmt: skip
    torch.testing.assert_close(output.metrics["action_loss"], alone.losses.mean().detach())
    again = next(training.batches())
    assert torch.equal(batch["noise"], again["noise"]) and torch.equal(batch["time"], again["time"])
    assert batch["time"].min() >= 0.001 and batch["time"].max() <= 1 and batch["noise"].shape == (2, 4, 8)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"use_diffusion": True, "use_l1_regression": False}, "--use_diffusion: True found; accepted for pi"),
        ({"use_film": True}, "--use_film: True found"),
        ({"policy": "openvla"}, r"--policy: openvla found, but .*config.json is a pi"),
        ({"platform": "aloha"}, "--platform: aloha has actions of 14 numbers; accepted: up to 8"),
        ({"gain_feat_1move": True}, "--gain_feat_1move: True found"),
        ({"vla_layers_align": "2,5", "vggt_layers_align": "1,2"}, "--vla_layers_align"),
        ({"use_lora": False, "lora_expert_rank": 4}, "--lora_expert_rank: 4 found; accepted with --use_lora False: 0"),
    ],
)
def test_wrong_flags_are_refused_before_weights_are_loaded(
    flags: dict[str, Any],
    words: str,
    pi_folder: Path,
    finetune: Callable[..., Path],
    teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PiPolicy, "from_pretrained", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=words):
        finetune(vla_path=str(pi_folder), vggt_path=str(teacher_folder), **flags)
