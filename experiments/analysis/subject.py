"""A checkpoint under study: built as training builds it, looked at instead of trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experiments.analysis.config import SubjectFlags
from experiments.analysis.settings import Join, describe_teacher_of, training_config
from prismatic.checkpoint.layout import component_file, split_checkpoint_name
from prismatic.checkpoint.load import load_component, student_depth
from prismatic.training.module import TrainableVLA
from prismatic.training.objectives import make_objective
from prismatic.training.run import TrainingRun
from prismatic.util.errors import UsageError
from prismatic.util.flags import check
from rocket_align.alignment import AlignOutput, MultiLayerAlignment
from rocket_align.student import vision_tokens

TeacherLayers = Literal["none", "aligned", "all"]


@dataclass
class Pass:
    """One forward pass: hidden states (B, S, D), where the vision tokens are, the teacher's features, the action loss.

    With gradients, hidden states and loss belong to one graph.
    """

    hidden_states: tuple[Tensor, ...]
    vision_start: int
    num_vision_tokens: int
    teacher: Any
    action_loss: Tensor
    attention_mask: Tensor


class _Recorder(nn.Module):
    """An auxiliary loss without terms that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[tuple[Tensor, ...], int, int, Any] | None = None

    def forward(
        self, hidden_states: tuple[Tensor, ...], vision_start: int, num_vision_tokens: int, teacher: Any
    ) -> AlignOutput:
        self.seen = (hidden_states, vision_start, num_vision_tokens, teacher)
        zero = hidden_states[0].new_zeros((), dtype=torch.float32)
        return AlignOutput(zero, zero.new_zeros(0))


class Subject:
    """Policy, alignment and data of one checkpoint.

    Args:
        flags: of the command.
        folder: a checkpoint folder, or a base model, which gets new adapters and projectors.
        join: the fine-tuning script.
        teacher_layers: whose features each pass carries: of no layer, of the aligned ones, or of all.

    Raises:
        UsageError: a wrong flag, or a teacher that is needed and not given.
    """

    def __init__(self, flags: SubjectFlags, folder: str, join: Join, teacher_layers: TeacherLayers = "aligned") -> None:
        check(flags)
        self.flags = flags
        self.name = Path(folder).name
        self.config = training_config(flags, folder, join)
        self.config.validate()
        self.align, teacher_dim = join.plan_alignment(self.config)
        if teacher_layers == "aligned" and not self.align.num_pairs:
            raise UsageError(
                f"{folder}: no alignment (recipe {self.config.recipe_name}); accepted: one, with --vggt_path"
            )
        self.training = TrainingRun(self.config, {})
        self.device = self.training.device
        self._targets: Any = lambda batch: None
        self.alignment: MultiLayerAlignment = self._build_alignment(join, teacher_dim, teacher_layers)
        objective = make_objective(self.config, self.training.platform, self.training.processor.tokenizer)
        self._recorder = _Recorder()
        module = TrainableVLA(
            self.training.parts, objective, self._recorder, auxiliary_coeff=0.0, use_film=self.config.use_film
        )
        self.module = module.to(self.device).eval()

    def _build_alignment(self, join: Join, teacher_dim: int, teacher_layers: TeacherLayers) -> MultiLayerAlignment:
        if teacher_layers == "aligned":
            alignment, self._targets = join.build_alignment(self.training, self.align, teacher_dim)
        else:
            alignment = MultiLayerAlignment(self.align, self.training.vla.llm_dim, teacher_dim)
        self.every_layer: MultiLayerAlignment | None = None
        if teacher_layers == "all":
            sizes = describe_teacher_of(self.config)
            layers = tuple(range(sizes.depth))
            every = replace(
                self.align,
                student_layers=layers,
                teacher_layers=layers,
                projector="shared",
                width_ratios=None,
                released_independent_width=False,
            )
            self.every_layer, self._targets = join.build_alignment(self.training, every, sizes.channels // 2)
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
    def num_blocks(self) -> int:
        """Blocks of the LLM."""
        return student_depth(self.config)

    @property
    def num_samples(self) -> int:
        """Samples that the passes show: as many as the flags ask for, rounded up to whole batches."""
        return math.ceil(self.flags.num_samples / self.flags.batch_size) * self.flags.batch_size

    def batches(self) -> Iterator[dict[str, Any]]:
        """The batches of `passes`: the same at every call."""
        return itertools.islice(self.training.batches(), self.num_samples // self.flags.batch_size)

    def passes(self, *, gradients: bool = False) -> Iterator[Pass]:
        """Forward passes over `num_samples` samples."""
        accelerator = self.training.accelerator
        for batch in self.batches():
            with nullcontext() if gradients else torch.no_grad(), accelerator.autocast():
                output = self.module(batch, self._targets(batch))
            assert self._recorder.seen is not None
            yield Pass(*self._recorder.seen, output.loss, batch["attention_mask"])

    def autocast(self) -> Any:
        """The precision of training, for what is computed from a pass."""
        return self.training.accelerator.autocast()

    def student_states(self, seen: Pass) -> Tensor:
        """Vision tokens (L + 1, B, N, D) of all hidden states, cut out as the alignment does."""
        layers = range(len(seen.hidden_states))
        return vision_tokens(
            seen.hidden_states, layers, seen.vision_start, seen.num_vision_tokens, shift=self.align.shift
        )

    def describe(self) -> dict[str, Any]:
        """What a report says of the subject."""
        return {
            "checkpoint": self.name,
            "label": self.label,
            "step": self.step,
            "recipe": self.config.recipe_name,
            "projector": self.align.projector,
            "student_layers": list(self.align.student_layers),
            "teacher_layers": list(self.align.teacher_layers),
            "student_depth": self.num_blocks,
            "dataset": self.config.dataset_name,
            "samples": self.num_samples,
            "seed": self.flags.seed,
        }
