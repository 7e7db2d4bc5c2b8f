"""The policy class that answers for a checkpoint in a simulator, by its family."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from experiments.robot.policy import Policy, PolicyFlags
from prismatic.checkpoint.folder import FOREIGN, Checkpoint

PolicyT = TypeVar("PolicyT")


def load_policy(checkpoint: Checkpoint, cfg: PolicyFlags, unnorm_key: str) -> Policy:
    """Load the policy of a checkpoint. Raises UsageError: it lacks something or does not fit."""
    if checkpoint.family == "openvla":
        from experiments.robot.openvla_utils import OpenVLAPolicy

        return verified(OpenVLAPolicy.from_checkpoint(checkpoint, cfg, unnorm_key), checkpoint, cfg)
    from experiments.robot.pi_policy import OpenPISimulated, PiActingPolicy

    kind = OpenPISimulated if checkpoint.platform.name in FOREIGN else PiActingPolicy
    return verified(kind.from_checkpoint(checkpoint, cfg, unnorm_key), checkpoint, cfg)


def verified(policy: PolicyT, checkpoint: Checkpoint, cfg: PolicyFlags) -> PolicyT:
    """`policy`, with `--verify` after it gave the answer that its checkpoint recorded. Raises UsageError: another."""
    if getattr(cfg, "verify", False):
        from experiments.robot.probe import verify_probe

        verify_probe(checkpoint, cast(Any, policy))
    return policy
