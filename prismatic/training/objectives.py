"""Objectives of the actions: L1 regression, diffusion or discrete tokens. Each objective turns one forward pass of the
policy into a loss and metrics; none of them synchronizes with the host.

Upstream behavior: `run_forward_pass` of OpenVLA-OFT's fine-tuning script. "Current" is the first action of a chunk,
"next" are the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypedDict

import torch.nn.functional as F
from torch import Tensor, nn

from prismatic.checkpoint.load import PolicyParts
from prismatic.vla.action_tokenizer import (
    ActionTokenizer,
    get_all_actions_mask,
    get_current_action_mask,
    get_next_actions_mask,
)
from prismatic.vla.batch import Batch
from prismatic.vla.platforms import Platform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prismatic.training.config import TrainConfig


class ModelInputs(TypedDict, total=False):
    """Arguments of the policy's forward pass that an objective adds to the batch's."""

    noisy_actions: Tensor
    noisy_action_projector: nn.Module | None
    diffusion_timestep_embeddings: Tensor


class PolicyOutput(Protocol):
    """The policy's output in training: hidden states always, loss and logits for an objective that needs them."""

    hidden_states: tuple[Tensor, ...]
    logits: Tensor
    loss: Tensor


Run = Callable[[ModelInputs], PolicyOutput]
LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


class Objective(Protocol):
    """An action loss: what the model needs beside the batch, and the loss read off its output."""

    needs_logits: bool

    def model_inputs(self, parts: PolicyParts, batch: Batch) -> ModelInputs: ...

    def loss(self, parts: PolicyParts, batch: Batch, output: PolicyOutput) -> LossAndMetrics: ...


def action_hidden_states(hidden_BSD: Tensor, labels_BS: Tensor, platform: Platform, num_prefix: int) -> Tensor:
    """Last hidden states at the action tokens, [B, T * A, D].

    Args:
        hidden_BSD: last hidden state over [BOS, `num_prefix` vision (and proprio, time) tokens, text, actions, stop].
        labels_BS: labels of the text tokens alone; positions are shifted by one as in next-token prediction.
    """
    text_BSD = hidden_BSD[:, num_prefix:-1]
    mask = get_all_actions_mask(labels_BS[:, 1:], platform.action_dim)
    # Every row has as many action tokens; indexing with the mask would wait for the device to count them.
    places = mask.int().argsort(dim=1, descending=True, stable=True)[:, : platform.num_action_tokens]
    return text_BSD.gather(1, places[..., None].expand(-1, -1, text_BSD.shape[-1]))


def chunk_l1_metrics(predicted_BTA: Tensor, actions_BTA: Tensor) -> dict[str, Tensor]:
    """Mean absolute error of the current action and of the next ones, on normalized actions."""
    error = (predicted_BTA.detach().float() - actions_BTA.float()).abs()
    return {"curr_action_l1_loss": error[:, 0].mean(), "next_actions_l1_loss": error[:, 1:].mean()}


def _num_prefix(batch: Batch, output: PolicyOutput) -> int:
    """Tokens between BOS and the text: the sequence the LLM saw minus the text the caller gave."""
    return output.hidden_states[-1].shape[1] - batch["input_ids"].shape[1]


def _states_of_actions(batch: Batch, output: PolicyOutput, platform: Platform) -> Tensor:
    return action_hidden_states(output.hidden_states[-1], batch["labels"], platform, _num_prefix(batch, output))


@dataclass
class L1Objective:
    """Mean absolute error between the head's chunk and the demonstrated one, both normalized."""

    platform: Platform
    needs_logits: bool = False

    def model_inputs(self, parts: PolicyParts, batch: Batch) -> ModelInputs:
        return {}

    def loss(self, parts: PolicyParts, batch: Batch, output: PolicyOutput) -> LossAndMetrics:
        assert parts.action_head is not None
        actions = batch["actions"].float()
        predicted = parts.action_head.predict_action(_states_of_actions(batch, output, self.platform)).float()
        return F.l1_loss(predicted, actions), chunk_l1_metrics(predicted, actions)


@dataclass
class DiffusionObjective:
    """Mean squared error between the noise put into the actions and the head's estimate of it."""

    platform: Platform
    needs_logits: bool = False

    def model_inputs(self, parts: PolicyParts, batch: Batch) -> ModelInputs:
        assert parts.action_head is not None
        noisy = parts.action_head.sample_noisy_actions(batch["actions"])
        batch["diffusion_noise"] = noisy["noise"]
        return {
            "noisy_actions": noisy["noisy_actions"],
            "noisy_action_projector": parts.noisy_action_projector,
            "diffusion_timestep_embeddings": noisy["diffusion_timestep_embeddings"],
        }

    def loss(self, parts: PolicyParts, batch: Batch, output: PolicyOutput) -> LossAndMetrics:
        assert parts.action_head is not None
        hidden = _states_of_actions(batch, output, self.platform)
        predicted = parts.action_head.predict_noise(hidden).reshape(batch["diffusion_noise"].shape)
        return F.mse_loss(predicted.float(), batch["diffusion_noise"].float()), {}

    def sample(self, parts: PolicyParts, batch: Batch, run: Run, noise_BTA: Tensor) -> Tensor:
        """Normalized actions (B, T, A) by all the steps of reverse diffusion from `noise_BTA`, as the policy acts.

        `run` is the policy's forward pass with the given inputs beside the batch.
        """
        head, actions_BTA = parts.action_head, noise_BTA
        head.noise_scheduler.set_timesteps(head.num_diffusion_steps_train)
        for timestep in head.noise_scheduler.timesteps:
            steps = timestep.to(actions_BTA.device).expand(len(actions_BTA))
            inputs: ModelInputs = {
                "noisy_actions": actions_BTA,
                "noisy_action_projector": parts.noisy_action_projector,
                "diffusion_timestep_embeddings": head.embed_timesteps(steps, actions_BTA.dtype),
            }
            output = run(inputs)
            hidden = _states_of_actions(batch, output, self.platform)
            noise = head.predict_noise(hidden).to(actions_BTA.dtype)
            actions_BTA = head.remove_noise(noise, timestep, actions_BTA)
        return actions_BTA


@dataclass
class DiscreteObjective:
    """Cross-entropy of the action tokens (and the stop token), computed by the language model head."""

    platform: Platform
    action_tokenizer: ActionTokenizer
    needs_logits: bool = True

    def model_inputs(self, parts: PolicyParts, batch: Batch) -> ModelInputs:
        return {}

    def loss(self, parts: PolicyParts, batch: Batch, output: PolicyOutput) -> LossAndMetrics:
        prefix = _num_prefix(batch, output)
        predicted = output.logits[:, prefix:-1].argmax(dim=-1)
        truth = batch["labels"][:, 1:]
        centers, vocabulary = self.action_tokenizer.bin_centers, self.action_tokenizer.tokenizer.vocab_size
        bins = [(vocabulary - ids - 1).clamp(0, len(centers) - 1) for ids in (predicted, truth)]
        # Centers are evenly spaced, so their distance needs no table on the device.
        distance = (bins[0] - bins[1]).abs() * float(centers[1] - centers[0])
        metrics = {}
        for name, mask_of in (("curr_action", get_current_action_mask), ("next_actions", get_next_actions_mask)):
            mask = mask_of(truth, self.platform.action_dim)
            count = mask.sum().clamp(min=1)
            metrics[f"{name}_accuracy"] = ((predicted == truth) & mask).sum() / count
            metrics[f"{name}_l1_loss"] = (distance * mask).sum() / count
        return output.loss, metrics


def make_objective(config: TrainConfig, platform: Platform, tokenizer: PreTrainedTokenizerBase) -> Objective:
    """The action loss the flags ask for."""
    if config.objective == "l1":
        return L1Objective(platform)
    if config.objective == "diffusion":
        return DiffusionObjective(platform)
    return DiscreteObjective(platform, ActionTokenizer(tokenizer))
