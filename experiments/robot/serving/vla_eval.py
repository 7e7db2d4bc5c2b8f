"""vla-eval's side of the policy server: `server: {url: "ws://HOST:PORT/vla-eval"}` in its configuration.

vla-eval (https://github.com/allenai/vla-evaluation-harness) speaks msgpack messages {type, payload, seq, timestamp}:

    hello          what harness and policy are; our answer asks for the observations the policy needs
    episode_start  {"task": {name, suite, task_id, episode_idx, ...}}; no answer
    observation    {"images": {name: picture}, "states": (8,), "task_description": text} -> action {"actions": (A,)}
    episode_end    no answer

Not obvious:
- It asks at every step. A chunk is computed at the first and answered action by action; an episode's start drops it.
- It closes the gripper at +1: actions are answered as the simulator takes them.
- It does not name statistics: the task's suite decides, by the rule of the evaluation command; suites that are none of
  LIBERO's take the server's default.
- Its images come from the camera, whatever their size: never taken as prepared.
- In RoboTwin (ALOHA's platforms) states are called `joint_state`, and actions are joints, answered as they are; the
  task's name decides the statistics.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping

import numpy as np

from experiments.robot.libero.suites.tasks import unnorm_key_for
from experiments.robot.policy import Array
from experiments.robot.robot_utils import invert_gripper_action, normalize_gripper_action
from experiments.robot.robotwin.policy import clip_grippers, robotwin_keys
from experiments.robot.serving.observation import PolicySpec, RequestError
from experiments.robot.serving.wire import WireError, from_msgpack, to_vla_eval
from prismatic.util.errors import UsageError
from prismatic.vla.platforms import ALOHA, ALOHA_AGILEX, LIBERO

PROTOCOL_VERSION = 1
_STATES = ("states", "state", "joint_state")
Infer = Callable[[dict[str, object]], Awaitable[Array]]


class VlaEvalSession:
    """The conversation of one connection.

    Args:
        infer: an observation in the words of `POST /act` -> chunk (T, A), gripper 1 = open.
    """

    def __init__(self, spec: PolicySpec, infer: Infer) -> None:
        self._spec, self._infer = spec, infer
        self._actions: deque[Array] = deque()
        self._task: Mapping[str, object] = {}
        self._step = 0
        self._seq = 0

    async def answer(self, data: bytes | None) -> bytes | None:
        """The reply to one message, or None where the protocol has none; a wrong message gets an error reply."""
        try:
            kind, payload = self._open(data)
            if kind == "hello":
                return self._message("hello", hello(self._spec))
            if kind == "episode_start":
                self._start(payload)
            elif kind == "observation":
                return self._message("action", {"actions": await self._next_action(payload)})
        except (WireError, RequestError) as error:
            return self.error(str(error))
        return None

    def error(self, reason: str) -> bytes:
        """The reply to a message that cannot be answered."""
        return self._message("error", {"error": reason})

    def _open(self, data: bytes | None) -> tuple[str, Mapping[str, object]]:
        self._seq = 0
        message = from_msgpack(data, lenient=True) if data is not None else None
        if not isinstance(message, Mapping) or not isinstance(message.get("payload"), Mapping):
            raise RequestError("message: found no {type, payload, seq, timestamp}; accepted: vla-eval's messages")
        seq = message.get("seq")
        self._seq = seq if isinstance(seq, int) else 0
        kinds = ("hello", "episode_start", "observation", "episode_end", "error")
        if message.get("type") not in kinds:
            raise RequestError(f"type: found {str(message.get('type'))[:40]!r}; accepted: {', '.join(kinds)}")
        return str(message["type"]), message["payload"]

    def _start(self, payload: Mapping[str, object]) -> None:
        task = payload.get("task")
        self._task = task if isinstance(task, Mapping) else {}
        self._actions.clear()
        self._step = 0

    async def _next_action(self, observation: Mapping[str, object]) -> Array:
        if not self._actions:
            chunk_TA = await self._infer(self._payload(observation))
            if self._spec.platform.name == ALOHA_AGILEX.name:
                chunk_TA = clip_grippers(chunk_TA)
            elif self._spec.platform.name != ALOHA.name:
                chunk_TA = invert_gripper_action(normalize_gripper_action(chunk_TA))
            self._actions.extend(np.asarray(chunk_TA, dtype=np.float32))
        self._step += 1
        return self._actions.popleft()

    def _payload(self, observation: Mapping[str, object]) -> dict[str, object]:
        images = observation.get("images")
        if not isinstance(images, Mapping) or not images:
            raise RequestError("images: found none; accepted: {name: picture}, the third-person camera first")
        views = ["full_image", "wrist_image", *(f"wrist_image_{number}" for number in range(2, len(images)))]
        suite = self._task.get("suite")
        place = ":".join(str(self._task.get(name)) for name in ("suite", "task_id", "episode_idx"))
        return {
            **dict(zip(views, images.values())),
            "state": next((observation[name] for name in _STATES if name in observation), None),
            "instruction": observation.get("task_description"),
            "unnorm_key": self._unnorm_key(suite) if isinstance(suite, str) else "",
            "seed": zlib.crc32(f"{place}:{self._step}".encode()),
            "prepared": False,
        }

    def _unnorm_key(self, suite: str) -> str:
        own = [key for key in robotwin_keys(self._task.get("name")) if key in self._spec.unnorm_keys]
        if own and _has_two_arms(self._spec):
            return own[0]
        try:
            return unnorm_key_for(dict.fromkeys(self._spec.unnorm_keys), "", suite, self._spec.unnorm_key)
        except UsageError as error:
            raise RequestError(f"task suite {suite!r}: {error}; or of the server, another --unnorm_key") from error

    def _message(self, kind: str, payload: Mapping[str, object]) -> bytes:
        return to_vla_eval({"type": kind, "payload": payload, "seq": self._seq, "timestamp": time.time()})


def hello(spec: PolicySpec) -> dict[str, object]:
    """Settings for vla-eval: which observations to send, and the conventions that it checks against its benchmark's."""
    reply = {"protocol_version": PROTOCOL_VERSION, "model_server": spec.name, "capabilities": {}, **spec.metadata()}
    if _has_two_arms(spec):
        views = ("head_camera", "left_camera", "right_camera")[: spec.num_images]
        observations = {view: _dimensions("image", 0, "rgb_hwc_uint8") for view in views}
        if spec.use_proprio:
            observations["state"] = _dimensions("state", 0, "joint_positions")
        observations["language"] = _dimensions("language", 0, "language")
        joints = _dimensions("joints", spec.platform.action_dim, "joint_positions")
        return {**reply, "action_spec": {"joints": joints}, "observation_spec": observations}
    reply["gripper"], reply["gripper_open"] = "-1 = open, +1 = closed", -1
    if spec.platform.name != LIBERO.name:
        return reply
    wanted: dict[str, object] = {"env_seed": 0, "quat_no_antipodal": True}  # as the training data were recorded
    observations = {"agentview": _dimensions("image", 0, "rgb_hwc_uint8")}
    if spec.num_images > 1:
        wanted["send_wrist_image"] = True
        observations["wrist"] = _dimensions("image", 0, "rgb_hwc_uint8")
    if spec.use_proprio:
        wanted["send_state"] = True
        observations["state"] = _dimensions("state", 8, "eef_pos3_axisangle3_gripper2")
    observations["language"] = _dimensions("language", 0, "language")
    actions = {
        "position": _dimensions("position", 3, "delta_xyz", [-1, 1]),
        "rotation": _dimensions("rotation", 3, "axis_angle", [-3.15, 3.15]),
        "gripper": _dimensions("gripper", 1, "binary_close_positive", [-1, 1]),
    }
    return {**reply, "observation_params": wanted, "action_spec": actions, "observation_spec": observations}


def _has_two_arms(spec: PolicySpec) -> bool:
    return spec.platform.name in (ALOHA.name, ALOHA_AGILEX.name)


def _dimensions(name: str, dims: int, convention: str, limits: list[float] | None = None) -> dict[str, object]:
    return {"name": name, "dims": dims, "format": convention, **({"range": limits} if limits else {})}
