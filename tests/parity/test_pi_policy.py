"""pi0 and pi0.5 against LeRobot's, openpi's and transformers' own, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prismatic.models.pi.config import LANGUAGE
from prismatic.models.pi.model import PiPolicy
from prismatic.models.pi.weights import published_name, published_names
from tests.helpers.pi_models import PiRecord

KINDS = ["pi0", "pi05"]


@pytest.fixture(scope="module", params=KINDS)
def record(request: pytest.FixtureRequest, golden_dir: Path) -> PiRecord:
    return PiRecord(golden_dir, request.param)


def states(policy: PiPolicy, stream: str, batch: dict[str, Any]) -> tuple[list[torch.Tensor], torch.Tensor, Any]:
    """Inputs of all blocks and the output of the last, the output of the final norm, and the policy's output."""
    module = getattr(policy, stream)
    inputs: list[torch.Tensor] = []
    last: list[torch.Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in module.layers]
    handles.append(module.layers[-1].register_forward_hook(lambda _, args, out: inputs.append(out[0])))
    handles.append(module.norm.register_forward_hook(lambda _, args, out: last.append(out)))
    output = policy(**batch)
    for handle in handles:
        handle.remove()
    normed = last[0][0] if isinstance(last[0], tuple) else last[0]
    return inputs, normed, output


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.detach() - expected).norm() / expected.norm())


def valid_prefix(record: PiRecord) -> torch.Tensor:
    masks = record.part("inputs")
    images = masks["image_masks"].repeat_interleave(record.facts["tokens_per_image"], dim=1)
    return torch.cat([images, masks["lang_masks"]], dim=1)


def test_states_of_every_block(record: PiRecord) -> None:
    outputs, valid = record.part("outputs"), valid_prefix(record)
    hidden, normed, _ = states(record.policy(), "language_model", record.batch())
    assert len(hidden) == record.sizes["layers"] + 1
    for index, value in enumerate(hidden):
        assert relative(value[valid], outputs[f"prefix_hidden.{index}"][valid]) < 1e-5
    assert relative(normed[valid], outputs["prefix_final_norm"][valid]) < 1e-5
    hidden, normed, _ = states(record.policy(), "expert", record.batch())
    for index, value in enumerate(hidden):
        assert relative(value, outputs[f"expert_hidden.{index}"]) < 1e-4
    assert relative(normed, outputs["expert_final_norm"]) < 1e-4


def test_velocity_and_loss(record: PiRecord) -> None:
    outputs = record.part("outputs")
    with torch.no_grad():
        output = record.policy()(**record.batch())
    torch.testing.assert_close(output.velocity, outputs["velocity"], rtol=0, atol=1e-4)
    torch.testing.assert_close(output.losses, outputs["loss_elementwise"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.losses.mean(), outputs["loss"], rtol=1e-5, atol=0)


def test_samples(record: PiRecord) -> None:
    policy, noise = record.policy(), record.part("inputs")["noise"]
    for steps in record.sizes["steps"]:
        sampled = policy.sample_actions(**record.observation(), num_steps=steps, noise=noise)
        expected = record.part("outputs")[f"sample_{steps}"]
        torch.testing.assert_close(sampled, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(record: PiRecord, checkpointing: bool) -> None:
    policy = record.policy().train()
    policy.gradient_checkpointing_enable(checkpointing)
    policy(**record.batch()).losses.mean().backward()
    gradients = {published_name(name): value.grad for name, value in policy.named_parameters()}
    recorded = record.part("grads")
    assert len(recorded) > 20
    for name, expected in recorded.items():
        assert relative(gradients[name], expected) < 1e-3, name
    norms = record.facts["gradient_norm_and_sum"]
    for published, name in published_names(norms).items():
        if not published.endswith("k_proj.bias"):  # whose true gradient is zero
            gradient = gradients[published]
            norm = 0.0 if gradient is None else float(gradient.norm())
            assert norm == pytest.approx(norms[name][0], rel=1e-3), published


def test_parameters_without_gradient_are_the_recorded_ones(record: PiRecord) -> None:
    policy = record.policy()
    policy(**record.batch()).losses.mean().backward()
    idle = {published_name(name) for name, value in policy.named_parameters() if value.grad is None}
    expected = {name for name in record.facts["no_gradient_from_action_loss"] if "." in name and "hidden" not in name}
    # The references compute the last block's queries too, whose gradient is zero.
    query = f"{LANGUAGE}layers.{record.sizes['layers'] - 1}.self_attn.q_proj.weight"
    assert idle == expected | {query}


def test_returned_states_are_the_inputs_of_the_blocks_and_the_final_norm(record: PiRecord) -> None:
    policy = record.policy()
    hidden, normed, _ = states(policy, "language_model", record.batch())
    policy.output_hidden_states = True
    returned = policy(**record.batch()).hidden_states
    assert len(returned) == record.sizes["layers"] + 1
    assert all(torch.equal(*pair) for pair in zip(returned, [*hidden[:-1], normed]))
