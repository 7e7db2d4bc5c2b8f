"""The one module that training wraps: policy, heads and auxiliary loss together.

Everything that has a trainable parameter is called inside `forward`, so that DDP sees every gradient; upstream calls
the heads through `.module`, which leaves their gradients unsynchronized across processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from prismatic.training.objectives import (
    DiffusionObjective,
    ModelInputs,
    Objective,
    PolicyOutput,
    PolicyParts,
    chunk_l1_metrics,
)
from prismatic.vla.batch import Batch

ResultT = TypeVar("ResultT")


@dataclass
class StepOutput:
    """`loss` is what to differentiate; `metrics` are detached scalars that still live on the device."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


# Weight of the auxiliary loss, or a function of the step that gives it.
Coefficient: TypeAlias = float | Callable[[int], float]


class TrainablePolicy(nn.Module):
    """Policy, heads and auxiliary loss behind one `forward(batch, targets) -> StepOutput`, a family's own.

    Args:
        parts: the model and its heads.
        auxiliary: a loss on the LLM's hidden states at the vision tokens: called with `hidden_states`, `vision_start`,
            `num_vision_tokens` and `teacher` (what `targets` made of the batch), it returns an object with `loss` and,
            detached, `per_pair`. One without terms (a baseline) costs nothing.
        auxiliary_coeff: its weight in the total loss, or a function that gives it for `step`; where it is 0, the
            auxiliary loss is left out.

    Attributes:
        last_state_of_text: the auxiliary loss does not read the LLM's last state, so rows of it may be left out.
    """

    last_state_of_text = False

    def __init__(self, parts: PolicyParts, auxiliary: nn.Module, auxiliary_coeff: Coefficient) -> None:
        super().__init__()
        self.vla: Any = parts.vla
        self.action_head = parts.action_head
        self.proprio_projector = parts.proprio_projector
        self.noisy_action_projector = parts.noisy_action_projector
        self.align_projectors = auxiliary
        self._coefficient = auxiliary_coeff
        self.step = 0  # Finished optimizer steps, which the training loop counts.

    @property
    def auxiliary_coeff(self) -> float:
        """Weight of the auxiliary loss now."""
        return self._coefficient(self.step) if callable(self._coefficient) else self._coefficient

    @property
    def uses_targets(self) -> bool:
        """False where the function gives 0: the auxiliary loss and its targets are left out."""
        return not callable(self._coefficient) or self.auxiliary_coeff > 0

    @property
    def parts(self) -> PolicyParts:
        """The policy's modules, without the auxiliary loss."""
        return PolicyParts(self.vla, self.action_head, self.proprio_projector, self.noisy_action_projector)

    def add_auxiliary(self, action_loss: Tensor, metrics: dict[str, Tensor], **shown: Any) -> StepOutput:
        """Total loss = action loss + coefficient * auxiliary loss, which is called with `shown`."""
        total, coefficient = action_loss, self.auxiliary_coeff
        if self.uses_targets:
            aligned = self.align_projectors(**shown)
            total = action_loss + coefficient * aligned.loss
            if len(aligned.per_pair):
                metrics["align_loss"] = aligned.loss.detach()
                metrics |= {f"align_loss_pair_{index}": value for index, value in enumerate(aligned.per_pair)}
        metrics |= {"action_loss": action_loss.detach(), "loss": total.detach()}
        return StepOutput(total, metrics)

    def sampled_errors(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """L1 errors of whole action chunks sampled from noise of that seed; nothing for policies that do not sample."""
        return {}

    def run_whole(self, work: Callable[[], ResultT]) -> ResultT:
        """Return what `work` does, which uses the policy otherwise than by `forward`; call on every process.

        Sharding takes this method for a forward pass, and gathers for it what is outside of the blocks.
        """
        return work()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Everything the optimizer updates."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


class TrainableVLA(TrainablePolicy):
    """OpenVLA with its heads.

    Args:
        parts, auxiliary, auxiliary_coeff: see :class:`TrainablePolicy`.
        objective: the action loss.
        use_film: the model conditions its vision on language.
    """

    def __init__(
        self,
        parts: PolicyParts,
        objective: Objective,
        auxiliary: nn.Module,
        *,
        auxiliary_coeff: Coefficient,
        use_film: bool = False,
    ) -> None:
        super().__init__(parts, auxiliary, auxiliary_coeff)
        self.objective = objective
        self.use_film = use_film

    def forward(self, batch: Batch, targets: object) -> StepOutput:
        """The objective's loss with the auxiliary one.

        Args:
            batch: see :mod:`prismatic.vla.batch`.
            targets: the teacher's features of the same images, or None for an auxiliary loss without terms.
        """
        parts = self.parts
        output = self._run(batch, self.objective.model_inputs(parts, batch))
        action_loss, metrics = self.objective.loss(parts, batch, output)
        return self.add_auxiliary(
            action_loss,
            metrics,
            hidden_states=output.hidden_states,
            vision_start=1,
            num_vision_tokens=self._num_vision_tokens(),
            teacher=targets,
        )

    def _run(self, batch: Batch, inputs: ModelInputs) -> PolicyOutput:
        """The policy's forward pass on a batch, with the inputs that the objective adds."""
        return self.vla(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
            labels=batch["labels"],
            proprio=batch.get("proprio") if self.proprio_projector is not None else None,
            proprio_projector=self.proprio_projector,
            use_film=self.use_film,
            output_hidden_states=True,
            compute_logits=self.objective.needs_logits,
            last_state_of_text=self.last_state_of_text,
            **inputs,
        )

    @torch.no_grad()
    def sampled_errors(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """L1 errors of action chunks sampled by diffusion from noise of that seed; nothing for other objectives.

        Call it in evaluation mode and within the run's autocast. It takes one forward pass per diffusion step.
        """
        if not isinstance(self.objective, DiffusionObjective):
            return {}
        actions = batch["actions"]
        noise = torch.randn(actions.shape, generator=torch.Generator().manual_seed(seed)).to(actions)
        sampled = self.objective.sample(self.parts, batch, lambda inputs: self._run(batch, inputs), noise)
        return chunk_l1_metrics(sampled, actions)

    def _num_vision_tokens(self) -> int:
        backbone = self.vla.vision_backbone
        return backbone.get_num_patches() * backbone.get_num_images_in_input()


def count_parameters(module: nn.Module | None) -> tuple[int, int]:
    """(trainable, all) parameters of `module`."""
    if module is None:
        return 0, 0
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch, nested ones too, to `device` without waiting; deferred images are made there."""

    def moved(value: object) -> object:
        if isinstance(value, dict):
            return {key: moved(entry) for key, entry in value.items()}
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    result: Any = moved(batch)
    if "deferred" in result:
        result["pixel_values"] = result.pop("deferred").render(device)
    return cast("Batch", result)
