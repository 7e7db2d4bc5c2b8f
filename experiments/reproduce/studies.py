"""The arms that are compared, and the table or figure of the paper that each arm and measurement belongs to.

An arm, as in a clinical trial, is one of the policies that a study compares: fine-tuned like the others but for a few
flags of `vla-scripts/finetune.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from experiments.reproduce.profiles import Profile


@dataclass(frozen=True)
class Arm:
    """One policy of a study.

    Attributes:
        name: of files; label: of tables.
        flags: fine-tuning flags beyond the profile's.
        selection: flags of `vla-scripts/select_layers.py`, for layers that have to be measured or computed first.
        stored: the teacher's features are computed once, before training.
    """

    name: str
    label: str
    flags: Mapping[str, object]
    selection: Mapping[str, object] = field(default_factory=dict)
    stored: bool = False


BASELINE = Arm("baseline", "no alignment", {"recipe": "baseline"})
ROCKET = Arm("rocket", "ROCKET", {"recipe": "rocket"})
SHARED = Arm("shared", "shared projector", {"recipe": "shared"})
NAIVE = Arm("naive", "independent projectors", {"recipe": "naive"})
SPATIAL_FORCING = Arm("spatial_forcing", "spatial forcing", {"recipe": "spatial_forcing"})
# The released scripts train these two with a fifth of the projector's width, see docs/upstream.md.
NAIVE_NARROW = Arm("naive-width20", "independent projectors, 20% width", {"recipe": "naive", "use_matryoshka": True})
SPATIAL_FORCING_NARROW = Arm(
    "spatial_forcing-width20", "spatial forcing, 20% width", {"recipe": "spatial_forcing", "use_matryoshka": True}
)
ROCKET_STORED = Arm("rocket-stored", "ROCKET, stored features", {"recipe": "rocket"}, stored=True)
METHODS = (BASELINE, SPATIAL_FORCING, NAIVE, SHARED, ROCKET)
_PROJECTORS = (NAIVE, SHARED, ROCKET)

# (name, label, flags of select_layers.py) of Table 5.
SELECTIONS = (
    ("uniform", "uniform", {"strategy": "uniform"}),
    ("e2m_last1", "early to middle and last", {"strategy": "e2m_last1"}),
    ("shallow", "shallow", {"strategy": "shallow"}),
    ("middle", "middle", {"strategy": "middle"}),
    ("deep", "deep", {"strategy": "deep"}),
    ("sim1-top", "similarity, window 1, top", {"strategy": "sim_top", "window": 1}),
    ("sim1-last", "similarity, window 1, last", {"strategy": "sim_last", "window": 1}),
    ("sim2-top", "similarity, window 2, top", {"strategy": "sim_top", "window": 2}),
    ("sim2-last", "similarity, window 2, last", {"strategy": "sim_last", "window": 2}),
)


def pair_arms(profile: Profile) -> tuple[Arm, ...]:
    """ROCKET with different numbers of evenly spread layer pairs (Table 4)."""
    return tuple(
        Arm(f"rocket-pairs{count}", f"{count} pairs", ROCKET.flags, {"strategy": "uniform", "count": count})
        for count in profile.pairs
    )


def selection_arms(profile: Profile) -> tuple[Arm, ...]:
    """Without alignment, and ROCKET with layers chosen by different rules (Table 5)."""
    chosen = tuple(
        Arm(f"rocket-{name}", label, ROCKET.flags, {**flags, "count": profile.selection_count})
        for name, label, flags in SELECTIONS
    )
    return (BASELINE, *chosen)


def data_arms(profile: Profile) -> tuple[Arm, ...]:
    """The baseline and ROCKET on parts of the demonstrations (Table 6), for as many steps as on all of them."""

    def on_part(method: Arm, fraction: float) -> Arm:
        if fraction == 1.0:
            return method
        name, label = f"{method.name}-data{100 * fraction:g}", f"{method.label}, {100 * fraction:g}% of the data"
        return replace(method, name=name, label=label, flags={**method.flags, "data_fraction": fraction})

    return tuple(on_part(method, fraction) for fraction in profile.data_fractions for method in (BASELINE, ROCKET))


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
        choose: the policies it compares, the same at every scale or by profile (`pair_arms`).
        curve: every checkpoint of the training is evaluated, not the last alone.
        plus: evaluated on LIBERO-Plus too.
        analyses: measured for every seed; those of the teacher alone once.
        policy: family of its student.
    """

    name: str
    title: str
    choose: tuple[Arm, ...] | Callable[[Profile], tuple[Arm, ...]] = ()
    curve: bool = False
    plus: bool = False
    analyses: tuple[Analysis, ...] = ()
    policy: str = "openvla"

    def arms(self, profile: Profile) -> tuple[Arm, ...]:
        """The policies it compares at a profile's scale."""
        return self.choose(profile) if callable(self.choose) else self.choose


_THREE = (BASELINE, SPATIAL_FORCING, ROCKET)
_GRADIENTS = (
    Analysis("gradients", "gradients", _PROJECTORS),
    *(Analysis(f"gradients-{arm.name}", "gradients", (arm,), curve=True) for arm in _PROJECTORS),
)
_SIMILARITIES = (
    Analysis("projectors", "projectors", _PROJECTORS),
    Analysis("projectors-rocket", "projectors", (ROCKET,), curve=True),
)
_CKA = (Analysis("cka", "cka", (BASELINE, ROCKET)),)
_REACH = (Analysis("reach", "reach", METHODS, curve=True, simulator=True),)

STUDIES = {
    study.name: study
    for study in (
        Study("table2", "success in LIBERO", _THREE),
        Study("table3", "success in LIBERO with pi0.5", _THREE, policy="pi05"),
        Study("table4", "number of layer pairs", pair_arms),
        Study("table5", "choice of layers", selection_arms),
        Study("table6", "part of the demonstrations", data_arms),
        Study("table7", "cost of training", _THREE),
        Study("table8", "projectors", (*METHODS, NAIVE_NARROW, SPATIAL_FORCING_NARROW)),
        Study("table9", "success during training", METHODS, curve=True),
        Study(
            "figure1",
            "cosines between the gradients of layer pairs and of the action loss",
            _PROJECTORS,
            analyses=_GRADIENTS,
        ),
        Study("figure2", "depth read out of the teacher's layers", analyses=(Analysis("depth", "depth"),)),
        Study("figure3", "success during training", METHODS, curve=True),
        Study("figure4", "cone effect", _PROJECTORS, analyses=(Analysis("cone", "cone", _PROJECTORS),)),
        Study("figure5", "robustness in LIBERO-Plus", (BASELINE, ROCKET), plus=True),
        Study("figure7", "similarity of projectors", _PROJECTORS, analyses=_SIMILARITIES),
        Study("figure8", "CKA between the layers of student and teacher", (BASELINE, ROCKET), analyses=_CKA),
        Study(
            "theorem",
            "the theorem's bound, measured",
            _PROJECTORS,
            analyses=(Analysis("theorem", "theorem", _PROJECTORS),),
        ),
        Study("reach", "where the hand closes first, during training", METHODS, analyses=_REACH),
        Study("store", "stored teacher features", (BASELINE, ROCKET, ROCKET_STORED)),
    )
}
