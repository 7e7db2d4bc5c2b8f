"""From what a client sent to a query of the policy: every field checked, wrong ones named in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from experiments.robot.policy import Array, Query
from experiments.robot.serving.wire import Unreadable
from prismatic.checkpoint.folder import resolve_unnorm_key
from prismatic.util.errors import UsageError
from prismatic.vla.platforms import Platform

MAX_SIDE = 4096  # pixels of an image
MAX_INSTRUCTION = 1000  # characters
# Names that openpi's clients use, in our (upstream's) words.
_OPENPI_NAMES = {"prompt": "instruction", "image": "full_image", "wrist_image": "wrist_image", "state": "state"}


class RequestError(ValueError):
    """A request that cannot be answered; the message is one line for the client."""


@dataclass(frozen=True)
class PolicySpec:
    """Inputs and outputs of a served policy.

    Attributes:
        name: the checkpoint, for people.
        num_images: camera views: full_image first, then wrist views.
        image_size: (height, width) of the images inside the policy; other sizes are resized as in evaluation.
        unnorm_keys: data sets whose statistics can un-normalize actions; `unnorm_key` is the default, "" for none.
        checkpoint_hash: of every file that influences the policy, "" when unknown.
        settings: what else influences its answers, for the records of whoever evaluates it.
    """

    name: str
    platform: Platform
    num_images: int
    image_size: tuple[int, int]
    use_proprio: bool
    unnorm_keys: tuple[str, ...]
    unnorm_key: str = ""
    checkpoint_hash: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)

    def metadata(self) -> dict[str, object]:
        """Answer of `GET /metadata`, and first message to a WebSocket client."""
        return {
            "policy": self.name,
            "platform": self.platform.name,
            "action_horizon": self.platform.chunk,
            "action_dim": self.platform.action_dim,
            "gripper": "as in the training data; LIBERO: last action dimension in [0, 1], 1 = open",
            "gripper_open": 1,
            "num_images": self.num_images,
            "image_size": list(self.image_size),
            "state_dim": self.platform.proprio_dim if self.use_proprio else 0,
            "unnorm_keys": list(self.unnorm_keys),
            "unnorm_key": self.unnorm_key,
            "checkpoint_hash": self.checkpoint_hash,
            "settings": dict(self.settings),
        }


@dataclass(frozen=True)
class Request:
    """One checked request: the query, and the data set whose statistics un-normalize the answer."""

    query: Query
    unnorm_key: str


def parse_request(payload: object, spec: PolicySpec) -> Request:
    """Check upstream's payload {full_image, wrist images, state, instruction}; optional: unnorm_key, seed, prepared.

    Every key that contains "wrist" is a view, in the order sent; views beyond the policy's number are dropped, as
    upstream does. Fields that the policy does not use may be missing.

    Raises:
        RequestError: a field is missing or wrong.
    """
    if not isinstance(payload, Mapping):
        raise RequestError(f"payload: found {_kind(payload)}; accepted: an object with full_image, instruction")
    wrists = [name for name in payload if isinstance(name, str) and "wrist" in name]
    # Only so many are read: other things of the wrist (a force, a matrix) come after pictures.
    wrists.sort(key=lambda name: getattr(payload[name], "ndim", 0) != 3)
    names = [name for name in ("full_image", *wrists) if name in payload][: spec.num_images]
    if len(names) < spec.num_images or "full_image" not in names:
        raise RequestError(
            f"full_image and {spec.num_images - 1} wrist images are needed; "
            f"found fields: {', '.join(str(name)[:40] for name in list(payload)[:12]) or 'none'}"
        )
    images = [_image(name, payload[name]) for name in names]
    prepared = payload.get("prepared", True)
    if not isinstance(prepared, bool | np.bool_):
        raise RequestError(f"prepared: found {str(prepared)[:40]!r}; accepted: true, false")
    query = Query(
        image=images[0],
        wrist_image=images[1] if len(images) > 1 else images[0],
        extra_images=tuple(images[2:]),
        state=_state(payload.get("state"), spec),
        instruction=_instruction(payload.get("instruction")),
        seed=_seed(payload.get("seed")),
        prepared=bool(prepared),
    )
    return Request(query, _unnorm_key(payload.get("unnorm_key"), spec))


def from_openpi(payload: object) -> object:
    """openpi's observation {observation/image, observation/wrist_image, observation/state, prompt} in our names."""
    if not isinstance(payload, Mapping):
        return payload
    renamed = {}
    for key, value in payload.items():
        plain = key.removeprefix("observation/") if isinstance(key, str) else key
        renamed[_OPENPI_NAMES.get(plain, plain)] = value
    return renamed


def _image(name: str, value: object) -> Array:
    if not isinstance(value, np.ndarray):
        raise RequestError(f"{name}: found {_kind(value)}; accepted: a uint8 array (height, width, 3)")
    sides = value.shape[:2]
    if (
        value.dtype != np.uint8
        or value.ndim != 3
        or value.shape[2] != 3
        or not 1 <= min(sides) <= max(sides) <= MAX_SIDE
    ):
        raise RequestError(
            f"{name}: found {value.dtype} {value.shape}; accepted: uint8 (height, width, 3), sides up to {MAX_SIDE}"
        )
    return value


def _state(value: object, spec: PolicySpec) -> Array:
    size = spec.platform.proprio_dim
    if not spec.use_proprio:
        return np.zeros(size)
    try:
        state = np.asarray([] if value is None else value, dtype=np.float64)
        received = "nothing" if value is None else f"shape {state.shape}"
    except (TypeError, ValueError):
        state, received = np.empty(0), f"{_kind(value)} that is no array of numbers"
    if state.shape != (size,) or not np.isfinite(state).all():
        received = "values that are not finite" if state.shape == (size,) else received
        raise RequestError(f"state: found {received}; accepted: {size} finite numbers, not normalized")
    return state


def _instruction(value: object) -> str:
    value = _text(value)
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_INSTRUCTION:
        received = f"{len(value)} characters" if isinstance(value, str) else _kind(value)
        raise RequestError(f"instruction: found {received}; accepted: a text of 1 to {MAX_INSTRUCTION} characters")
    return value


def _text(value: object) -> object:
    """`value` as a plain string where it is text, be it UTF-8 bytes or an array without dimensions."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bytes | str):
        data = value if isinstance(value, bytes) else value.encode(errors="surrogateescape")
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise RequestError("text: found bytes that are no UTF-8") from None
    return value


def _kind(value: object) -> str:
    return value.reason if isinstance(value, Unreadable) else type(value).__name__


def _seed(value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**63:
        raise RequestError(f"seed: found {str(value)[:40]}; accepted: a whole number from 0 to 2**63 - 1")
    return int(value)


def _unnorm_key(value: object, spec: PolicySpec) -> str:
    accepted = ", ".join(spec.unnorm_keys)
    value = _text(value)
    if value is None or (isinstance(value, str) and not value):
        if not spec.unnorm_key:
            raise RequestError(f"unnorm_key: not given, and the server has no default; accepted: {accepted}")
        return spec.unnorm_key
    try:
        return resolve_unnorm_key(dict.fromkeys(spec.unnorm_keys), str(value), "")
    except UsageError:
        raise RequestError(f"unnorm_key: found {str(value)[:60]!r}; accepted: {accepted}") from None
