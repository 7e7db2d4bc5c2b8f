"""Policy families: all that training, evaluation and analyses have to know of a policy, one class each.

`get_family` imports a family when it is asked for, so that flags are checked without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from prismatic.checkpoint.folder import StartingPoint, resolve_checkpoint

if TYPE_CHECKING:
    from prismatic.policies.base import PolicyFamily
    from prismatic.training.config import TrainConfig

_HOMES = {
    "openvla": "prismatic.policies.openvla:OpenVLA",
    "pi0": "prismatic.policies.pi:Pi0",
    "pi05": "prismatic.policies.pi:Pi05",
}


def get_family(kind: str) -> PolicyFamily:
    """The family of that name, see :data:`prismatic.checkpoint.layout.FAMILIES`."""
    module, _, name = _HOMES[kind].partition(":")
    return getattr(import_module(module), name)()


def family_of(config: TrainConfig) -> tuple[PolicyFamily, StartingPoint]:
    """The family of the policy that the flags train, and where its training starts."""
    start = resolve_checkpoint(config)
    return get_family(start.kind), start


def student_depth(config: TrainConfig) -> int:
    """Blocks of the base model's language model, from its config file alone."""
    family, start = family_of(config)
    return family.depth(start.base)
