"""The method: several hidden states of a student and features of a teacher in, one loss out.

In the order of the data: `vision_tokens` takes the student's states, `AlignmentProjector` brings them to the teacher's
stream, `cosine_loss` compares them with the pooled features, `MultiLayerAlignment` does so for all pairs of layers. In
float32 training on CPUs with AVX-512, `rocket_align.fused` does projection and comparison in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rocket_align.centering import Center
from rocket_align.config import AlignConfig
from rocket_align.fused import fused_loss, fuses
from rocket_align.layers import resolve_layers
from rocket_align.pooling import pool_teacher
from rocket_align.projector import AlignmentProjector, matryoshka_widths
from rocket_align.teacher.base import AlignmentTargets, TeacherFeatures


def vision_tokens(
    hidden_states: Sequence[Tensor], layers: Sequence[int], start: int, count: int, *, shift: bool
) -> Tensor:
    """Hidden states of the vision tokens at some layers.

    With `shift` the slice moves one position to the right, as position i of a causal language model was trained to
    predict token i + 1; its last position is then the token after the images (proprio, or the first text token).

    Args:
        hidden_states: L + 1 tensors (B, S, D); 0 is the input embeddings.
        layers: indices into `hidden_states`.
        start: position of the first vision token in the sequence.
        count: number of vision tokens over all views.

    Returns:
        (K, B, N, D) for K layers.

    Raises:
        ValueError: a slice that leaves the sequence.
    """
    return torch.stack(_vision_slices(hidden_states, layers, start, count, shift=shift))


def _vision_slices(
    hidden_states: Sequence[Tensor], layers: Sequence[int], start: int, count: int, *, shift: bool
) -> list[Tensor]:
    first = start + int(shift)
    length = hidden_states[0].shape[1]
    if first < 0 or first + count > length:
        raise ValueError(f"vision tokens: found positions {first} to {first + count - 1}; accepted: 0 to {length - 1}")
    return [hidden_states[layer][:, first : first + count] for layer in layers]


class _Cosine(torch.autograd.Function):
    """Cosine over the last dimension; as torch's own, but it keeps no normalized copies and reads its input less often.

    Norms count as 1e-8 or more.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        inverses = [torch.linalg.vector_norm(t, dim=-1).clamp_min(1e-8).reciprocal() for t in (x, y)]
        return (x * y).sum(-1) * inverses[0] * inverses[1], *inverses

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, Tensor | None]:
        x, y, *results = ctx.saved_tensors
        if torch.is_grad_enabled():  # With create_graph: results that are functions of x and y.
            results = _Cosine.forward(x, y)
        cosine, x_inverse, y_inverse = results
        across = grad * x_inverse * y_inverse
        along = grad * -cosine
        return tuple(
            torch.addcmul(b * across[..., None], a, (along * inverse.square())[..., None]) if needed else None
            for a, b, inverse, needed in zip((x, y), (y, x), (x_inverse, y_inverse), ctx.needs_input_grad)
        )  # type: ignore[return-value]


def cosine_loss(projected: Tensor, target: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Mean over samples and tokens of 1 - cos(projected, target), computed in float32.

    Source: the paper's alignment term before its average over pairs.

    Args:
        projected, target: (..., B, N, C).
        mask_BN: bool, False for tokens that do not count (of a missing camera, of padding). A sample is the mean over
            its own tokens; one without any is 0.

    Returns:
        The leading dimensions, 0 (same direction) to 2 (opposite).
    """
    cosines = _Cosine.apply(projected.float(), target.float())[0]
    if mask_BN is None:
        return 1 - cosines.mean(dim=(-2, -1))
    counted = torch.where(mask_BN, 1 - cosines, 0.0)
    return (counted.sum(dim=-1) / mask_BN.sum(dim=-1).clamp(min=1)).mean(dim=-1)


CENTER_KEYS = ("center_means", "center_keys")


class AlignOutput(NamedTuple):
    """Result of an alignment."""

    # Scalar with gradient, averaged over pairs (by their weights) and ensemble; not yet times the coefficient
    loss: Tensor
    per_pair: Tensor  # (K,) detached losses of the pairs, on the same device


class MultiLayerAlignment(nn.ModuleList):
    """The projectors and the loss of all layer pairs.

    It is a list (pair) of lists (ensemble member) of projectors, so that its state dict has the layout of a released
    `align_projectors--*.pt`: `{pair}.{member}.fc1.weight`. A shared projector stands in every pair's list, and its
    tensors under every pair's name, as released. Loading also accepts a `module.` prefix, and pair 0 alone for a
    shared projector.

    With `config.center`, `center` holds the means to subtract; set it before the first loss (see
    `rocket_align.centering`). The state dict has it as `center_means` and `center_keys`.

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

        def members(pair_widths: Sequence[int]) -> nn.ModuleList:
            return nn.ModuleList(
                AlignmentProjector(student_dim, teacher_dim, widths=pair_widths, student_norm=config.student_norm)
                for _ in range(config.ensemble_size)
            )

        if config.projector == "independent":
            super().__init__([members([width]) for width in widths])
        else:
            super().__init__([members(widths)] * pairs if pairs else [])
        self.config = config
        self.teacher_channels = 2 * teacher_dim
        # No buffer: DDP would send it to every process in every step.
        self.center: Center | None = None

    @property
    def later_state(self) -> tuple[str, ...]:
        """Names in a file of this alignment that `state_dict` may not have yet."""
        return () if self.config.center == "none" else CENTER_KEYS

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.center is not None:
            destination |= {prefix + key: value for key, value in zip(CENTER_KEYS, self.center)}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Overridden as torch allows; the public hook for it is newer than the torch 2.2 that OpenVLA-OFT pins.
        *_, errors = args
        _accept_released_layouts(self, state_dict, prefix, errors)
        names = [prefix + key for key in self.later_state]
        if names and all(name in state_dict for name in names):
            self.center = Center(*(state_dict.pop(name) for name in names))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _member(self, pair: int, member: int) -> AlignmentProjector:
        return cast(AlignmentProjector, cast(nn.ModuleList, self[pair])[member])

    def _place(self, pair: int, member: int) -> tuple[AlignmentProjector, int]:
        """A pair's projector and the pair's index there."""
        if self.config.projector == "independent":
            return self._member(pair, member), 0
        return self._member(0, member), pair

    def projector_of(self, pair: int, member: int = 0) -> tuple[AlignmentProjector, int]:
        """A pair's projector and how many of its hidden units the pair uses."""
        projector, index = self._place(pair, member)
        return projector, projector.widths[index]

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden units that every pair uses."""
        return tuple(self.projector_of(pair)[1] for pair in range(self.config.num_pairs))

    def project_pair(self, tokens_BND: Tensor, pair: int, member: int = 0) -> Tensor:
        """Any tokens (B, N, D) through the projector of one pair: (B, N, C)."""
        projector, index = self._place(pair, member)
        return projector(tokens_BND, index)

    def project(self, tokens_KBND: Tensor | Sequence[Tensor]) -> Tensor:
        """Each pair's tokens through its projectors: (K, B, N, D) -> (E, K, B, N, C) over the ensemble."""
        members = range(self.config.ensemble_size)
        if self.config.projector != "independent":
            return torch.stack([self._member(0, e).project_pairs(tokens_KBND) for e in members])
        pairs = list(enumerate(tokens_KBND))
        return torch.stack([torch.stack([self.project_pair(tokens, k, e) for k, tokens in pairs]) for e in members])

    def targets(self, teacher: TeacherFeatures | AlignmentTargets | None, num_tokens: int) -> Tensor:
        """Targets of the projected tokens: pooled features (K, B, N, C), centered where the config says so.

        Raises ValueError: None, features that do not fit the pairs, or means that are wanted and not there.
        """
        pooled = self.pooled_features(teacher, num_tokens)
        if self.config.center == "none":
            return pooled
        if self.center is None:
            raise ValueError(f"center: no means found; accepted with {self.config.center!r}: those of a CenterMeter")
        assert teacher is not None
        if self.center.means_TKNC.device != pooled.device:  # A file's are read to the CPU.
            self.center = Center(*(part.to(pooled.device) for part in self.center))
        return pooled - self.center.of(teacher.tasks, pooled.device)

    def pooled_features(self, teacher: TeacherFeatures | AlignmentTargets | None, num_tokens: int) -> Tensor:
        """Pooled teacher features (K, B, N, C); those of a feature store are pooled already.

        Raises ValueError: None, or features that do not fit the pairs.
        """
        if teacher is None:
            raise ValueError(f"teacher: found None; accepted: features of layers {self.config.teacher_layers}")
        if isinstance(teacher, AlignmentTargets):
            return self._checked(teacher.pooled_KBNC, num_tokens)
        channels = [features.shape[-1] for features in teacher.layers]
        if channels != [self.teacher_channels] * self.config.num_pairs:
            raise ValueError(
                f"teacher: found {len(channels)} layers of {sorted(set(channels))} channels; "
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
        pairs, _, *sizes = pooled_KBNC.shape
        accepted = [self.config.num_pairs, num_tokens, self.teacher_channels]
        if [pairs, *sizes] != accepted:
            raise ValueError(f"teacher: found {[pairs, *sizes]} pairs, tokens, channels; accepted: {accepted}")
        return pooled_KBNC

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        vision_start: int,
        num_vision_tokens: int,
        teacher: TeacherFeatures | AlignmentTargets | None,
        mask_BN: Tensor | None = None,
    ) -> AlignOutput:
        """Loss between the student's vision tokens and the teacher, over all pairs.

        Never waits for the device.

        Args:
            hidden_states: the student's L + 1 hidden states (B, S, D), embeddings first.
            vision_start: position of the first vision token (1 after a BOS token); the shift is added here.
            num_vision_tokens: vision tokens over all views.
            teacher: features of `config.teacher_layers`, in that order, or targets made of them; may be None when
                there are no pairs.
            mask_BN: bool, False for tokens that do not count: see `cosine_loss`.

        Raises:
            ValueError: layers the student does not have, a slice outside the sequence, features that do not fit.
        """
        if not self.config.num_pairs:
            zero = hidden_states[0].new_zeros((), dtype=torch.float32)
            return AlignOutput(zero, zero.new_zeros(0))
        losses = self.pair_losses(hidden_states, vision_start, num_vision_tokens, teacher, mask_BN)
        return AlignOutput(self._mean(losses), losses.detach())

    def _mean(self, losses_K: Tensor) -> Tensor:
        weights = self.config.pair_weights
        if weights is None:
            return losses_K.mean()
        shares = [weight / sum(weights) for weight in weights]
        return (losses_K * losses_K.new_tensor(shares)).sum()

    def student_tokens(self, hidden_states: Sequence[Tensor], vision_start: int, num_vision_tokens: int) -> Tensor:
        """The aligned tokens (K, B, N, D), taken as `forward` takes them."""
        return torch.stack(self._student_slices(hidden_states, vision_start, num_vision_tokens))

    def _student_slices(self, hidden_states: Sequence[Tensor], start: int, count: int) -> list[Tensor]:
        layers = resolve_layers(self.config.student_layers, len(hidden_states) - 1, convention="released")
        return _vision_slices(hidden_states, layers, start, count, shift=self.config.shift)

    def pair_losses(
        self,
        hidden_states: Sequence[Tensor],
        vision_start: int,
        num_vision_tokens: int,
        teacher: TeacherFeatures | AlignmentTargets | None,
        mask_BN: Tensor | None = None,
    ) -> Tensor:
        """(K,) losses with gradient, averaged over the ensemble; arguments and refusals of `forward`."""
        tokens = self._student_slices(hidden_states, vision_start, num_vision_tokens)
        return self._losses(tokens, teacher, mask_BN)

    def _losses(
        self, tokens: Sequence[Tensor], teacher: TeacherFeatures | AlignmentTargets | None, mask_BN: Tensor | None
    ) -> Tensor:
        targets = self.targets(teacher, tokens[0].shape[1])
        pairs, members = list(enumerate(zip(tokens, targets))), range(self.config.ensemble_size)
        calls_EK = [[(*self._place(k, e), *pair, mask_BN) for k, pair in pairs] for e in members]
        if all(fuses(projector, *rest) for calls in calls_EK for projector, _, *rest in calls):
            losses_EK = torch.stack([torch.stack([fused_loss(*call) for call in calls]) for calls in calls_EK])
        else:
            losses_EK = cosine_loss(self.project(tokens), targets, mask_BN)
        return losses_EK.mean(dim=0)

    def align(
        self,
        tokens_KBND: Tensor,
        teacher: TeacherFeatures | AlignmentTargets | None,
        mask_BN: Tensor | None = None,
    ) -> AlignOutput:
        """Loss of image tokens that are taken already, such as those of :func:`rocket_align.attach`, over all pairs.

        Args:
            tokens_KBND: one row of states per pair; `config.student_layers` says only how many.
            teacher: as for `forward`.
            mask_BN: bool, False for tokens that do not count: see `cosine_loss`.

        Raises:
            ValueError: tokens of another number of pairs, features that do not fit.
        """
        if len(tokens_KBND) != self.config.num_pairs:
            raise ValueError(f"tokens: found {len(tokens_KBND)} taps; accepted: {self.config.num_pairs}, one a pair")
        if not self.config.num_pairs:
            zero = tokens_KBND.new_zeros((), dtype=torch.float32)
            return AlignOutput(zero, zero.new_zeros(0))
        losses = self._losses(tokens_KBND.unbind(), teacher, mask_BN)
        return AlignOutput(self._mean(losses), losses.detach())


def _accept_released_layouts(
    module: MultiLayerAlignment, state_dict: dict[str, Tensor], prefix: str, errors: list[str]
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
