"""`--policy`: what an evaluation asks instead of a checkpoint.

http://HOST:PORT    a server of `POST /act`: vla-scripts/deploy.py, ours or OpenVLA-OFT's
ws://HOST:PORT      a server of openpi's WebSocket protocol, ours or openpi's
MODULE:FACTORY      Python of the user's: FACTORY() returns an object with `act`, see `policy.py`
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from experiments.robot.libero.rollouts.protocol import EvalFlags
from experiments.robot.libero.suites.tasks import find_suite, unnorm_key_for
from experiments.robot.policy import Policy
from prismatic.util.errors import UsageError

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def open_policy(config: EvalFlags) -> tuple[Policy, dict[str, object]]:
    """The policy that `config.policy` names, and what it tells that influences results: for the run's identity.

    Raises UsageError when there is none, or it does not fit LIBERO.
    """
    if "://" in config.policy:
        return _open_server(config)
    if not _FACTORY.fullmatch(config.policy):
        accepted = "http://HOST:PORT, ws://HOST:PORT, MODULE:FACTORY"
        raise UsageError(f"--policy: found {config.policy!r}; accepted: {accepted}")
    return _open_factory(config)


def _open_server(config: EvalFlags) -> tuple[Policy, dict[str, object]]:
    from experiments.robot.serving.access import read_token
    from experiments.robot.serving.remote import TIMEOUT_S, open_remote

    policy = open_remote(
        config.policy,
        token=read_token(""),
        timeout_s=config.policy_timeout or TIMEOUT_S,
        gripper=config.policy_gripper if find_suite(config.task_suite_name).robot.flips_gripper else "policy",
    )
    metadata = policy.metadata
    policy.unnorm_key = _unnorm_key(config, metadata)
    _check_sizes(config, metadata)
    known = {"remote": config.policy.partition(":")[0], "gripper": "libero" if policy.simulator_gripper else "policy"}
    # A checkpoint's hash says more than an address, which may change while the policy stays the same.
    place = {} if metadata.get("checkpoint_hash") else {"address": config.policy}
    settings = metadata.get("settings")
    identity = {
        "checkpoint_hash": metadata.get("checkpoint_hash") or None,
        "unnorm_key": policy.unnorm_key or metadata.get("unnorm_key", ""),
        "policy": {"name": metadata.get("policy", "server"), **known, **place, "metadata": metadata},
        "numerics": settings.get("numerics", []) if isinstance(settings, dict) else [],
    }
    return policy, identity


def _unnorm_key(config: EvalFlags, metadata: Mapping[str, object]) -> str:
    """The statistics to ask for: those that a checkpoint would be evaluated with, else the server's default ("")."""
    keys = metadata.get("unnorm_keys")
    if not isinstance(keys, list):
        return str(config.unnorm_key)
    default = str(metadata.get("unnorm_key") or "")
    return unnorm_key_for(dict.fromkeys(keys), config.unnorm_key, config.task_suite_name, default)


def _check_sizes(config: EvalFlags, metadata: Mapping[str, object]) -> None:
    chunk, size = metadata.get("action_horizon"), metadata.get("action_dim")
    if isinstance(chunk, int) and config.num_open_loop_steps > chunk:
        raise UsageError(
            f"--num_open_loop_steps: found {config.num_open_loop_steps}; "
            f"accepted: 1 to {chunk}, the chunk length of the policy at {config.policy}"
        )
    robot = find_suite(config.task_suite_name).robot
    if isinstance(size, int) and size != robot.platform.action_dim:
        raise UsageError(
            f"--policy: {config.policy} answers {size} numbers an action; "
            f"accepted: {robot.platform.action_dim}, as {robot.name} takes"
        )


def _open_factory(config: EvalFlags) -> tuple[Policy, dict[str, object]]:
    from experiments.robot.wrappers import TimeLimited

    module, _, name = config.policy.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        where = f"looked in {Path.cwd()} and the installed packages"
        raise UsageError(f"--policy: {config.policy}: {error}; {where}") from None
    except AttributeError:
        raise UsageError(f"--policy: module {module} has no {name!r}") from None
    policy = factory()
    if not callable(getattr(policy, "act", None)):
        raise UsageError(f"--policy: {config.policy} made a {type(policy).__name__}, which has no method act(queries)")
    metadata = getattr(policy, "metadata", {})
    identity: dict[str, object] = {
        "policy": {"name": name, "factory": config.policy, "metadata": metadata},
        "numerics": [],
    }
    limited = TimeLimited(policy, config.policy_timeout) if config.policy_timeout else policy
    return limited, identity
