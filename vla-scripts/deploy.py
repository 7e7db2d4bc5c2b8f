"""Serve a policy to robots and harnesses on one port: HTTP as OpenVLA-OFT, WebSocket as openpi and as vla-eval.

    python vla-scripts/deploy.py --pretrained_checkpoint CKPT --unnorm_key libero_spatial_no_noops

The server listens on this machine alone unless `--host` says otherwise. A token is asked for when the environment
variable POLICY_SERVER_TOKEN or `--token_file` holds one. docs/serving.md describes the protocols.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.robot.policy import PolicyFlags
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.flags import check, limited

# An alias, since draccus finds no help beside a field whose annotation has quotes.
Gripper = Literal["policy", "libero"]


@dataclass
class DeployConfig(PolicyFlags):
    """OpenVLA-OFT's server flags, and ours."""

    # What is served
    unnorm_key: str = ""  # Statistics for requests that name none; default: the only one, else requests must name it
    seed: int = limited(7, least=0)  # Of torch; diffusion noise depends on the request's seed alone
    # Accepted for compatibility; turning relative actions into absolute ones is the client's part
    use_relative_actions: bool = False

    # Where it listens
    host: str = "127.0.0.1"  # Address to listen on; 0.0.0.0: all of this machine's
    port: int = limited(8777, least=0, most=2**16 - 1)  # 0: any free port

    # Ours
    token_file: str = ""  # File with the token that clients must send; default: POLICY_SERVER_TOKEN, else no token
    max_batch: int = limited(16, least=1)  # Most requests answered in one forward pass
    max_wait_ms: float = limited(3.0, least=0, most=1000)  # How long a request waits for others to share a forward pass
    max_request_mb: float = limited(32.0, above=0)  # Larger requests are refused
    websocket_gripper: Gripper = "policy"  # policy: as trained; libero: -1 = open, as openpi's LIBERO client expects


def check_flags(config: DeployConfig) -> None:
    """Refuse wrong flags before anything is loaded. Raises UsageError: a flag has a value that cannot work."""
    check(config)
    if config.use_l1_regression and config.use_diffusion:
        raise UsageError("--use_l1_regression, --use_diffusion: both are True; accepted: one of them, or none")
    try:
        import fastapi  # noqa: F401 - is it there?
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the server needs {error.name}: pip install 'rocket-vla[serve]'") from None


def main(config: DeployConfig) -> int:
    """Load the policy and serve it until interrupted; returns 0."""
    check_flags(config)
    from experiments.robot.robot_utils import set_seed_everywhere
    from experiments.robot.serving.access import read_token
    from prismatic.checkpoint.folder import check_policy_flags, open_checkpoint, resolve_unnorm_key
    from prismatic.checkpoint.foreign import for_robot

    token = read_token(config.token_file)
    checkpoint = open_checkpoint(config.pretrained_checkpoint, config.base_checkpoint or None)
    keys = sorted(checkpoint.statistics)
    default_key = config.unnorm_key or (keys[0] if len(keys) == 1 else "")
    if default_key:
        default_key = resolve_unnorm_key(checkpoint.statistics, default_key, "")
    checkpoint = for_robot(checkpoint, default_key, config.delta_actions)
    check_policy_flags(config, checkpoint, default_key or keys[0])
    from experiments.robot.serving.server import PolicyServer, ServerSettings, bind_address, load_served, warm_up

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    address = bind_address(config.host, config.port)
    set_seed_everywhere(config.seed)
    policy = load_served(checkpoint, config, default_key or keys[0])
    spec = policy.spec(Path(config.pretrained_checkpoint).name, default_key, checkpoint.fingerprint())
    settings = ServerSettings(
        host=config.host,
        port=config.port,
        token=token,
        max_batch=config.max_batch,
        max_wait_s=config.max_wait_ms / 1000,
        max_request_bytes=int(config.max_request_mb * 1e6),
        websocket_gripper=config.websocket_gripper,
    )
    server = PolicyServer(policy, spec, settings, address)
    warm_up(policy, spec)
    if token is None and config.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: anyone who reaches {config.host} can use this server: no token is set", file=sys.stderr)
    print(f"serving {spec.name} at {server.url} (POST /act; WebSocket /, /vla-eval); stop with Ctrl-C", flush=True)
    server.run()
    return 0


if __name__ == "__main__":
    run(DeployConfig, main)
