"""Joins `rocket_align` to OpenVLA-OFT's fine-tuning script; `python -m patches apply` copies it beside that script.

It knows of the script only what the injected lines hand over: the configuration, the policy in its DDP wrapper, the
processor, the hidden states and the pixels of a batch. Needs torch 2.2 or later.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rocket_align.alignment import MultiLayerAlignment
from rocket_align.centering import CenterMeter, task_keys
from rocket_align.flags import AlignFlags
from rocket_align.targets import TeacherTargets
from rocket_align.teacher.base import TeacherFeatures
from rocket_align.teacher.files import replacing
from rocket_align.teacher.registry import describe_teacher, load_teacher

COMPONENT = "align_projectors"
_CENTER_SAMPLES = 1024  # This script does not know how many samples there are.


def _refuse(error: ValueError) -> NoReturn:
    """End the process as this project's command lines do: one line, exit code 2."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from error


def check_flags(config: AlignFlags) -> None:
    """Refuse wrong flags, or a teacher that is not there, before anything large is loaded.

    Raises SystemExit: code 2, after one line on standard error.
    """
    try:
        config.validate_alignment()
        if config.aligns:
            if config.feature_store:
                raise ValueError("--feature_store: given; accepted in this script: none (its loader cannot read one)")
            describe_teacher(config.teacher, config.teacher_type)
    except ValueError as error:
        _refuse(error)


class RocketJoin:
    """The alignment of one training run. Without alignment (the baseline) every method does nothing.

    Args:
        alignment: the projectors, on the policy's device. Wrapped in DDP here when several processes train, and called
            through that wrapper, so that their gradients are averaged.
        targets: makes features of `alignment.config.teacher_layers` of pixels; None when there is no pair.
        num_vision_tokens: tokens of all images in the policy's sequence.
        flags: the script's configuration: samples of the targets' means, gradient accumulation, the step it resumes at.
    """

    def __init__(
        self,
        alignment: MultiLayerAlignment,
        targets: TeacherTargets | None,
        *,
        num_vision_tokens: int,
        flags: Any = None,
    ) -> None:
        self.center_samples = getattr(flags, "align_center_samples", 0) or _CENTER_SAMPLES
        self._micro_steps = getattr(flags, "grad_accumulation_steps", 1)
        resumed = flags is not None and getattr(flags, "resume", False)
        self._passes = self._micro_steps * int((getattr(flags, "resume_step", 0) or 0) if resumed else 0)
        self._meter = CenterMeter(by_task=alignment.config.center == "task")
        self.alignment = alignment
        self.config = alignment.config
        self.targets = targets
        self.num_vision_tokens = num_vision_tokens
        self.wrapped: nn.Module = alignment
        if self.config.num_pairs and torch.distributed.is_available() and torch.distributed.is_initialized():
            # No device_ids: inputs are where they should be. This also gives every rank the first one's weights.
            self.wrapped = DistributedDataParallel(alignment, gradient_as_bucket_view=True)

    @classmethod
    def build(cls, config: Any, vla: nn.Module, processor: Any) -> RocketJoin:
        """Load the teacher and make the projectors; when resuming, restore them.

        Args:
            config: the script's configuration, with the fields of `AlignFlags`.
            vla: the policy, in DDP and PEFT or bare.
            processor: its processor, for the image normalization.

        Raises:
            SystemExit: code 2 after one line, for layers the models lack or weights that do not fit.
        """
        policy: Any = getattr(vla, "module", vla)
        device = next(policy.parameters()).device
        backbone = policy.vision_backbone
        targets = None
        try:
            if config.aligns:
                info = describe_teacher(config.teacher, config.teacher_type)
                align = config.align_config(policy.config.text_config.num_hidden_layers, info.depth)
                teacher = load_teacher(
                    config.teacher,
                    align.teacher_layers,
                    config.teacher_type,
                    device=device,
                    dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
                )
                targets = TeacherTargets(teacher, processor.image_processor, expects_images=False)
                alignment = MultiLayerAlignment(align, policy.llm_dim, info.channels // 2).to(device)
                if config.resume:
                    _restore(alignment, Path(config.vla_path), config.resume_step)
            else:
                alignment = MultiLayerAlignment(config.align_config(0, 0), policy.llm_dim, 0)
        except ValueError as error:
            _refuse(error)
        tokens = backbone.get_num_patches() * backbone.get_num_images_in_input()
        return cls(alignment, targets, num_vision_tokens=tokens, flags=config)

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that the optimizer has to update."""
        return list(self.alignment.parameters())

    def add_loss(
        self,
        loss: Tensor,
        metrics: dict[str, float],
        hidden_states: tuple[Tensor, ...],
        pixel_values: Tensor,
        batch: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Total loss = action loss + coefficient * alignment loss, and the metrics with the alignment's.

        `loss_value` stays the action loss, so that runs with and without alignment can be compared.

        Args:
            loss: the action loss.
            metrics: the script's.
            hidden_states: L + 1 tensors (B, S, D), embeddings first.
            pixel_values: (B, V * channels of a view, H, W), on any device.
            batch: the script's, for means by task.

        With `--align_center` the first passes only measure the means, and align nothing.
        """
        if self.targets is None:
            return loss, metrics
        coefficient = self.config.coeff_at(self._passes // self._micro_steps)
        self._passes += torch.is_grad_enabled()  # Validation has no gradients.
        if not coefficient:
            return loss, metrics
        device = hidden_states[0].device
        features = self.targets(pixel_values.to(device))
        if self.config.center == "task" and batch is not None:
            text = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
            features = features._replace(tasks=task_keys(*text))
        if self.config.center != "none" and self.alignment.center is None:
            if torch.is_grad_enabled():
                self._measure_center(features)
            return loss, metrics
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            output = self.wrapped(
                hidden_states, vision_start=1, num_vision_tokens=self.num_vision_tokens, teacher=features
            )
        total = loss + coefficient * output.loss
        # One transfer for all of them, where one `.item()` each would wait for the device as many times.
        values = torch.stack([total.detach().float(), output.loss.detach().float(), *output.per_pair.float()]).tolist()
        return total, {**metrics, **dict(zip(self._metric_names(), values))}

    def _measure_center(self, features: TeacherFeatures) -> None:
        self._meter.update(self.alignment.pooled_features(features, self.num_vision_tokens), features.tasks)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if distributed else 1
        if self._meter.samples * processes >= self.center_samples:
            self.alignment.center = self._meter.result()

    def _metric_names(self) -> list[str]:
        return ["total_loss", "align_loss", *(f"align_loss_pair_{pair}" for pair in range(self.config.num_pairs))]

    def add_queues(self, recent_metrics: dict[str, deque[float]]) -> None:
        """Make room for the alignment's metrics among those that the script averages and logs."""
        if self.config.num_pairs:
            length = next(iter(recent_metrics.values())).maxlen
            recent_metrics.update({name: deque(maxlen=length) for name in self._metric_names()})

    def save(self, path: str | Path) -> None:
        """On the main process, write the projectors to `path`: to a temporary name first, flushed, then renamed."""
        if not self.config.num_pairs or int(os.environ.get("RANK", "0")) != 0:
            return
        with replacing(Path(path)) as temporary:
            torch.save(self.alignment.state_dict(), temporary)


def _restore(alignment: MultiLayerAlignment, folder: Path, step: int | None) -> None:
    """Load the projectors of a checkpoint; one without any starts them anew.

    Raises ValueError: weights of another alignment, naming the file.
    """
    names = [f"{COMPONENT}--{name}_checkpoint.pt" for name in (step, "latest")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        print(f"{folder}: no {names[0]}; the projectors start anew")
        return
    try:
        alignment.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: does not fit the alignment that the flags describe ({reason})") from error
