"""A checkpoint, or a policy server, in the words of RoboTwin: used by the adapters to both of its conventions.

Not obvious:
- RoboTwin wants Python 3.10 and a torch of its own. With `server`, its process needs NumPy and PyYAML, and the
  checkpoint runs in this project's environment, behind vla-scripts/deploy.py. Without, it is loaded in the process.
- Images go head, left wrist, right wrist; RoboTwin's own pi0 adapter hands them over as head, right, left.
- Answers are absolute joint targets, and grippers are clipped to [0, 1].
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.policy import Array, Policy, PolicyFlags, Query
from prismatic.util.errors import UsageError
from prismatic.vla.platforms import ALOHA_AGILEX

ACTION_DIM = ALOHA_AGILEX.action_dim
GRIPPERS = (6, 13)
_ARMS = ("left", "right")


def from_raw(observation: Mapping[str, Any], instruction: str) -> Query:
    """The query in an observation of RoboTwin's tasks."""
    cameras = observation["observation"]
    views = [cameras[name]["rgb"] for name in ("head_camera", "left_camera", "right_camera")]
    return _query(views, observation["joint_action"]["vector"], instruction)


def from_xpolicylab(observation: Mapping[str, Any]) -> Query:
    """The query in an observation of XPolicyLab's format v1.0."""
    cameras, joints = observation["vision"], observation["state"]
    views = [cameras[name]["color"] for name in ("cam_head", "cam_left_wrist", "cam_right_wrist")]
    parts = [joints[f"{arm}_{part}_joint_state"] for arm in _ARMS for part in ("arm", "ee")]
    return _query(views, np.concatenate([np.atleast_1d(part) for part in parts]), observation["instruction"])


def to_xpolicylab(action: Array) -> dict[str, Array]:
    """An action (14,) as XPolicyLab names its parts."""
    halves = dict(zip(_ARMS, np.split(action, 2), strict=True))
    return {
        f"{arm}_{part}_joint_state": half[:6] if part == "arm" else half[6:]
        for arm, half in halves.items()
        for part in ("arm", "ee")
    }


def clip_grippers(chunk: Array) -> Array:
    """A chunk (T, 14) with grippers in [0, 1]."""
    clipped = np.array(chunk, np.float64)
    clipped[:, GRIPPERS] = clipped[:, GRIPPERS].clip(0.0, 1.0)
    return clipped


def _query(views: Sequence[Array], state: Array, instruction: object) -> Query:
    vector = np.asarray(state, np.float64).reshape(-1)
    if vector.shape != (ACTION_DIM,):
        raise UsageError(f"state: {len(vector)} numbers found; accepted: the {ACTION_DIM} of aloha-agilex's two arms")
    head, left, right = (np.asarray(view) for view in views)
    return Query(head, left, vector, str(instruction), extra_images=(right,))


@dataclass
class _Episode:
    """An environment's episode: `case` is what the harness tells of it."""

    number: int
    case: Mapping[str, object] = field(default_factory=dict)
    asked: int = 0
    instruction: str | None = None


class RoboTwinPolicy:
    """Answers action chunks; one line of `record` tells the settings, and one the instruction of each episode.

    Args:
        settings: of the adapter's YAML file. checkpoint_path or server; any of `PolicyFlags`, by default as the
            checkpoint's run recorded them; unnorm_key; num_open_loop_steps; record; and those of RoboTwin
            (task_name, task_config, seed, instruction_type), which are recorded.

    Raises:
        UsageError: a setting is wrong.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self.policy, described = self._connect() if "server" in self.settings else self._load()
        if described["action_dim"] != ACTION_DIM:
            raise UsageError(f"policy: actions of {described['action_dim']} numbers found; accepted: {ACTION_DIM}")
        chunk = described["action_horizon"]
        steps = self.settings.get("num_open_loop_steps", chunk)
        if str(steps) not in map(str, range(1, chunk + 1)):
            raise UsageError(f"num_open_loop_steps: {steps} found; accepted: 1 to {chunk}, the policy's chunk")
        self.steps, self._begun = int(steps), 0
        self._episodes: dict[int, _Episode] = {}
        names = ("task_name", "task_config", "env_cfg_type", "seed", "instruction_type", "server")
        told = {name: self.settings.get(name) for name in names}
        self._note({**told, "num_open_loop_steps": self.steps, **described})

    def reset(self, environment: int | None = None, **case: object) -> None:
        """Begin an episode: of all environments, or of `environment` alone, whose episodes then count by themselves.

        Args:
            case: what tells this episode from others (task_name, seed), for the record and the noise.
        """
        if environment is None:
            self._begun, self._episodes = self._begun + 1, {}
            return
        before = self._episodes.get(environment)
        self._episodes[environment] = _Episode(before.number + 1 if before else 1, case)

    def act(self, queries: Sequence[Query], environments: Sequence[int] = ()) -> list[Array]:
        """Chunks (T, 14) to be executed, of absolute joints and grippers in [0, 1].

        Args:
            queries: of one or more environments.
            environments: their numbers, for the record and the noise; by default those of a single one, 0 and on.
        """
        asked = []
        for number, query in zip(environments or range(len(queries)), queries, strict=True):
            episode = self._episodes.setdefault(number, _Episode(self._begun))
            if episode.instruction != query.instruction:
                episode.instruction = query.instruction
                numbered = {"environment": number} if environments else {}
                self._note({"episode": episode.number, **numbered, **episode.case, "instruction": query.instruction})
            episode.asked += 1
            names = [*episode.case.values()] or [episode.number]
            place = ":".join(map(str, [self.settings.get("seed", 0), *names, episode.asked]))
            noise = zlib.crc32(place.encode()) + (0 if episode.case else number)
            asked.append(replace(query, seed=noise))
        chunks = []
        for answer in self.policy.act(asked):
            if isinstance(answer, Exception):
                raise answer
            chunks.append(clip_grippers(answer[: self.steps]))
        return chunks

    def _connect(self) -> tuple[Policy, dict[str, Any]]:
        from experiments.robot.serving.access import read_token
        from experiments.robot.serving.remote import open_remote

        server = str(self.settings["server"])
        if told := self.settings.get("delta_actions"):
            raise UsageError(
                f"delta_actions: {told} found beside server {server}; accepted: with checkpoint_path (a server takes "
                "--delta_actions of its own)"
            )
        remote = open_remote(server, name="server", token=read_token(""), gripper="policy")
        described = remote.metadata
        keys = described.get("unnorm_keys")
        if not isinstance(keys, list) or not {"action_dim", "action_horizon"} <= set(described):
            raise UsageError(f"server: {server} does not say what it serves; accepted: one of vla-scripts/deploy.py")
        remote.unnorm_key = self._unnorm_key(keys, str(described.get("unnorm_key") or ""))
        return remote, {**described, "unnorm_key": remote.unnorm_key}

    def _load(self) -> tuple[Policy, dict[str, Any]]:
        from experiments.robot.acting import load_policy
        from prismatic.checkpoint.folder import check_policy_flags, open_checkpoint
        from prismatic.checkpoint.foreign import for_robot
        from prismatic.checkpoint.layout import recorded_policy_flags
        from prismatic.util.cli import parse

        name = self.settings.get("checkpoint_path") or self.settings.get("ckpt_name")
        if not name:
            raise UsageError("checkpoint_path: not given; accepted: a checkpoint's folder, or server: http://HOST:PORT")
        checkpoint = open_checkpoint(str(name), self.settings.get("base_checkpoint"))
        trained = recorded_policy_flags(checkpoint.path)
        given = {field.name: self.settings[field.name] for field in fields(PolicyFlags) if field.name in self.settings}
        key = self._unnorm_key(checkpoint.statistics, "")
        values = {"num_images_in_input": 3, **trained, **given, "pretrained_checkpoint": name}
        flags = parse(PolicyFlags, [f"--{flag}={value}" for flag, value in values.items()])
        checkpoint = for_robot(checkpoint, key, flags.delta_actions)
        check_policy_flags(flags, checkpoint, key)
        platform = checkpoint.platform
        sizes = {"action_dim": platform.action_dim, "action_horizon": platform.chunk, "platform": platform.name}
        hashed = {"unnorm_key": key, "policy": str(name), "checkpoint_hash": checkpoint.fingerprint()}
        told = {"delta_actions": self.settings.get("delta_actions"), **sizes, **hashed}
        return load_policy(checkpoint, flags, key), told

    def _unnorm_key(self, keys: Collection[str], default: str) -> str:
        """The statistics named by the settings, else the task's, else the only ones."""
        wanted = self.settings.get("unnorm_key") or ""
        choices = (
            [wanted] if wanted else robotwin_keys(self.settings.get("task_name"), self.settings.get("task_config"))
        )
        key = next((key for key in choices if key in keys), "" if wanted else default)
        if not key and (wanted or len(keys) != 1):
            raise UsageError(f"unnorm_key: {wanted or 'nothing'} found; accepted: {', '.join(sorted(keys))}")
        return key or next(iter(keys))

    def _note(self, row: Mapping[str, object]) -> None:
        """Add a line to the record, if one is kept."""
        if path := self.settings.get("record"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row, default=str) + "\n")


def robotwin_keys(task: object, config: object = None) -> list[str]:
    """Names of a task's statistics, the likeliest first: those of how it is evaluated, then of the other way."""
    kinds = dict.fromkeys([str(config or "demo_clean").removeprefix("demo_"), "clean", "randomized"])
    return [f"robotwin_{task}_{kind}" for kind in kinds] + [f"robotwin_{kind}" for kind in kinds]
