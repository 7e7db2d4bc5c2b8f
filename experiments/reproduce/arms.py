"""What is compared: an arm is a fine-tuned policy, told from the others by flags of `vla-scripts/finetune.py` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
        Arm(f"rocket-pairs{count}", f"{count} pairs", {"recipe": "rocket"}, {"strategy": "uniform", "count": count})
        for count in profile.pairs
    )


def selection_arms(profile: Profile) -> tuple[Arm, ...]:
    """Without alignment, and ROCKET with layers chosen by different rules (Table 5)."""
    chosen = tuple(
        Arm(f"rocket-{name}", label, {"recipe": "rocket"}, {**flags, "count": profile.selection_count})
        for name, label, flags in SELECTIONS
    )
    return (BASELINE, *chosen)


def data_arms(profile: Profile) -> tuple[Arm, ...]:
    """The baseline and ROCKET on parts of the demonstrations (Table 6), for as many steps as on all of them."""
    arms = []
    for fraction in profile.data_fractions:
        for method in (BASELINE, ROCKET):
            if fraction == 1.0:
                arms.append(method)
            else:
                percent = f"{100 * fraction:g}%"
                flags = {**method.flags, "data_fraction": fraction}
                arms.append(Arm(f"{method.name}-data{percent[:-1]}", f"{method.label}, {percent} of the data", flags))
    return tuple(arms)
