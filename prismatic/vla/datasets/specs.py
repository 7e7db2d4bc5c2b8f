"""The known RLDS datasets and mixtures: what their features are called and how their actions are standardized."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from prismatic.util.errors import UsageError, unknown_name
from prismatic.vla.datasets.oxe.operations import Assembly, features_of
from prismatic.vla.datasets.oxe.table import OXE_DATASETS, OXE_MIXTURES, OXEDataset
from prismatic.vla.platforms import Platform

Standardize = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def split_libero_state(state_T8: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(EEF_state (T, 6): position and axis-angle, gripper_state (T, 2): the finger joints)."""
    return state_T8[:, :6], state_T8[:, -2:]


def libero_transform(action_TA: np.ndarray, state_TS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """LIBERO's raw actions and states -> (action (T, 7) with gripper 1 = open, proprio (T, 8)).

    The raw gripper command is -1 (open) or +1 (close); clipped to [0, 1] and flipped it becomes 1 (open) or 0 (close).
    Source: upstream's libero_dataset_transform.
    """
    gripper = 1.0 - np.clip(action_TA[:, -1:], 0.0, 1.0)
    action = np.concatenate([action_TA[:, :6], gripper], axis=1).astype(np.float32)
    return action, np.concatenate(split_libero_state(state_TS), axis=1).astype(np.float32)


def keep_as_is(action_TA: np.ndarray, state_TS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For datasets whose actions and states are stored the way the policy uses them."""
    return action_TA, state_TS


@dataclass(frozen=True)
class DatasetSpec:
    """Feature names inside a step and the treatment of one dataset."""

    # View name -> image feature, in the order the policy sees them; any names, any number. A view whose feature is None
    # is a black image.
    images: Mapping[str, str | None] = field(
        default_factory=lambda: {"primary": "observation/image", "wrist": "observation/wrist_image"}
    )
    action: str = "action"  # Name of that feature, as of the next two
    state: str | None = "observation/state"  # None: a robot without
    language: str = "language_instruction"
    # (raw action, raw state) of an episode -> (action, proprio), same number of rows
    standardize: Standardize = keep_as_is
    action_mask: tuple[bool, ...] | None = None  # Which action numbers are normalized; None for all
    # Which action numbers pi0 and pi0.5 predict as differences to the state at the chunk's start; None for none
    delta: tuple[bool, ...] | None = None
    # Puts actions and states together from parts of features when the files are read, instead of `action` and `state`
    assembly: Assembly | None = None
    # View -> an image feature that is, at random, seen in its place
    swaps: Mapping[str, str] = field(default_factory=dict)
    # Action chunks in which the arm (the numbers under `action_mask`) stays at 0 start no sample
    skips_stillness: bool = False
    rlds_only: bool = False  # Conversions to other formats of this dataset have other conventions

    @property
    def action_features(self) -> tuple[str, ...]:
        """The features that actions are made of."""
        return features_of(self.assembly.action) if self.assembly else (self.action,)

    @property
    def state_features(self) -> tuple[str, ...]:
        """The features that states are made of."""
        if self.assembly:
            return features_of(self.assembly.proprio)
        return () if self.state is None else (self.state,)

    @property
    def has_state(self) -> bool:
        """True when the robot has states, be they constants."""
        return self.state is not None if self.assembly is None else bool(self.assembly.proprio)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The features that actions and states are made of."""
        return tuple(dict.fromkeys((*self.action_features, *self.state_features)))

    @property
    def stored_images(self) -> dict[str, str]:
        """View name -> feature of every image that is read; a view's swap is called `{view}_swap`."""
        views = {view: feature for view, feature in self.images.items() if feature is not None}
        return views | {f"{view}_swap": feature for view, feature in self.swaps.items()}

    def needed(self, num_images: int | None, with_proprio: bool) -> frozenset[str]:
        """The features that a policy of so many images (None: all), with or without states, cannot do without."""
        views = list(self.images)[:num_images]
        images = {self.stored_images.get(name) for view in views for name in (view, f"{view}_swap")} - {None}
        states = self.state_features if with_proprio else ()
        return frozenset(feature for feature in (*self.action_features, *states, *images) if feature is not None)

    def without(self, absent: Collection[str]) -> DatasetSpec:
        """The same without views and states that are not in the data."""
        if not absent:
            return self
        stateless = any(feature in absent for feature in self.state_features)
        return replace(
            self,
            images={view: None if feature in absent else feature for view, feature in self.images.items()},
            swaps={view: feature for view, feature in self.swaps.items() if feature not in absent},
            state=None if stateless else self.state,
            assembly=replace(self.assembly, proprio=()) if self.assembly and stateless else self.assembly,
        )

    def assembled(self, numbers: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, slice]:
        """(raw actions (K, A), raw states (K, S), the steps kept) of an episode with features (T, w), float32."""
        if self.assembly is not None:
            steps = len(next(iter(numbers.values())))
            return *self.assembly(numbers), self.assembly.kept(steps)
        action = numbers[self.action]
        state = numbers[self.state] if self.state is not None else np.zeros((len(action), 0), np.float32)
        return action, state, slice(None)

    def check_widths(
        self, file: Path, widths: Mapping[str, int], platform: Platform, with_proprio: bool, prefix: str = ""
    ) -> None:
        """Refuse actions, and states that are used, of another width than the platform's, as far as is known yet.

        Args:
            file: describes the features; widths: of each; prefix: of their names in messages.

        Raises:
            UsageError: a width is wrong.
        """
        if self.standardize not in (keep_as_is, libero_transform):
            return  # It may cut them, which shows when it has run.
        # A made-up step of zeros shows how wide the vectors come out.
        step = {name: np.zeros((1, width), np.float32) for name, width in widths.items()}
        action, state, _ = self.assembled(step)
        wanted = [("action", self.action, action, platform.action_dim)]
        wanted += [("state", str(self.state), state, platform.proprio_dim)] if with_proprio else []
        for what, feature, vector, width in wanted:
            if vector.shape[1] != width:
                parts = ", ".join(self.numbers)
                whole = f"feature {prefix}{feature}" if self.assembly is None else f"the {what} made of {parts}"
                raise UsageError(
                    f"{file}: {whole} has shape ({vector.shape[1]},); "
                    f"accepted for platform {platform.name!r}: ({width},)"
                )


def oxe_spec(row: OXEDataset) -> DatasetSpec:
    """The treatment of an Open X-Embodiment dataset: its primary and wrist camera, its assembled vectors."""

    def feature(view: str) -> str | None:
        name = row.cameras.get(view)
        return None if name is None else f"observation/{name}"

    secondary = feature("secondary")
    return DatasetSpec(
        images={"primary": feature("primary"), "wrist": feature("wrist")},
        language=row.language,
        action_mask=row.action_encoding.normalized,
        assembly=row.assembly,
        swaps={"primary": secondary} if row.swaps_outside_views and secondary else {},
        skips_stillness=row.skips_stillness,
        rlds_only=True,
    )


LIBERO_SPEC = DatasetSpec(standardize=libero_transform, action_mask=(True,) * 6 + (False,))
# Joint positions of two arms; the policy sees the head camera and both wrists.
ALOHA_SPEC = DatasetSpec(
    images={
        "primary": "observation/image",
        "left_wrist": "observation/left_wrist_image",
        "right_wrist": "observation/right_wrist_image",
    },
)
# The same of RoboTwin; for pi0, joints count from the state and grippers do not, as in openpi's ALOHA configuration.
ROBOTWIN_SPEC = replace(ALOHA_SPEC, delta=((True,) * 6 + (False,)) * 2)

_ROBOTWIN_TASKS = """
    adjust_bottle beat_block_hammer blocks_ranking_rgb blocks_ranking_size click_alarmclock click_bell
    dump_bin_bigbin grab_roller handover_block handover_mic hanging_mug lift_pot move_can_pot move_pillbottle_pad
    move_playingcard_away move_stapler_pad open_laptop open_microwave pick_diverse_bottles pick_dual_bottles
    place_a2b_left place_a2b_right place_bread_basket place_bread_skillet place_burger_fries place_can_basket
    place_cans_plasticbox place_container_plate place_dual_shoes place_empty_cup place_fan place_mouse_pad
    place_object_basket place_object_scale place_object_stand place_phone_stand place_shoe press_stapler
    put_bottles_dustbin put_object_cabinet rotate_qrcode scan_object shake_bottle shake_bottle_horizontally
    stack_blocks_three stack_blocks_two stack_bowls_three stack_bowls_two stamp_seal turn_switch
""".split()  # noqa: SIM905
# Each task as collected by demo_clean and by demo_randomized.
_ROBOTWIN = {kind: [f"robotwin_{task}_{kind}" for task in _ROBOTWIN_TASKS] for kind in ("clean", "randomized")}

_LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
# Folders of the hub's data: openvla/modified_libero_rlds; lerobot/*_image and IPEC-COMMUNITY/*_lerobot.
_LIBERO_SUFFIXES = ("", "_no_noops", "_image", "_no_noops_1.0.0_lerobot")

DATASETS: dict[str, DatasetSpec] = {
    **{suite + suffix: LIBERO_SPEC for suite in _LIBERO_SUITES for suffix in _LIBERO_SUFFIXES},
    "libero": LIBERO_SPEC,  # four suites in one: lerobot/libero, physical-intelligence/libero
    "gym_aloha": ALOHA_SPEC,  # experiments/mini/collect.py
    "aloha1_fold_shorts_20_demos": ALOHA_SPEC,
    "aloha1_fold_shirt_30_demos": ALOHA_SPEC,
    "aloha1_scoop_X_into_bowl_45_demos": ALOHA_SPEC,
    "aloha1_put_X_into_pot_300_demos": ALOHA_SPEC,
    **{name: ROBOTWIN_SPEC for names in _ROBOTWIN.values() for name in names},
    **{name: oxe_spec(row) for name, row in OXE_DATASETS.items()},
}

# Mixture name -> (dataset, weight) pairs; a dataset is drawn in proportion to weight * number of frames.
MIXTURES: dict[str, tuple[tuple[str, float], ...]] = {
    "libero_4_task_suites_no_noops": tuple((f"{suite}_no_noops", 1.0) for suite in _LIBERO_SUITES[:4]),
    **{f"robotwin_{kind}": tuple((name, 1.0) for name in names) for kind, names in _ROBOTWIN.items()},
    **OXE_MIXTURES,
}


def register_dataset(name: str, spec: DatasetSpec) -> None:
    """Make a dataset of your own known under `name` (its folder below the data root). Raises ValueError if taken."""
    if name in DATASETS or name in MIXTURES:
        raise ValueError(f"dataset {name!r} is already registered")
    DATASETS[name] = spec


def resolve_mixture(data_mix: str) -> tuple[tuple[str, float], ...]:
    """(dataset, weight) pairs of a mixture name, a dataset name, or a comma list of datasets "a,b" or "a:0.5,b:2".

    Raises UsageError: an unknown name, a dataset named twice, a weight that is no positive number.
    """
    if data_mix in MIXTURES:
        return MIXTURES[data_mix]
    pairs: list[tuple[str, float]] = []
    for part in data_mix.split(","):
        name, _, weight_text = part.strip().partition(":")
        if name not in DATASETS:
            raise unknown_name("--dataset_name", name, [*DATASETS, *MIXTURES])
        try:
            weight = float(weight_text or 1.0)
        except ValueError:
            weight = -1.0
        if not 0.0 < weight < float("inf"):
            raise UsageError(f"--dataset_name: weight of {name!r} is {weight_text!r}; accepted: a positive number")
        if name in dict(pairs):
            raise UsageError(f"--dataset_name: {name!r} is named twice; give it a weight ({name}:2) instead")
        pairs.append((name, weight))
    return tuple(pairs)
