"""Configuration of the alignment, and the five methods compared in the paper as configurations. Imports no torch.

A recipe differs from `rocket` only where the method does. `num_student_layers` and `num_teacher_layers` are the models'
depths (32 and 24 for OpenVLA-7B and VGGT-1B); layers are returned as plain indices.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from rocket_align.layers import paper_pairs, parse_layers

ProjectorKind = Literal["matryoshka", "shared", "independent"]
PoolingMode = Literal["bilinear", "random"]
CenterMode = Literal["none", "dataset", "task"]

# The pairs of the paper's recipe for a 32-block student and a 24-block teacher.
PAPER_LAYERS = (2, 4, 6, 8, 10, 12, 14, 16, 18, -1)


@dataclass(frozen=True)
class AlignConfig:
    """The alignment: its layers, projectors and loss.

    Raises ValueError: a value that is not accepted, naming the field.
    """

    coeff: float = 0.5  # Weight of the alignment loss in the total loss (lambda in the paper)
    # Hidden states of the student, ascending; 0 is the embeddings; negative ones follow the "released" convention of
    # `resolve_layers`. Empty: no alignment. A comma string is accepted too.
    student_layers: tuple[int, ...] = PAPER_LAYERS
    # Teacher blocks, one per student layer, 0-based, negative ones from the end; in any order, also repeated
    teacher_layers: tuple[int, ...] = PAPER_LAYERS
    # "matryoshka": one projector, pair i uses a prefix of its hidden units; "shared": one projector, full width;
    # "independent": one projector per pair
    projector: ProjectorKind = "matryoshka"
    # Fraction of hidden units per pair ("matryoshka" only); None: 0.2 to 1.0 in equal steps
    width_ratios: tuple[float, ...] | None = None
    widths_increase_with_depth: bool = True  # Shallow pairs are narrow; False reverses the widths
    ensemble_size: int = 1  # Projectors per pair, whose losses are averaged
    student_norm: bool = True  # LayerNorm in front of the projector
    teacher_pe: bool = True  # Add VGGT's sine position embedding to the teacher's features before pooling
    pooling: PoolingMode = "bilinear"  # How teacher patches become student tokens
    # Compare the student's token at position i + 1 with patch i (a causal model predicts the next token)
    shift: bool = True
    # Reproduce the released code, whose independent projectors use only 20% of their hidden units; by default they use
    # all
    released_independent_width: bool = False
    # Means subtracted from the targets of each pair and place: "none" (the paper), those of the whole "dataset", or of
    # each "task"
    center: CenterMode = "none"
    # Weights of the pairs in the mean loss, of which only the ratios count; None: all the same
    pair_weights: tuple[float, ...] | None = None
    # (step, factor) points between which the coefficient's factor is interpolated; before the first and after the last
    # it stays. Empty: 1 throughout.
    schedule: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("student_layers", "teacher_layers"):
            object.__setattr__(self, name, parse_layers(getattr(self, name)))
        if len(set(self.student_layers)) < self.num_pairs:
            raise ValueError(f"student_layers: found a layer twice in {self.student_layers}; accepted: each layer once")
        if len(self.student_layers) != len(self.teacher_layers):
            raise ValueError(
                f"teacher_layers: found {len(self.teacher_layers)} layers; "
                f"accepted: one per student layer, of which there are {len(self.student_layers)}"
            )
        self._check_choice("projector", ProjectorKind)
        self._check_choice("pooling", PoolingMode)
        self._check_choice("center", CenterMode)
        if not (math.isfinite(self.coeff) and self.coeff >= 0):
            raise ValueError(f"coeff: found {self.coeff}; accepted: 0 or more")
        if self.ensemble_size < 1:
            raise ValueError(f"ensemble_size: found {self.ensemble_size}; accepted: 1 or more")
        if self.released_independent_width and self.projector != "independent":
            raise ValueError(
                f'released_independent_width: accepted with projector "independent", not {self.projector!r}'
            )
        self._check_width_ratios()
        self._check_terms()

    def _check_choice(self, name: str, kind: object) -> None:
        if getattr(self, name) not in get_args(kind):
            raise ValueError(f"{name}: found {getattr(self, name)!r}; accepted: {', '.join(get_args(kind))}")

    def _check_width_ratios(self) -> None:
        if self.width_ratios is None:
            return
        ratios = tuple(float(ratio) for ratio in self.width_ratios)
        object.__setattr__(self, "width_ratios", ratios)
        if self.projector != "matryoshka":
            raise ValueError(f'width_ratios: accepted with projector "matryoshka", not {self.projector!r}')
        if len(ratios) != self.num_pairs or not all(0 < ratio <= 1 for ratio in ratios):
            raise ValueError(f"width_ratios: found {ratios}; accepted: {self.num_pairs} numbers above 0 and up to 1")

    def _check_terms(self) -> None:
        if self.center != "none" and self.pooling == "random":
            raise ValueError(f'center: found {self.center!r}; accepted with pooling "random", which mixes places: none')
        if self.pair_weights is not None:
            weights = tuple(float(weight) for weight in self.pair_weights)
            object.__setattr__(self, "pair_weights", weights)
            valid = len(weights) == self.num_pairs and all(0 <= weight < math.inf for weight in weights)
            if not (valid and any(weights)):
                raise ValueError(
                    f"pair_weights: found {weights}; accepted: {self.num_pairs} numbers of 0 or more, not all 0"
                )
        steps, factors = [step for step, _ in self.schedule], [factor for _, factor in self.schedule]
        if steps != sorted({*steps}) or not all(step >= 0 and 0 <= factor < math.inf for step, factor in self.schedule):
            raise ValueError(f"schedule: found {self.schedule}; accepted: ascending steps, factors of 0 or more")
        object.__setattr__(self, "schedule", tuple(zip(map(int, steps), map(float, factors))))

    def coeff_at(self, step: int) -> float:
        """Weight of the alignment loss in optimizer step `step`, counted from 0."""
        points = self.schedule
        if not points or step <= points[0][0]:
            return self.coeff * (points[0][1] if points else 1.0)
        for (left, start), (right, end) in itertools.pairwise(points):
            if step <= right:
                return self.coeff * (start + (end - start) * (step - left) / (right - left))
        return self.coeff * points[-1][1]

    @property
    def num_pairs(self) -> int:
        """Number of aligned layer pairs."""
        return len(self.student_layers)


def rocket(num_student_layers: int = 32, num_teacher_layers: int = 24) -> AlignConfig:
    """One shared projector whose width grows with depth (the paper's method)."""
    student, teacher = paper_pairs(num_student_layers, num_teacher_layers)
    return AlignConfig(student_layers=student, teacher_layers=teacher)


def shared(num_student_layers: int = 32, num_teacher_layers: int = 24) -> AlignConfig:
    """One shared projector, full width for every pair."""
    return replace(rocket(num_student_layers, num_teacher_layers), projector="shared")


def naive(num_student_layers: int = 32, num_teacher_layers: int = 24) -> AlignConfig:
    """One independent projector per pair."""
    return replace(rocket(num_student_layers, num_teacher_layers), projector="independent")


def spatial_forcing(num_student_layers: int = 32, num_teacher_layers: int = 24) -> AlignConfig:
    """A single pair: the student's state at three quarters of its depth, the teacher's last block."""
    return replace(
        naive(num_student_layers, num_teacher_layers),
        student_layers=(num_student_layers * 3 // 4,),
        teacher_layers=(num_teacher_layers - 1,),
    )


def baseline(num_student_layers: int = 32, num_teacher_layers: int = 24) -> AlignConfig:
    """No alignment."""
    return replace(rocket(num_student_layers, num_teacher_layers), coeff=0.0, student_layers=(), teacher_layers=())


def openpi_pairs(num_student_layers: int = 18, num_teacher_layers: int = 24) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Student states and teacher blocks of the paper's recipe for pi0 and pi0.5: 2, 3, ..., 10 and the final norm with
    2, 4, ..., 18 and the last block; smaller models get consecutive ones from 1, and the last of each."""
    last = (num_student_layers, num_teacher_layers - 1)
    if num_student_layers > 10 and num_teacher_layers > 19:
        return (*range(2, 11), last[0]), (*range(2, 19, 2), last[1])
    early = tuple(range(1, min(num_student_layers, num_teacher_layers - 1, 10)))
    return (*early, last[0]), (*early, last[1])


def for_openpi(config: AlignConfig, num_student_layers: int, num_teacher_layers: int) -> AlignConfig:
    """A recipe's configuration for pi0 or pi0.5: the release's pairs (spatial forcing: at two thirds of the depth), and
    no shift, since all of the prefix sees all of it."""
    pairs = openpi_pairs(num_student_layers, num_teacher_layers)
    if config.num_pairs == 1:
        pairs = (max(1, num_student_layers * 2 // 3),), (num_teacher_layers - 1,)
    return replace(config, student_layers=pairs[0], teacher_layers=pairs[1], shift=False)


RECIPES = {
    "rocket": rocket,
    "shared": shared,
    "naive": naive,
    "spatial_forcing": spatial_forcing,
    "baseline": baseline,
}
