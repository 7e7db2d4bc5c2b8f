"""The class that XPolicyLab's policy server drives. deploy.yml lists the settings."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from experiments.robot.policy import Array, Query
from experiments.robot.robotwin.policy import RoboTwinPolicy, from_xpolicylab, to_xpolicylab
from prismatic.util.errors import UsageError


class Model:
    """A policy for two arms, with joint actions."""

    def __init__(self, model_cfg: Mapping[str, Any]) -> None:
        if model_cfg.get("action_type") not in (None, "joint"):
            raise UsageError(f"action_type: {model_cfg['action_type']} found; accepted: joint")
        self._policy = RoboTwinPolicy(model_cfg)
        self._queries: list[Query] = []
        self._environments: list[int] = []
        self._prepared = 0

    def prepare_case(self, case_meta: Mapping[str, Any]) -> None:
        """Begin an episode of one of RoboTwin's workers, each of which has a connection of its own to this server.

        RoboTwin names the worker at the end of `action_case_id`, and in its observations as `env_idx`.
        """
        worker = re.search(r"-worker(\d+)$", str(case_meta.get("action_case_id", "")))
        told = {name: case_meta[name] for name in ("task_name", "seed") if name in case_meta}
        self._policy.reset(int(worker[1]) if worker else 0, **told)
        self._prepared += 1

    def update_obs(self, obs: Mapping[str, Any]) -> None:
        """Take the observation that is acted on next."""
        self.update_obs_batch([obs])

    def update_obs_batch(self, obs_list: Sequence[Mapping[str, Any]]) -> None:
        """The same for several environments."""
        self._queries = [from_xpolicylab(obs) for obs in obs_list]
        self._environments = [int(obs.get("env_idx", number)) for number, obs in enumerate(obs_list)]

    def get_action(self) -> list[dict[str, Array]]:
        """A chunk of actions."""
        return self.get_action_batch()[0]

    def get_action_batch(self, env_idx_list: Sequence[int] | None = None) -> list[list[dict[str, Array]]]:
        """A chunk for each environment, in the order of its observations."""
        if not self._queries:
            raise UsageError("get_action: no observation found; accepted: a call of update_obs before")
        chunks = self._policy.act(self._queries, self._environments)
        return [[to_xpolicylab(action) for action in chunk] for chunk in chunks]

    def reset(self) -> None:
        """Begin an episode of all environments, unless `prepare_case` has just begun one worker's."""
        self._queries = []
        if self._prepared:
            self._prepared -= 1
        else:
            self._policy.reset()
