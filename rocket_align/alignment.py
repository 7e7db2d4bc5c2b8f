"""Multi-layer alignment: hidden states of a student and features of a teacher in, one loss out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rocket_align.config import AlignConfig
from rocket_align.layers import resolve_layers
from rocket_align.loss import cosine_loss
from rocket_align.pooling import pool_teacher
from rocket_align.projector import AlignmentProjector, matryoshka_widths
from rocket_align.student import vision_tokens
from rocket_align.teacher.base import AlignmentTargets, TeacherFeatures


class AlignOutput(NamedTuple):
    """Result of an alignment.

    Attributes:
        loss: scalar with gradient, averaged over pairs and ensemble; not yet times the coefficient.
        per_pair: (K,) detached losses of the pairs, on the same device.
    """

    loss: Tensor
    per_pair: Tensor


class MultiLayerAlignment(nn.ModuleList):
    """The projectors and the loss of all layer pairs.

    It is a list (pair) of lists (ensemble member) of projectors, so that its state dict has the layout of a released
    `align_projectors--*.pt`: `{pair}.{member}.fc1.weight`. A shared projector stands in every pair's list, and its
    tensors under every pair's name, as released. Loading also accepts a `module.` prefix, and pair 0 alone for a
    shared projector.

    Without layers (the baseline) it has no parameters, needs no teacher, and its loss is zero.

    Args:
        config: what is aligned and how.
        student_dim: width of the student's hidden states.
        teacher_dim: half the channels of the teacher's features (VGGT's have two streams of this width).
    """

    def __init__(self, config: AlignConfig, student_dim: int, teacher_dim: int) -> None:
        pairs = config.num_pairs
        hidden_dim = 2 * teacher_dim
        widths = [hidden_dim] * pairs
        if config.projector == "matryoshka" and pairs:
            widths = list(matryoshka_widths(hidden_dim, pairs, config.width_ratios))
        elif config.released_independent_width:
            widths = list(matryoshka_widths(hidden_dim, 1)) * pairs
        if not config.widths_increase_with_depth:
            widths.reverse()

        def members(of_pairs: Sequence[int]) -> nn.ModuleList:
            return nn.ModuleList(
                AlignmentProjector(student_dim, teacher_dim, widths=of_pairs, student_norm=config.student_norm)
                for _ in range(config.ensemble_size)
            )

        if config.projector == "independent":
            super().__init__([members([width]) for width in widths])
        else:
            super().__init__([members(widths)] * pairs if pairs else [])
        self.config = config
        self.teacher_channels = 2 * teacher_dim

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Overridden as torch allows; the public hook for it is newer than the torch 2.2 that OpenVLA-OFT pins.
        *_, errors = args
        _accept_released_layouts(self, state_dict, prefix, errors)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _member(self, pair: int, member: int) -> AlignmentProjector:
        return cast(AlignmentProjector, cast(nn.ModuleList, self[pair])[member])

    def projector_of(self, pair: int, member: int = 0) -> tuple[AlignmentProjector, int]:
        """A pair's projector and how many of its hidden units the pair uses."""
        independent = self.config.projector == "independent"
        projector = self._member(pair if independent else 0, member)
        return projector, projector.widths[0 if independent else pair]

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden units that every pair uses."""
        return tuple(self.projector_of(pair)[1] for pair in range(self.config.num_pairs))

    def project_pair(self, tokens_BND: Tensor, pair: int, member: int = 0) -> Tensor:
        """Any tokens (B, N, D) through the projector of one pair: (B, N, C)."""
        if self.config.projector == "independent":
            return self._member(pair, member)(tokens_BND, 0)
        return self._member(0, member)(tokens_BND, pair)

    def project(self, tokens_KBND: Tensor) -> Tensor:
        """Each pair's tokens through its projectors: (K, B, N, D) -> (E, K, B, N, C) over the ensemble."""
        members = range(self.config.ensemble_size)
        if self.config.projector == "independent":
            pairs = list(enumerate(tokens_KBND))
            rows = [torch.stack([self.project_pair(tokens, k, e) for k, tokens in pairs]) for e in members]
        else:
            rows = [self._member(0, e).project_pairs(tokens_KBND) for e in members]
        return torch.stack(rows)

    def targets(self, teacher: TeacherFeatures | AlignmentTargets, num_tokens: int) -> Tensor:
        """Pooled teacher features (K, B, N, C); those of a feature store are pooled already."""
        if isinstance(teacher, AlignmentTargets):
            return self._checked(teacher.pooled_KBNC, num_tokens)
        found = [tuple(features.shape[-1:]) for features in teacher.layers]
        if found != [(self.teacher_channels,)] * self.config.num_pairs:
            raise ValueError(
                f"teacher: found {len(found)} layers of {sorted({size for (size,) in found})} channels; "
                f"accepted: {self.config.num_pairs} layers of {self.teacher_channels}"
            )
        pooled = [
            pool_teacher(
                features,
                teacher.grid_hw,
                teacher.image_hw,
                num_tokens,
                mode=self.config.pooling,
                position_embedding=self.config.teacher_pe,
            )
            for features in teacher.layers
        ]
        return torch.stack(pooled)

    def _checked(self, pooled_KBNC: Tensor, num_tokens: int) -> Tensor:
        pairs, _, *found = pooled_KBNC.shape
        accepted = [self.config.num_pairs, num_tokens, self.teacher_channels]
        if [pairs, *found] != accepted:
            raise ValueError(f"teacher: found {[pairs, *found]} pairs, tokens, channels; accepted: {accepted}")
        return pooled_KBNC

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        vision_start: int,
        num_vision_tokens: int,
        teacher: TeacherFeatures | AlignmentTargets | None,
    ) -> AlignOutput:
        """Loss between the student's vision tokens and the teacher, over all pairs.

        Never waits for the device.

        Args:
            hidden_states: the student's L + 1 hidden states (B, S, D), embeddings first.
            vision_start: position of the first vision token (1 after a BOS token); the shift is added here.
            num_vision_tokens: vision tokens over all views.
            teacher: features of `config.teacher_layers`, in that order, or targets made of them; may be None when
                there are no pairs.

        Raises:
            ValueError: layers the student does not have, a slice outside the sequence, features that do not fit.
        """
        if not self.config.num_pairs:
            zero = hidden_states[0].new_zeros((), dtype=torch.float32)
            return AlignOutput(zero, zero.new_zeros(0))
        losses = self.pair_losses(hidden_states, vision_start, num_vision_tokens, teacher)
        return AlignOutput(losses.mean(), losses.detach())

    def student_tokens(self, hidden_states: Sequence[Tensor], vision_start: int, num_vision_tokens: int) -> Tensor:
        """The aligned tokens (K, B, N, D), taken as `forward` takes them."""
        layers = resolve_layers(self.config.student_layers, len(hidden_states) - 1, convention="released")
        return vision_tokens(hidden_states, layers, vision_start, num_vision_tokens, shift=self.config.shift)

    def pair_losses(
        self,
        hidden_states: Sequence[Tensor],
        vision_start: int,
        num_vision_tokens: int,
        teacher: TeacherFeatures | AlignmentTargets | None,
    ) -> Tensor:
        """(K,) losses with gradient, averaged over the ensemble; arguments and refusals of `forward`."""
        if teacher is None:
            raise ValueError(f"teacher: found None; accepted: features of layers {self.config.teacher_layers}")
        tokens = self.student_tokens(hidden_states, vision_start, num_vision_tokens)
        return cosine_loss(self.project(tokens), self.targets(teacher, num_vision_tokens)).mean(dim=0)


def _accept_released_layouts(
    module: MultiLayerAlignment, state_dict: dict[str, Any], prefix: str, errors: list[str]
) -> None:
    """Rename `module.` keys, and give every pair of a shared projector its tensors; refuse pairs that disagree."""
    wrapped = prefix + "module."
    for key in [key for key in state_dict if key.startswith(wrapped)]:
        state_dict[prefix + key[len(wrapped) :]] = state_dict.pop(key)
    if module.config.projector == "independent":
        return
    first = prefix + "0."
    for key in [key for key in state_dict if key.startswith(first)]:
        for pair in range(1, module.config.num_pairs):
            stored = state_dict.setdefault(f"{prefix}{pair}.{key[len(first) :]}", state_dict[key])
            if not torch.equal(stored, state_dict[key]):
                errors.append(f"{key}: pair {pair} has other values, but this alignment shares one projector")
