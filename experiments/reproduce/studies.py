"""Which arms and measurements belong to which table or figure of the paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from experiments.reproduce import arms
from experiments.reproduce.arms import Arm
from experiments.reproduce.profiles import Profile


@dataclass(frozen=True)
class Analysis:
    """A subcommand of `vla-scripts/analyze.py` on the checkpoints of some arms, side by side.

    Attributes:
        arms: whose checkpoints; none for an analysis of the teacher alone.
        curve: all checkpoints along the training instead of the last one.
        simulator: policies act in LIBERO; else models are measured on data.
    """

    name: str
    command: str
    arms: tuple[Arm, ...] = ()
    curve: bool = False
    simulator: bool = False


@dataclass(frozen=True)
class Study:
    """A table or figure of the paper, or a further question.

    Attributes:
        arms: the policies it compares.
        curve: every checkpoint of the training is evaluated, not the last alone.
        plus: evaluated on LIBERO-Plus too.
        analyses: measured for every seed; those of the teacher alone once.
        unsupported: why it cannot be run here; empty when it can.
    """

    name: str
    title: str
    arms: Callable[[Profile], tuple[Arm, ...]] = lambda profile: ()
    curve: bool = False
    plus: bool = False
    analyses: tuple[Analysis, ...] = ()
    unsupported: str = ""


def _methods(profile: Profile) -> tuple[Arm, ...]:
    return arms.METHODS


def _ablation(profile: Profile) -> tuple[Arm, ...]:
    narrow = (arms.NAIVE_NARROW, arms.SPATIAL_FORCING_NARROW)
    return (*arms.METHODS, *narrow)


def _pair(profile: Profile) -> tuple[Arm, ...]:
    return (arms.BASELINE, arms.ROCKET)


_PROJECTORS = (arms.NAIVE, arms.SHARED, arms.ROCKET)

STUDIES = {
    study.name: study
    for study in (
        Study("table2", "success in LIBERO", lambda profile: (arms.BASELINE, arms.SPATIAL_FORCING, arms.ROCKET)),
        Study("table3", "success in LIBERO with pi0.5", unsupported="pi0.5 is not among the supported students"),
        Study("table4", "number of layer pairs", arms.pair_arms),
        Study("table5", "choice of layers", arms.selection_arms),
        Study("table6", "part of the demonstrations", arms.data_arms),
        Study("table7", "cost of training", lambda profile: (arms.BASELINE, arms.SPATIAL_FORCING, arms.ROCKET)),
        Study("table8", "projectors", _ablation),
        Study("table9", "success during training", _methods, curve=True),
        Study(
            "figure1",
            "cosines between the gradients of layer pairs and of the action loss",
            lambda profile: _PROJECTORS,
            analyses=(
                Analysis("gradients", "gradients", _PROJECTORS),
                *(Analysis(f"gradients-{arm.name}", "gradients", (arm,), curve=True) for arm in _PROJECTORS),
            ),
        ),
        Study("figure2", "depth read out of the teacher's layers", analyses=(Analysis("depth", "depth"),)),
        Study("figure3", "success during training", _methods, curve=True),
        Study("figure4", "cone effect", lambda profile: _PROJECTORS, analyses=(Analysis("cone", "cone", _PROJECTORS),)),
        Study("figure5", "robustness in LIBERO-Plus", _pair, plus=True),
        Study(
            "figure7",
            "similarity of projectors",
            lambda profile: _PROJECTORS,
            analyses=(
                Analysis("projectors", "projectors", _PROJECTORS),
                Analysis("projectors-rocket", "projectors", (arms.ROCKET,), curve=True),
            ),
        ),
        Study(
            "figure8",
            "CKA between the layers of student and teacher",
            _pair,
            analyses=(Analysis("cka", "cka", (arms.BASELINE, arms.ROCKET)),),
        ),
        Study(
            "theorem",
            "the theorem's bound, measured",
            lambda profile: _PROJECTORS,
            analyses=(Analysis("theorem", "theorem", _PROJECTORS),),
        ),
        Study(
            "reach",
            "where the hand closes first, during training",
            _methods,
            analyses=(Analysis("reach", "reach", arms.METHODS, curve=True, simulator=True),),
        ),
        Study(
            "store",
            "stored teacher features",
            lambda profile: (arms.BASELINE, arms.ROCKET, arms.ROCKET_STORED),
        ),
    )
}
