"""What of pi0 and pi0.5 trains: adapters on live layers, heads in full, nothing that no gradient reaches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prismatic.models.pi.model import PiPolicy
from prismatic.models.pi.trainable import dead_parameters, fully_trained, lora_targets
from tests.helpers.pi_models import PiRecord


@pytest.fixture(params=["pi0", "pi05"])
def record(request: pytest.FixtureRequest, golden_dir: Path) -> PiRecord:
    return PiRecord(golden_dir, request.param)


def idle(module: torch.nn.Module) -> list[str]:
    return [name for name, value in module.named_parameters() if value.requires_grad and value.grad is None]


@pytest.mark.parametrize("tap", ["nothing", "last block", "final norm"])
def test_dead_parameters_are_those_without_a_gradient(record: PiRecord, tap: str) -> None:
    policy = record.policy()
    heard: list[torch.Tensor] = []
    if tap == "last block":
        policy.language_model.layers[-1].register_forward_hook(lambda _, args, out: heard.append(out[0]))
    elif tap == "final norm":
        policy.language_model.norm.register_forward_hook(lambda _, args, out: heard.append(out))
    loss = policy(**record.batch()).losses.mean()
    sum((state.square().mean() for state in heard), loss).backward()
    uses = {"uses_last_block": tap == "last block", "uses_final_norm": tap == "final norm"}
    assert idle(policy) == dead_parameters(policy, **uses)


def test_adapters_all_learn_and_heads_train_in_full(record: PiRecord) -> None:
    policy = record.policy().train()
    targets = lora_targets(policy)
    blocks = record.sizes["layers"]
    assert len(targets) == 2 * 7 * blocks - 5
    adapted = get_peft_model(policy, LoraConfig(r=2, target_modules=targets, modules_to_save=fully_trained(policy)))
    adapted(**record.batch()).losses.mean().backward()
    assert not idle(adapted)
    names = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert sum(".lora_A." in name for name in names) == len(targets)
    heads = {name.split(".modules_to_save.")[0].rpartition(".")[2] for name in names if ".modules_to_save." in name}
    time = "time_mlp" if record.kind == "pi05" else "action_time_mlp"
    state = set() if record.kind == "pi05" else {"state_proj"}
    layers = {f"{time}_in", f"{time}_out", "action_in_proj", "action_out_proj", *state}
    assert heads == {"vision_tower", "multi_modal_projector", *layers}


def test_a_missing_camera_may_be_left_out(record: PiRecord) -> None:
    """Cameras that no sample has change nothing: they take no position, and nobody looks at them."""
    policy, batch = record.policy(), record.batch()
    mask = batch["image_masks"]
    assert mask is not None and batch["pixel_values"] is not None
    camera, rows = next((c, (~mask[:, c]).nonzero()[:, 0]) for c in range(mask.shape[1]) if not mask[:, c].all())
    batch = {name: None if value is None else value[rows] for name, value in batch.items()}
    kept = [index for index in range(mask.shape[1]) if index != camera]
    fewer = batch | {name: batch[name][:, kept] for name in ("pixel_values", "image_masks")}  # type: ignore[index]
    with torch.no_grad():
        torch.testing.assert_close(policy(**fewer).velocity, policy(**batch).velocity, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_fire_once_a_training_forward(record: PiRecord, checkpointing: bool) -> None:
    policy: PiPolicy = record.policy().train()
    policy.gradient_checkpointing_enable(checkpointing)
    assert policy.gradient_checkpointing == checkpointing
    calls: list[str] = []
    for name, module in policy.named_modules():
        if (name.startswith("language_model.layers.") and name.count(".") == 2) or name == "language_model.norm":
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    policy(**record.batch()).losses.mean().backward()
    blocks = [f"language_model.layers.{index}" for index in range(record.sizes["layers"])]
    assert calls == [*blocks, "language_model.norm"]
