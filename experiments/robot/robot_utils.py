"""Helpers shared by every robot benchmark: seeds, gripper conventions, and upstream's `get_model` / `get_action`.

Importing this module loads NumPy only; torch and the model classes are loaded by the functions that need them.

Gripper conventions met along the way:
    policy output   [0, 1], 1 = open   (what the training data hold after the LIBERO transform)
    LIBERO action   [-1, +1], -1 = open
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.robot.policy import Array, PolicyFlags
from prismatic.util.errors import unknown_name

MODEL_FAMILIES = ("openvla",)


def set_seed_everywhere(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the simulator and user code draw from it
    torch.manual_seed(seed)


def normalize_gripper_action(action: Array, binarize: bool = True) -> Array:
    """Map the gripper, the last entry of `action` (..., A), from [0, 1] to [-1, +1]; with `binarize` to its sign.

    Exactly 0.5 binarizes to 0, as upstream's does. A copy is returned; the input is left alone.
    """
    normalized = np.array(action, copy=True)
    gripper = 2.0 * normalized[..., -1] - 1.0
    normalized[..., -1] = np.sign(gripper) if binarize else gripper
    return normalized


def invert_gripper_action(action: Array) -> Array:
    """A copy of `action` (..., A) with the sign of the gripper, its last entry, flipped: the simulator opens at -1."""
    inverted = np.array(action, copy=True)
    inverted[..., -1] *= -1.0
    return inverted


def get_image_resize_size(cfg: PolicyFlags) -> int | tuple[int, int]:
    """Side of the square image that OpenVLA-7B wants; a loaded model's own `image_sizes` go before it."""
    _check_family(cfg)
    return 224


def get_model(cfg: PolicyFlags, wrap_diffusion_policy_for_droid: bool = False) -> Any:
    """Load the model `cfg.pretrained_checkpoint`; the second argument is upstream's, and changes nothing here."""
    from experiments.robot.openvla_utils import get_vla

    _check_family(cfg)
    return get_vla(cfg)


def get_action(
    cfg: PolicyFlags,
    model: Any,
    obs: Mapping[str, Array],
    task_label: str,
    processor: Any = None,
    **components: Any,
) -> list[Array]:
    """Ask the model for a chunk: list of T un-normalized actions (A,).

    Args:
        obs: upstream's observation dict: full_image (H, W, 3), any keys containing "wrist", state (8,).
        components: action_head, proprio_projector, noisy_action_projector, use_film, passed to `get_vla_action`.
    """
    from experiments.robot.openvla_utils import get_vla_action

    _check_family(cfg)
    return get_vla_action(cfg, model, processor, obs, task_label, **components)


def _check_family(cfg: PolicyFlags) -> None:
    if cfg.model_family not in MODEL_FAMILIES:
        raise unknown_name("--model_family", str(cfg.model_family), MODEL_FAMILIES)
