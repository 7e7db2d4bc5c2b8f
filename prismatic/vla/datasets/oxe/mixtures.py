"""Upstream's named mixtures of Open X-Embodiment datasets.

Mixture name -> (dataset, weight) pairs; a dataset is drawn in proportion to weight * number of frames.
"""

from __future__ import annotations

Mixture = tuple[tuple[str, float], ...]

_EXTERNAL = "_dataset_converted_externally_to_rlds"

# The weights of RT-1's and kuka's frames in RT-X, carried over by every mixture that followed.
_FRACTAL = ("fractal20220817_data", 0.54087122203)
_KUKA = ("kuka", 0.8341046294)

_RTX: Mixture = (
    _FRACTAL,
    _KUKA,
    ("bridge_orig", 1.0),
    ("taco_play", 2.0),
    ("jaco_play", 2.0),
    ("berkeley_cable_routing", 3.0),
    ("roboturk", 1.0),
    ("viola", 2.0),
    ("berkeley_autolab_ur5", 1.0),
    ("toto", 1.0),
)

# The Franka robots that rtx_franka adds. Upstream names four of RT-X's again and skips them when it reads the list.
_FRANKA: Mixture = (
    (f"stanford_hydra{_EXTERNAL}", 1.0),
    (f"austin_buds{_EXTERNAL}", 3.0),
    (f"nyu_franka_play{_EXTERNAL}", 3.0),
    (f"maniskill{_EXTERNAL}", 0.1),
    (f"furniture_bench{_EXTERNAL}", 0.1),
    (f"cmu_franka_exploration{_EXTERNAL}", 5.0),
    (f"austin_sailor{_EXTERNAL}", 1.0),
    (f"austin_sirius{_EXTERNAL}", 1.0),
    ("berkeley_rpt_converted_externally_to_rlds", 1.0),
    ("kaist_nonprehensile_converted_externally_to_rlds", 3.0),
    ("stanford_robocook_converted_externally_to_rlds", 1.0),
    ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", 1.0),
    ("utaustin_mutex", 1.0),
    ("cmu_play_fusion", 1.0),
)

_SOUP_ROBOTS: Mixture = (
    ("taco_play", 2.0),
    ("jaco_play", 1.0),
    ("berkeley_cable_routing", 1.0),
    ("roboturk", 2.0),
    ("viola", 2.0),
    ("berkeley_autolab_ur5", 2.0),
    ("toto", 1.0),
    (f"stanford_hydra{_EXTERNAL}", 2.0),
    (f"austin_buds{_EXTERNAL}", 1.0),
    (f"nyu_franka_play{_EXTERNAL}", 3.0),
    (f"furniture_bench{_EXTERNAL}", 0.1),
    (f"ucsd_kitchen{_EXTERNAL}", 2.0),
    (f"austin_sailor{_EXTERNAL}", 1.0),
    (f"austin_sirius{_EXTERNAL}", 1.0),
    ("dlr_edan_shared_control_converted_externally_to_rlds", 1.0),
    ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", 1.0),
    ("utaustin_mutex", 1.0),
    ("berkeley_fanuc_manipulation", 2.0),
    ("cmu_stretch", 1.0),
)
_SOUP: Mixture = (_FRACTAL, _KUKA, ("bridge_orig", 1.0), *_SOUP_ROBOTS, ("language_table", 0.1))
_PLUS: Mixture = (("bc_z", 0.2), ("fmb_dataset", 1.0), ("dobbe", 0.2))

OXE_MIXTURES: dict[str, Mixture] = {
    "bridge": (("bridge_orig", 1.0),),
    "bridge_rt_1": (("bridge_orig", 1.0), ("fractal20220817_data", 1.0)),
    "rtx": _RTX,
    "rtx_franka": (*_RTX, *_FRANKA),
    "oxe_magic_soup": _SOUP,
    "oxe_magic_soup_plus": (*_SOUP, *_PLUS, ("droid", 0.06)),
    # No droid and no language_table, and RT-1 in full.
    "oxe_magic_soup_plus_minus": (
        ("fractal20220817_data", 1.0),
        _KUKA,
        ("bridge_orig", 1.0),
        *_SOUP_ROBOTS,
        *_PLUS,
    ),
}
