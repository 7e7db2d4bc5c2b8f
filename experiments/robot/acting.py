"""The policy class that answers for a checkpoint in a simulator, by its family."""

from __future__ import annotations

from experiments.robot.policy import Policy, PolicyFlags
from prismatic.checkpoint.folder import OPENPI, Checkpoint


def load_policy(checkpoint: Checkpoint, cfg: PolicyFlags, unnorm_key: str) -> Policy:
    """Load the policy of a checkpoint. Raises UsageError: it lacks something or does not fit."""
    if checkpoint.family == "openvla":
        from experiments.robot.openvla_utils import OpenVLAPolicy

        return OpenVLAPolicy.from_checkpoint(checkpoint, cfg, unnorm_key)
    from experiments.robot.pi_policy import OpenPISimulated, PiActingPolicy

    kind = OpenPISimulated if checkpoint.platform.name == OPENPI else PiActingPolicy
    return kind.from_checkpoint(checkpoint, cfg, unnorm_key)
