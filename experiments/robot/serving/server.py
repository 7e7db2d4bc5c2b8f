"""The policy server: OpenVLA-OFT's `POST /act` and openpi's WebSocket protocol on one port.

docs/serving.md lists addresses, fields and statuses. `POST /act` answers the chunk as a list of arrays (A,), and as a
JSON string whoever asked in one. openpi's WebSocket answers {"actions": (T, A), "server_timing": {"infer_ms"}}; text
instead of bytes is an error message, and the connection stays.

Not obvious:
- An image of the policy's own size counts as prepared by the client (as upstream has it) and is only cropped; others go
  through the evaluation's JPEG and resizing. A client whose cameras have that size by chance sends `prepared: false`.
- Actions are answered as the policy was trained: in LIBERO the gripper is in [0, 1] and 1 is open. openpi's LIBERO
  client hands actions to the simulator as they are, where -1 is open: for it there is `websocket_gripper="libero"`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketDisconnect
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from experiments.robot.acting import verified
from experiments.robot.openvla_utils import OpenVLAPolicy
from experiments.robot.pi_policy import PiActingPolicy
from experiments.robot.policy import Array, PolicyFlags, Query
from experiments.robot.robot_utils import invert_gripper_action, normalize_gripper_action
from experiments.robot.serving.access import refusal
from experiments.robot.serving.batching import Batcher, Overloaded, ServablePolicy
from experiments.robot.serving.observation import PolicySpec, RequestError, from_openpi, parse_request
from experiments.robot.serving.vla_eval import VlaEvalSession
from experiments.robot.serving.wire import WireError, from_json, from_msgpack, to_json, to_msgpack
from prismatic.checkpoint.folder import Checkpoint
from prismatic.checkpoint.layout import acting_flags
from prismatic.util.errors import UsageError

# Flags that change answers, so that who evaluates the server from afar can record them; inputs are told by themselves.
_SAID_ELSEWHERE = ("num_images_in_input", "use_proprio")


def _counts_from_state(statistics: Mapping[str, Any]) -> bool:
    return any(statistics.get("action", {}).get("delta", ()))


class _Described:
    """A loaded checkpoint that can say what it takes and gives."""

    def spec(self: Any, name: str, unnorm_key: str, checkpoint_hash: str = "") -> PolicySpec:
        """The answers that clients get; `unnorm_key` is the default for requests without one, "" for none."""
        parameter = next(self.vla.parameters())
        return PolicySpec(
            name=name,
            platform=self.platform,
            num_images=self._cfg.num_images_in_input,
            image_size=self.image_hw,
            use_proprio=self._cfg.use_proprio or any(map(_counts_from_state, self.statistics.values())),
            unnorm_keys=tuple(sorted(self.statistics)),
            unnorm_key=unnorm_key,
            checkpoint_hash=checkpoint_hash,
            settings={
                **acting_flags(self._cfg, left_out=_SAID_ELSEWHERE),
                "numerics": [parameter.device.type, str(parameter.dtype).removeprefix("torch.")],
            },
        )


class ServedPolicy(_Described, OpenVLAPolicy):
    """A checkpoint of OpenVLA."""


class ServedPi(_Described, PiActingPolicy):
    """A checkpoint of pi0 or pi0.5."""


def load_served(checkpoint: Checkpoint, cfg: PolicyFlags, unnorm_key: str) -> ServedPolicy | ServedPi:
    """Load the policy of a checkpoint to serve it. Raises UsageError: it lacks something or does not fit."""
    if checkpoint.family == "openvla":
        return verified(ServedPolicy.from_checkpoint(checkpoint, cfg, unnorm_key), checkpoint, cfg)
    return verified(ServedPi.from_checkpoint(checkpoint, cfg, unnorm_key), checkpoint, cfg)


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server.

    Port 0 takes any free port. `max_request_bytes` limits one request or WebSocket message. `websocket_gripper` is
    "policy" or "libero" (-1 open, +1 closed).
    """

    host: str = "127.0.0.1"
    port: int = 8777
    token: str | None = None
    max_batch: int = 16
    max_wait_s: float = 0.003
    max_request_bytes: int = 32 * 2**20
    websocket_gripper: str = "policy"


def create_app(batcher: Batcher, spec: PolicySpec, settings: ServerSettings) -> FastAPI:
    """The web application around a running batcher."""
    app = FastAPI(title="policy server", docs_url=None, redoc_url=None, openapi_url=None)

    def check_access(request: HTTPRequest) -> None:
        if refused := refusal(request.headers, settings.token):
            raise HTTPException(*refused)

    @app.get("/health")
    @app.get("/healthz")
    async def health() -> PlainTextResponse:
        return PlainTextResponse("ok")

    @app.get("/metadata", dependencies=[Depends(check_access)])
    async def metadata() -> JSONResponse:
        return JSONResponse(spec.metadata())

    @app.post("/act", dependencies=[Depends(check_access)])
    async def act(request: HTTPRequest) -> Response:
        body = await _read_body(request, settings.max_request_bytes)
        try:
            payload, encoded = _decode_payload(body)
            actions_TA = await _infer(batcher, spec, payload)
        except tuple(_STATUSES) as error:
            raise HTTPException(_STATUSES[type(error)], str(error)) from None
        text = to_json(list(actions_TA))
        return Response(to_json(text) if encoded else text, media_type="application/json")

    @app.websocket("/")
    async def openpi(websocket: WebSocket) -> None:
        if await _admit(websocket, settings.token):
            await _serve_openpi(websocket, batcher, spec, settings.websocket_gripper)

    @app.websocket("/vla-eval")
    async def harness(websocket: WebSocket) -> None:
        if await _admit(websocket, settings.token):
            await _serve_vla_eval(websocket, batcher, spec)

    return app


class PolicyFailed(RuntimeError):
    """The policy raised; details are in the server's log only."""


_STATUSES = {WireError: 400, RequestError: 400, Overloaded: 503, PolicyFailed: 500}


async def _infer(batcher: Batcher, spec: PolicySpec, payload: object) -> Array:
    request = parse_request(payload, spec)
    future = batcher.submit(request)
    try:
        actions_TA = await asyncio.wrap_future(future)
    except (Overloaded, asyncio.CancelledError):
        raise
    except Exception as error:
        raise PolicyFailed(f"the policy failed ({type(error).__name__}); the server's log says more") from None
    if not np.isfinite(actions_TA).all():
        raise PolicyFailed("the policy answered values that are not finite numbers")  # Nothing for a robot.
    return actions_TA


def _decode_payload(body: bytes) -> tuple[object, bool]:
    """(payload, whether it came as upstream's doubly encoded form)."""
    payload = from_json(body, lenient=True)
    if isinstance(payload, dict) and "encoded" in payload:
        if not isinstance(payload["encoded"], str):
            raise RequestError(f"encoded: found {type(payload['encoded']).__name__}; accepted: JSON text as a string")
        return from_json(payload["encoded"], lenient=True), True
    return payload, False


async def _read_body(request: HTTPRequest, limit: int) -> bytes:
    """The request's body; one that is too large is refused without being kept."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HTTPException(413, f"request of more than {limit} bytes; smaller images will do")
        parts.append(part)
    return b"".join(parts)


async def _admit(websocket: WebSocket, token: str | None) -> bool:
    """Accept a connection, or refuse it."""
    if refused := refusal(websocket.headers, token):
        await websocket.send_denial_response(PlainTextResponse(refused[1], status_code=refused[0]))
        return False
    await websocket.accept()
    return True


async def _messages(websocket: WebSocket) -> AsyncIterator[bytes | None]:
    """Yield what the client sends until it leaves; None for text."""
    while (message := await websocket.receive())["type"] != "websocket.disconnect":
        yield message.get("bytes")


async def _serve_openpi(websocket: WebSocket, batcher: Batcher, spec: PolicySpec, gripper: str) -> None:
    simulator = {"gripper": "-1 = open, +1 = closed", "gripper_open": -1} if gripper == "libero" else {}
    with contextlib.suppress(WebSocketDisconnect):
        await websocket.send_bytes(to_msgpack({**spec.metadata(), **simulator}))
        async for data in _messages(websocket):
            start = time.perf_counter()
            try:
                if data is None:
                    raise RequestError("message: found text; accepted: msgpack bytes")
                actions_TA = await _infer(batcher, spec, from_openpi(from_msgpack(data, lenient=True)))
            except tuple(_STATUSES) as error:
                await websocket.send_text(str(error))
                continue
            if gripper == "libero":
                actions_TA = invert_gripper_action(normalize_gripper_action(actions_TA))
            timing = {"infer_ms": 1000 * (time.perf_counter() - start)}
            await websocket.send_bytes(to_msgpack({"actions": actions_TA, "server_timing": timing}))


async def _serve_vla_eval(websocket: WebSocket, batcher: Batcher, spec: PolicySpec) -> None:
    session = VlaEvalSession(spec, lambda payload: _infer(batcher, spec, payload))
    with contextlib.suppress(WebSocketDisconnect):
        async for data in _messages(websocket):
            try:
                answer = await session.answer(data)
            except (Overloaded, PolicyFailed) as error:
                answer = session.error(str(error))
            if answer is not None:
                await websocket.send_bytes(answer)


class PolicyServer:
    """A server to run: in this thread (:meth:`run`) or, as a context manager, in a thread of its own.

    Args:
        bound: socket from :func:`bind_address`; by default the settings' address is bound here.

    Raises:
        UsageError: the address cannot be bound.
    """

    def __init__(
        self,
        policy: ServablePolicy,
        spec: PolicySpec,
        settings: ServerSettings,
        bound: socket.socket | None = None,
    ) -> None:
        self.settings = settings
        self._socket = bound or bind_address(settings.host, settings.port)
        self._socket.listen(128)  # From here on clients get through; they wait until the server runs.
        self.port: int = self._socket.getsockname()[1]
        self.batcher = Batcher(policy, max_batch=settings.max_batch, max_wait_s=settings.max_wait_s)
        config = uvicorn.Config(
            create_app(self.batcher, spec, settings),
            log_level="warning",
            ws="websockets-sansio",
            ws_max_size=settings.max_request_bytes,
            ws_ping_interval=None,  # A client that builds a simulator answers no ping for a minute: not a dead one.
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.run, name="server", daemon=True)

    @property
    def url(self) -> str:
        """The address at which this machine reaches the server."""
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"http://{host}:{self.port}"

    def run(self) -> None:
        """Serve until :meth:`stop`, SIGINT or SIGTERM."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.batcher.close()
            self._socket.close()

    def stop(self) -> None:
        """Ask :meth:`run` to return."""
        self._server.should_exit = True

    def __enter__(self) -> PolicyServer:
        self._thread.start()
        while self._thread.is_alive() and not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        self._thread.join(timeout=60)


def warm_up(policy: ServablePolicy, spec: PolicySpec) -> None:
    """Ask once for an action, so that the first client does not wait for lazy initialization, and errors show early."""
    black = np.zeros((*spec.image_size, 3), dtype=np.uint8)
    extra = (black,) * max(0, spec.num_images - 2)
    query = Query(black, black, np.zeros(spec.platform.proprio_dim), "do nothing", extra_images=extra)
    policy.act([query], spec.unnorm_key or spec.unnorm_keys[0])


def bind_address(host: str, port: int) -> socket.socket:
    """A socket bound before a large policy is loaded, not yet listening. Raises UsageError when that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise UsageError(f"--host: {host!r} is no address of this machine ({error})") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise UsageError(f"--port: {host}:{port} cannot be used ({getattr(error, 'strerror', error)})") from None
    return bound
