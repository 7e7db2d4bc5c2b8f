"""Upstream's named mixtures of Open X-Embodiment datasets, written as lists of "dataset:weight" (no weight: 1).

A dataset is drawn in proportion to weight * number of frames. Two endings of names are shortened: `~` stands for
`_dataset_converted_externally_to_rlds`, `^` for `_converted_externally_to_rlds`.
"""

from __future__ import annotations

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
