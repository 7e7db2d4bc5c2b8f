"""The Open X-Embodiment datasets and mixtures that upstream registers: one row says how a dataset is read.

Names of features are facts of the published RLDS files. A row's action is 1 for an open gripper. Cameras are given
below `observation/`; a camera that is None is a black image, which keeps a dataset usable in a mixture with others that
have it. Depth images are named for completeness; the policies do not take them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from prismatic.vla.datasets.oxe.operations import Assembly, Columns, Constant, Operation, Part


class StateEncoding(Enum):
    """Meaning of a dataset's proprio vector. PAD is a zero that keeps different robots' vectors equally long."""

    NONE = "nothing: eight zeros"
    POS_EULER = "position (3), roll pitch yaw (3), PAD, gripper"
    POS_QUAT = "position (3), quaternion (4), gripper"
    JOINT = "joints (7, or fewer and PAD), gripper"
    JOINT_BIMANUAL = "joints and gripper of both arms (14)"


class ActionEncoding(Enum):
    """Meaning of a dataset's action vector, with the numbers that are normalized."""

    EEF_POS = "motion of the hand (6), gripper"
    JOINT_POS = "joints (7), gripper"
    JOINT_POS_BIMANUAL = "joints and gripper of both arms (14)"

    @property
    def normalized(self) -> tuple[bool, ...]:
        """Mark the numbers of an action that are normalized; the one gripper command is not."""
        arm = {ActionEncoding.EEF_POS: 6, ActionEncoding.JOINT_POS: 7}
        return (True,) * 14 if self is ActionEncoding.JOINT_POS_BIMANUAL else (True,) * arm[self] + (False,)


@dataclass(frozen=True)
class OXEDataset:
    """One dataset's row: how it is read."""

    # View -> feature below `observation/`, or None for a black image. Policies see "primary" and, when they take more
    # images, "wrist" (or "left_wrist" and "right_wrist"); "secondary" is a further outside view.
    cameras: Mapping[str, str | None]
    proprio: tuple[Part, ...]  # Parts of the vector; see :class:`Assembly`
    action: tuple[Part, ...]
    state_encoding: StateEncoding = StateEncoding.POS_EULER  # Meaning of the proprio vector
    action_encoding: ActionEncoding = ActionEncoding.EEF_POS
    language: str = "language_instruction"  # The instruction's feature below the step
    depth: Mapping[str, str] = field(default_factory=dict)  # View -> depth feature below `observation/`
    drop_first: int = 0  # Steps at the beginning of every episode that are no transitions
    drop_last: int = 0  # And at its end
    swaps_outside_views: bool = False  # The primary image is, at random, the secondary one
    skips_stillness: bool = False  # Chunks in which the arm never moves start no sample

    @property
    def assembly(self) -> Assembly:
        """The vectors' recipe."""
        return Assembly(self.action, self.proprio, self.drop_first, self.drop_last)


def _obs(name: str) -> Columns:
    return Columns(f"observation/{name}")


def _act(name: str) -> Columns:
    return Columns(f"action/{name}")


def _cams(primary: str | None, wrist: str | None = None, secondary: str | None = None) -> dict[str, str | None]:
    return {"primary": primary, "secondary": secondary, "wrist": wrist}


def _open_from_closing(closing: Columns) -> Columns:
    """Openness from a closing command in [-1, 1] or [0, 1]."""
    return closing.then(Operation.CLIP, Operation.INVERT)


_RELATIVE = Operation.RELATIVE
_NATURAL = "observation/natural_language_instruction"
_PAD = Constant(0.0)
_NO_STATE = (Constant(0.0, 8),)

# Whole features called "action" and "state", and what most datasets cut out of them.
_ACTION = Columns("action")
_STATE = _obs("state")
_ARM = _ACTION[:6]
_LAST = _ACTION[-1:]
_POSE_AND_GRIPPER = (_STATE[:6], _STATE[-1:])

# The form of Google's robots: three named parts of the action.
_WORLD, _TURN = _act("world_vector"), _act("rotation_delta")
_CLOSEDNESS = _act("gripper_closedness_action")
_OPEN_FLAG = _act("open_gripper")
_RELATIVE_GRASP = (_WORLD, _TURN, _CLOSEDNESS.then(_RELATIVE))

_QUAT, _JOINT, _NONE = StateEncoding.POS_QUAT, StateEncoding.JOINT, StateEncoding.NONE

# Bridge: a step's action is the motion that really followed it, so an episode's last step has none.
_MOTION = _STATE[:6].then(Operation.TO_NEXT)
_BINARY_GRIPPER = _LAST.then(Operation.BINARIZE)

_BRIDGE = OXEDataset(
    _cams("image_0", secondary="image_1"),
    _POSE_AND_GRIPPER,
    (_MOTION, _BINARY_GRIPPER),
    drop_first=1,  # the first action of every episode is all zeros
    drop_last=1,
)
_GNM = OXEDataset(
    _cams(None, "image"), (_obs("position"), Constant(0.0, 3), _obs("yaw"), _PAD, _PAD), (_ACTION, Constant(0.0, 5))
)
_AUSTIN = OXEDataset(_cams("image", "wrist_image"), (_STATE,), (_ARM, _open_from_closing(_LAST)), _QUAT)
_PR2 = OXEDataset(_cams("image"), _POSE_AND_GRIPPER, (_ACTION[:-1],))
_DROID_ACTION = (
    Columns("action_dict/cartesian_velocity"),
    Columns("action_dict/gripper_position").then(Operation.INVERT),
)
_DROID_STATE = (_obs("cartesian_position"), _obs("gripper_position"))
_TDROID = OXEDataset(
    _cams("static_image"), _DROID_STATE, (_ARM, _BINARY_GRIPPER), depth={"primary": "static_depth_image"}
)

OXE_DATASETS: dict[str, OXEDataset] = {
    "fractal20220817_data": OXEDataset(
        _cams("image"),
        (_obs("base_pose_tool_reached"), _obs("gripper_closed")),
        _RELATIVE_GRASP,
        _QUAT,
        language=_NATURAL,
    ),
    "kuka": OXEDataset(
        _cams("image"),
        (_obs("clip_function_input/base_pose_tool_reached"), _obs("gripper_closed")),
        _RELATIVE_GRASP,
        _QUAT,
        language=_NATURAL,
    ),
    "bridge_oxe": OXEDataset(
        _cams("image", secondary="image_1"),
        _POSE_AND_GRIPPER,
        (_MOTION, _OPEN_FLAG),
        language=_NATURAL,
        drop_first=1,
        drop_last=1,
    ),
    "bridge_orig": _BRIDGE,
    "bridge_dataset": _BRIDGE,
    "taco_play": OXEDataset(
        _cams("rgb_static", "rgb_gripper"),
        (_obs("robot_obs")[:6], _PAD, _obs("robot_obs")[7:8]),
        (_act("rel_actions_world")[:6], _act("rel_actions_world")[-1:].then(Operation.CLIP)),
        language=_NATURAL,
        depth={"primary": "depth_static", "wrist": "depth_gripper"},
    ),
    "jaco_play": OXEDataset(
        _cams("image", "image_wrist"),
        (_obs("end_effector_cartesian_pos")[:6], _PAD, _obs("end_effector_cartesian_pos")[-1:]),
        (_WORLD, Constant(0.0, 3), _CLOSEDNESS.then(_RELATIVE)),
        language=_NATURAL,
    ),
    "berkeley_cable_routing": OXEDataset(
        _cams("image", "wrist45_image", "top_image"),
        (_obs("robot_state"), _PAD),
        (_WORLD, _TURN, Constant(0.0)),
        _JOINT,
        language=_NATURAL,
    ),
    "roboturk": OXEDataset(
        _cams("front_rgb"), _NO_STATE, (_WORLD, _TURN, _open_from_closing(_CLOSEDNESS)), _NONE, language=_NATURAL
    ),
    "nyu_door_opening_surprising_effectiveness": OXEDataset(
        _cams(None, "image"), _NO_STATE, _RELATIVE_GRASP, _NONE, language=_NATURAL
    ),
    "viola": OXEDataset(
        _cams("agentview_rgb", "eye_in_hand_rgb"),
        (_obs("joint_states"), _obs("gripper_states")),
        (_WORLD, _TURN, _open_from_closing(_CLOSEDNESS)),
        _JOINT,
        language=_NATURAL,
    ),
    "berkeley_autolab_ur5": OXEDataset(
        _cams("image", "hand_image"),
        (_obs("robot_state")[6:14],),
        _RELATIVE_GRASP,
        _QUAT,
        language=_NATURAL,
        depth={"primary": "image_with_depth"},
    ),
    "toto": OXEDataset(_cams("image"), (_STATE, _PAD), (_WORLD, _TURN, _OPEN_FLAG), _JOINT, language=_NATURAL),
    "language_table": OXEDataset(
        _cams("rgb"),
        (_obs("effector_translation"), Constant(0.0, 6)),
        (_ACTION, Constant(0.0, 4), Constant(1.0)),
        language="observation/instruction",
    ),
    "columbia_cairlab_pusht_real": OXEDataset(
        _cams("image", "wrist_image"),
        (_obs("robot_state"), Constant(0.0, 6)),
        (_WORLD, _TURN, _CLOSEDNESS),
        language=_NATURAL,
    ),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": OXEDataset(
        _cams("image"),
        (_obs("ee_position"), _obs("ee_orientation"), _PAD),
        (_ACTION[:3], Constant(0.0, 3), _LAST),
        _QUAT,
        depth={"primary": "depth_image"},
    ),
    "nyu_rot_dataset_converted_externally_to_rlds": OXEDataset(_cams("image"), _POSE_AND_GRIPPER, (_ACTION[:7],)),
    "stanford_hydra_dataset_converted_externally_to_rlds": OXEDataset(
        _cams("image", "wrist_image"), (_STATE[:3], _STATE[7:10], _STATE[-3:-2]), (_ARM, _LAST.then(Operation.INVERT))
    ),
    "austin_buds_dataset_converted_externally_to_rlds": OXEDataset(
        _cams("image", "wrist_image"), (_STATE[:8],), (_ARM, _open_from_closing(_LAST)), _JOINT
    ),
    "nyu_franka_play_dataset_converted_externally_to_rlds": OXEDataset(
        _cams("image", secondary="image_additional_view"),
        (_STATE[-6:], _PAD, _PAD),
        (_ACTION[-8:-2], _ACTION[-2:-1].then(Operation.CLIP)),
        depth={"primary": "depth", "secondary": "depth_additional_view"},
    ),
    "maniskill_dataset_converted_externally_to_rlds": OXEDataset(
        _cams("image", "wrist_image"),
        (_obs("tcp_pose"), _STATE[7:8]),
        (_ACTION,),
        _QUAT,
        depth={"primary": "depth", "wrist": "wrist_depth"},
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": OXEDataset(
        _cams("image", "wrist_image"),
        (_STATE[:7], _STATE[-1:]),
        (_ACTION[:3], _ACTION[3:7].then(Operation.TO_EULER), _open_from_closing(_LAST)),
        _QUAT,
    ),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": OXEDataset(
        _cams("highres_image"), _NO_STATE, (_ACTION[:-1],), _NONE
    ),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": OXEDataset(
        _cams("image"), (_STATE[:7], _PAD), (_ACTION[:-1],), _JOINT
    ),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": OXEDataset(
        _cams("image"), _POSE_AND_GRIPPER, (_ACTION[:3], Constant(0.0, 3), _LAST)
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": _AUSTIN,
    "austin_sirius_dataset_converted_externally_to_rlds": _AUSTIN,
    "bc_z": OXEDataset(
        _cams("image"),
        (_obs("present/xyz"), _obs("present/axis_angle"), _PAD, _obs("present/sensed_close")),
        (
            _act("future/xyz_residual")[:3],
            _act("future/axis_angle_residual")[:3],
            _act("future/target_close")[:1].then(Operation.INVERT),
        ),
        language=_NATURAL,
    ),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": _PR2,
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": _PR2,
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": OXEDataset(
        _cams("image", "hand_image", "image2"), (_obs("end_effector_pose"), _PAD, _PAD), (_ACTION,)
    ),
    "utokyo_xarm_bimanual_converted_externally_to_rlds": OXEDataset(
        _cams("image"), (_obs("pose_r"), _PAD, _PAD), (_ACTION[-7:],)
    ),
    "robo_net": OXEDataset(
        _cams("image", secondary="image1"),
        (_STATE[:4], Constant(0.0, 2), _STATE[-1:]),
        (_ACTION[:4], Constant(0.0, 2), _LAST),
    ),
    "berkeley_mvp_converted_externally_to_rlds": OXEDataset(
        _cams(None, "hand_image"), (_obs("pose"), _obs("gripper")), (_ACTION,), _QUAT, ActionEncoding.JOINT_POS
    ),
    "berkeley_rpt_converted_externally_to_rlds": OXEDataset(
        _cams(None, "hand_image"), (_obs("joint_pos"), _obs("gripper")), (_ACTION,), _JOINT, ActionEncoding.JOINT_POS
    ),
    "kaist_nonprehensile_converted_externally_to_rlds": OXEDataset(
        _cams("image"), (_STATE[-7:], _PAD), (_ARM, Constant(0.0)), _QUAT
    ),
    "stanford_mask_vit_converted_externally_to_rlds": OXEDataset(
        _cams("image"),
        (_obs("end_effector_pose")[:4], Constant(0.0, 2), _obs("end_effector_pose")[-1:]),
        (_ACTION[:4], Constant(0.0, 2), _LAST),
    ),
    "tokyo_u_lsmo_converted_externally_to_rlds": OXEDataset(_cams("image"), _POSE_AND_GRIPPER, (_ACTION,)),
    "dlr_sara_pour_converted_externally_to_rlds": OXEDataset(_cams("image"), (_STATE, _PAD, _PAD), (_ACTION,)),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": OXEDataset(
        _cams("image"), (_STATE[:6], _PAD, _PAD), (_ACTION,)
    ),
    "dlr_edan_shared_control_converted_externally_to_rlds": OXEDataset(
        _cams("image"), (_STATE, _PAD), (_ARM, _LAST.then(Operation.INVERT))
    ),
    "asu_table_top_converted_externally_to_rlds": OXEDataset(
        _cams("image"), (Columns("ground_truth_states/EE"), _STATE[-1:]), (_ACTION,)
    ),
    "stanford_robocook_converted_externally_to_rlds": OXEDataset(
        _cams("image_1", secondary="image_2"),
        _POSE_AND_GRIPPER,
        (_ACTION,),
        depth={"primary": "depth_1", "secondary": "depth_2"},
    ),
    "imperialcollege_sawyer_wrist_cam": OXEDataset(
        _cams("image", "wrist_image"), (Constant(0.0, 7), _STATE), (_ACTION[:-1],), _NONE
    ),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": OXEDataset(
        _cams("image", "wrist_image"),
        (_STATE[:7], _STATE[7:8]),
        (_ACTION[:3], _ACTION[3:7].then(Operation.TO_EULER), _ACTION[7:8]),
        _JOINT,
    ),
    "uiuc_d3field": OXEDataset(
        _cams("image_1", secondary="image_2"),
        _NO_STATE,
        (_ACTION, Constant(0.0, 4)),
        _NONE,
        depth={"primary": "depth_1", "secondary": "depth_2"},
    ),
    "utaustin_mutex": OXEDataset(
        _cams("image", "wrist_image"), (_STATE[:8],), (_ARM, _open_from_closing(_LAST)), _JOINT
    ),
    "berkeley_fanuc_manipulation": OXEDataset(
        _cams("image", "wrist_image"),
        (_STATE[:6], _PAD, _STATE[6:7]),
        # The files hold no gripper command, so the gripper's state stands in for it.
        (_ACTION, _STATE[6:7].then(Operation.INVERT)),
        _JOINT,
    ),
    "cmu_playing_with_food": OXEDataset(
        _cams("image", "finger_vision_1"),
        (_STATE, _PAD, _PAD),
        (_ACTION[:3], _ACTION[3:7].then(Operation.TO_EULER), _LAST),
    ),
    "cmu_play_fusion": OXEDataset(_cams("image"), (_STATE,), (_ACTION[:3], _ACTION[-4:]), _JOINT),
    "cmu_stretch": OXEDataset(_cams("image"), (_STATE[:3], Constant(0.0, 3), _STATE[-1:]), (_ACTION[:-1],)),
    "berkeley_gnm_recon": _GNM,
    "berkeley_gnm_cory_hall": _GNM,
    "berkeley_gnm_sac_son": _GNM,
    "droid": OXEDataset(
        _cams("exterior_image_1_left", "wrist_image_left", "exterior_image_2_left"),
        _DROID_STATE,
        _DROID_ACTION,
        swaps_outside_views=True,
        skips_stillness=True,
    ),
    "fmb_dataset": OXEDataset(
        _cams("image_side_1", "image_wrist_1", "image_side_2"),
        (_obs("eef_pose"), _obs("state_gripper_pose")),
        (_ACTION,),
        depth={"primary": "image_side_1_depth", "secondary": "image_side_2_depth", "wrist": "image_wrist_1_depth"},
    ),
    "dobbe": OXEDataset(_cams("wrist_image"), (_STATE,), (_ACTION,)),
    "roboset": OXEDataset(
        _cams("image_left", "image_wrist", "image_right"),
        (_STATE,),
        (_ACTION[:7], _open_from_closing(_LAST)),
        _JOINT,
        ActionEncoding.JOINT_POS,
    ),
    "rh20t": OXEDataset(
        _cams("image_front", "image_wrist", "image_side_right"),
        (_obs("tcp_base"), _obs("gripper_width")),
        (_act("tcp_base"), _act("gripper")),
    ),
    **{
        f"tdroid_{task}": _TDROID
        for task in (
            "carrot_in_bowl",
            "pour_corn_in_pot",
            "flip_pot_upright",
            "move_object_onto_plate",
            "knock_object_over",
            "cover_object_with_towel",
        )
    },
    "droid_wipe": OXEDataset(_cams("exterior_image_2_left", "wrist_image_left"), _DROID_STATE, _DROID_ACTION),
}

# Upstream's named mixtures, written as lists of "dataset:weight" (no weight: 1). A dataset is drawn in proportion to
# weight * number of frames. Two endings of names are shortened: `~` stands for `_dataset_converted_externally_to_rlds`,
# `^` for `_converted_externally_to_rlds`.
Mixture = tuple[tuple[str, float], ...]


def _mixture(text: str) -> Mixture:
    """(dataset, weight) pairs of a list in this module's notation."""
    pairs = []
    for item in text.split():
        name, _, weight = item.partition(":")
        converted = "_converted_externally_to_rlds"
        pairs.append((name.replace("~", f"_dataset{converted}").replace("^", converted), float(weight or 1)))
    return tuple(pairs)


# The weights of RT-1 and kuka in RT-X were carried over by most mixtures that followed.
_RT1_AND_KUKA = "fractal20220817_data:0.54087122203 kuka:0.8341046294"

_RTX = f"""
    {_RT1_AND_KUKA} bridge_orig taco_play:2 jaco_play:2 berkeley_cable_routing:3 roboturk viola:2
    berkeley_autolab_ur5 toto
"""
# The Franka robots that rtx_franka adds. Upstream names four of RT-X's again and skips them when it reads the list.
_FRANKA = """
    stanford_hydra~ austin_buds~:3 nyu_franka_play~:3 maniskill~:0.1 furniture_bench~:0.1 cmu_franka_exploration~:5
    austin_sailor~ austin_sirius~ berkeley_rpt^ kaist_nonprehensile^:3 stanford_robocook^ iamlab_cmu_pickup_insert^
    utaustin_mutex cmu_play_fusion
"""
_SOUP = """
    bridge_orig taco_play:2 jaco_play berkeley_cable_routing roboturk:2 viola:2 berkeley_autolab_ur5:2 toto
    stanford_hydra~:2 austin_buds~ nyu_franka_play~:3 furniture_bench~:0.1 ucsd_kitchen~:2 austin_sailor~ austin_sirius~
    dlr_edan_shared_control^ iamlab_cmu_pickup_insert^ utaustin_mutex berkeley_fanuc_manipulation:2 cmu_stretch
"""
_PLUS = "bc_z:0.2 fmb_dataset dobbe:0.2"

OXE_MIXTURES: dict[str, Mixture] = {
    "bridge": _mixture("bridge_orig"),
    "bridge_rt_1": _mixture("bridge_orig fractal20220817_data"),
    "rtx": _mixture(_RTX),
    "rtx_franka": _mixture(f"{_RTX} {_FRANKA}"),
    "oxe_magic_soup": _mixture(f"{_RT1_AND_KUKA} {_SOUP} language_table:0.1"),
    "oxe_magic_soup_plus": _mixture(f"{_RT1_AND_KUKA} {_SOUP} language_table:0.1 {_PLUS} droid:0.06"),
    # No droid and no language_table, and RT-1 in full.
    "oxe_magic_soup_plus_minus": _mixture(f"fractal20220817_data kuka:0.8341046294 {_SOUP} {_PLUS}"),
}
