"""A checkpoint as analyses look at it: built as training builds it, with forward passes instead of steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from experiments.analysis.config import SubjectFlags, describe_teacher_of, training_config
from experiments.analysis.report import Report
from experiments.join import Targets, build_alignment, plan_alignment
from prismatic.checkpoint.layout import component_file, split_checkpoint_name
from prismatic.checkpoint.load import load_component
from prismatic.policies import student_depth
from prismatic.training.run import TrainingRun
from prismatic.util.errors import UsageError
from prismatic.util.flags import check
from prismatic.vla.batch import Batch
from rocket_align.alignment import AlignOutput, MultiLayerAlignment, vision_tokens
from rocket_align.teacher.base import AlignmentTargets, TeacherFeatures

TeacherLayers = Literal["none", "aligned", "all"]
Features = TeacherFeatures | AlignmentTargets | None


@dataclass
class ForwardPass:
    """One forward pass: hidden states (B, S, D), where the vision tokens are, the teacher's features, the action loss.

    With gradients, hidden states and loss belong to one graph.
    """

    hidden_states: tuple[Tensor, ...]
    vision_start: int
    num_vision_tokens: int
    teacher: Features
    mask_BN: Tensor | None  # The image tokens that count, where not all do
    action_loss: Tensor
    attention_mask: Tensor


def counted_tokens(forward: ForwardPass, tokens_KBND: Tensor, *, by_sample: bool = False) -> list[Tensor]:
    """The image tokens that count, without those of missing cameras and of a letterbox's bars.

    Returns:
        The tokens as they are where all count; else one tensor (K, 1, M, D) of all samples' tokens or, `by_sample`, one
        of each sample that has any; nothing where none counts.
    """
    mask = forward.mask_BN
    if mask is None or bool(mask.all()):
        return [tokens_KBND]
    if by_sample:
        return [tokens_KBND[:, [sample]][:, :, row] for sample, row in enumerate(mask) if row.any()]
    return [tokens_KBND[:, mask][:, None]] if mask.any() else []


class _Recorder(nn.Module):
    """An auxiliary loss without terms that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: tuple[tuple[Tensor, ...], int, int, Features, Tensor | None] | None = None

    def forward(
        self,
        hidden_states: tuple[Tensor, ...],
        vision_start: int,
        num_vision_tokens: int,
        teacher: Features,
        mask_BN: Tensor | None = None,
    ) -> AlignOutput:
        self.shown = (hidden_states, vision_start, num_vision_tokens, teacher, mask_BN)
        zero = hidden_states[0].new_zeros((), dtype=torch.float32)
        return AlignOutput(zero, zero.new_zeros(0))


class LoadedCheckpoint:
    """Policy, alignment and data of one checkpoint.

    Args:
        flags: of the command.
        folder: a checkpoint folder, or a base model, which gets new adapters and projectors.
        teacher_layers: whose features each pass carries: of no layer, of the aligned ones, or of all.

    Raises:
        UsageError: a wrong flag, or a teacher that is needed and not given.
    """

    def __init__(self, flags: SubjectFlags, folder: str, teacher_layers: TeacherLayers = "aligned") -> None:
        check(flags)
        self.flags = flags
        self.name = Path(folder).name
        self.config = training_config(flags, folder)
        self.config.validate()
        self.align, teacher_dim = plan_alignment(self.config)
        if teacher_layers == "aligned" and not self.align.num_pairs:
            raise UsageError(
                f"{folder}: no alignment (recipe {self.config.recipe_name}); accepted: one, with --vggt_path"
            )
        self.training = TrainingRun(self.config, {}, self.align.student_layers or (0,))
        self.device = self.training.device
        self._targets: Targets = lambda batch: None
        self.alignment: MultiLayerAlignment = self._build_alignment(teacher_dim, teacher_layers)
        self._recorder = _Recorder()
        self.module = self.training.make_module(self._recorder, 0.0).to(self.device).eval()

    @property
    def _student_dim(self) -> int:
        return self.training.family.student_dim(self.training.parts)

    def _build_alignment(self, teacher_dim: int, teacher_layers: TeacherLayers) -> MultiLayerAlignment:
        if teacher_layers == "aligned":
            alignment, self._targets = build_alignment(self.training, self.align, teacher_dim)
        else:
            alignment = MultiLayerAlignment(self.align, self._student_dim, teacher_dim)
        self.full_alignment: MultiLayerAlignment | None = None
        if teacher_layers == "all":
            sizes = describe_teacher_of(self.config)
            layers = tuple(range(sizes.depth))
            full = replace(
                self.align,
                student_layers=layers,
                teacher_layers=layers,
                projector="shared",
                width_ratios=None,
                released_independent_width=False,
                center="none",
                pair_weights=None,
            )
            self.full_alignment, self._targets = build_alignment(self.training, full, sizes.channels // 2)
        checkpoint = self.training.start.checkpoint
        file = component_file(checkpoint, "align_projectors") if checkpoint is not None else None
        if file is not None and self.align.num_pairs:
            load_component(alignment, file)
        return alignment.to(self.device).eval()

    @property
    def step(self) -> int:
        """Training step of the checkpoint, 0 for a base model."""
        return self.training.start.step

    @property
    def label(self) -> str:
        """For legends: the run's name and the step."""
        if not self.config.resume:
            return self.name
        return f"{split_checkpoint_name(self.name)[0]}, step {self.step:,}"

    @property
    def num_samples(self) -> int:
        """Samples that the passes show: as many as the flags ask for, rounded up to whole batches."""
        return math.ceil(self.flags.num_samples / self.flags.batch_size) * self.flags.batch_size

    def batches(self) -> Iterator[Batch]:
        """The batches of `passes`: the same at every call."""
        return itertools.islice(self.training.batches(), self.num_samples // self.flags.batch_size)

    def passes(self, *, gradients: bool = False) -> Iterator[ForwardPass]:
        """Forward passes over `num_samples` samples."""
        accelerator = self.training.accelerator
        for batch in self.batches():
            with nullcontext() if gradients else torch.no_grad(), accelerator.autocast():
                output = self.module(batch, self._targets(batch))
            assert self._recorder.shown is not None
            yield ForwardPass(*self._recorder.shown, output.loss, batch["attention_mask"])

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of training, for what is computed from a pass."""
        return self.training.accelerator.autocast()

    def student_states(self, forward: ForwardPass) -> Tensor:
        """Vision tokens (L + 1, B, N, D) of all hidden states, cut out as the alignment does."""
        layers = range(len(forward.hidden_states))
        return vision_tokens(
            forward.hidden_states, layers, forward.vision_start, forward.num_vision_tokens, shift=self.align.shift
        )

    def teacher_blocks(self, forward: ForwardPass) -> Tensor:
        """Features (blocks, B, N, C) of all blocks of the teacher, pooled to the student's tokens; needs "all"."""
        assert self.full_alignment is not None
        return self.full_alignment.targets(forward.teacher, forward.num_vision_tokens)

    def aligned_tokens(self, forward: ForwardPass) -> Tensor:
        """Student tokens (K, B, N, D) of the aligned pairs."""
        return self.alignment.student_tokens(forward.hidden_states, forward.vision_start, forward.num_vision_tokens)

    def aligned_targets(self, forward: ForwardPass) -> Tensor:
        """Teacher features (K, B, N, C) of the aligned pairs, pooled; needs "aligned"."""
        return self.alignment.targets(forward.teacher, forward.num_vision_tokens)

    def describe(self) -> Report:
        """Names and numbers that identify the checkpoint in a report."""
        return {
            "checkpoint": self.name,
            "label": self.label,
            "step": self.step,
            "recipe": self.config.recipe_name,
            "projector": self.align.projector,
            "student_layers": list(self.align.student_layers),
            "teacher_layers": list(self.align.teacher_layers),
            "student_depth": student_depth(self.config),
            "dataset": self.config.dataset_name,
            "samples": self.num_samples,
            "seed": self.flags.seed,
        }
