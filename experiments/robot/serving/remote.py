"""A policy server as a policy to evaluate: ours, upstream's or anybody's `POST /act`, or an openpi WebSocket server.

    policy = open_remote("http://127.0.0.1:8777")          # or "ws://...": openpi's protocol
    policy.act(queries)                                    # all at once, so that the server can batch them

Not obvious:
- Answers are wanted within `timeout_s`, the waiting for a server that restarts included. A query without an answer gets
  an exception in its place, which a rollout records as an error of that episode.
- Once a whole timeout was spent waiting for a server that is gone, later queries try it once each without waiting.
- Upstream's servers answer with the gripper as trained (1 = open), openpi's as LIBERO takes it (-1 = open); ours say
  which (`gripper_open` in the metadata). `gripper` "policy" or "libero" overrides that.
- A server of ours names its checkpoint's hash and settings, which are recorded as a local checkpoint's would be.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np

from experiments.robot.policy import Array, Query
from experiments.robot.serving.client import (
    MAX_CONNECTIONS,
    PolicyClient,
    ServerError,
    WebSocketPolicyClient,
    observation_of,
)
from experiments.robot.serving.wire import WireError
from experiments.robot.wrappers import DaemonCall
from prismatic.util.errors import UsageError

SCHEMES = ("http", "https", "ws", "wss")
TIMEOUT_S = 60.0
_WAIT_S = 0.5  # between tries to reach a server that is not there
_NOT_THERE = (ConnectionError, http.client.RemoteDisconnected, http.client.IncompleteRead)


class RemotePolicy:
    """Asks a server about several robots at once; see :class:`experiments.robot.policy.Policy`.

    Args:
        infer: one observation in the words of `POST /act` -> chunk (T, A); called from several threads.
        metadata: what the server says about itself.
        simulator_gripper: the server answers -1 = open, +1 = closed; turned into 1 = open, 0 = closed.
    """

    def __init__(
        self,
        infer: Callable[[Mapping[str, object]], Array],
        metadata: Mapping[str, object],
        *,
        timeout_s: float = TIMEOUT_S,
        simulator_gripper: bool = False,
    ) -> None:
        self.metadata = dict(metadata)
        self.timeout_s, self.simulator_gripper = timeout_s, simulator_gripper
        self.unnorm_key = ""  # Statistics to ask for; "" for the server's default.
        self._infer = infer
        self._gone = False
        self._slots = threading.Semaphore(MAX_CONNECTIONS)
        self._idle: list[DaemonCall] = []

    def act(self, queries: Sequence[Query]) -> list[Array | Exception]:
        """Chunks (T, A), gripper 1 = open; an exception for a query that got no usable answer in time."""
        deadline = time.monotonic() + self.timeout_s
        futures = []
        for query in queries:
            caller = self._idle.pop() if self._idle else DaemonCall()
            futures.append((caller, caller.submit(self._answer, query, deadline)))
        return [self._collect(caller, future, deadline) for caller, future in futures]

    def _collect(self, caller: DaemonCall, future: Future[Array], deadline: float) -> Array | Exception:
        wait([future], timeout=max(0.0, deadline - time.monotonic()) + 0.2)
        if not future.done():
            # The thread may hang on; it is not asked again, and ends with the process.
            return TimeoutError(f"no answer from the policy server within {self.timeout_s:g} s")
        self._idle.append(caller)
        error = future.exception()
        if isinstance(error, TimeoutError):
            return TimeoutError(f"no answer from the policy server within {self.timeout_s:g} s")
        if isinstance(error, Exception):
            return error.with_traceback(None)  # The reason counts, not which line of ours met it.
        return future.result()

    def _answer(self, query: Query, deadline: float) -> Array:
        """One query's chunk, trying again while the server is away or overloaded."""
        observation = observation_of(query)
        if self.unnorm_key:
            observation["unnorm_key"] = self.unnorm_key
        while True:
            try:
                with self._slots:
                    chunk_TA = self._infer(observation)
                self._gone = False
                return self._to_policy_gripper(chunk_TA)
            except (ServerError, *_NOT_THERE) as error:
                away = not isinstance(error, ServerError) or error.status == 503
                if not away or self._gone:
                    raise
                if time.monotonic() + _WAIT_S > deadline:
                    self._gone = not isinstance(error, ServerError)
                    raise
                time.sleep(_WAIT_S)

    def _to_policy_gripper(self, chunk_TA: Array) -> Array:
        if not self.simulator_gripper:
            return chunk_TA
        turned_TA = np.array(chunk_TA, copy=True)
        turned_TA[:, -1] = (1.0 - turned_TA[:, -1]) / 2.0
        return turned_TA


def open_remote(
    url: str,
    *,
    name: str = "--policy",
    token: str | None = None,
    timeout_s: float = TIMEOUT_S,
    gripper: str = "auto",
) -> RemotePolicy:
    """Reach the server at `url` and read what it says about itself.

    Args:
        name: the flag or setting that holds `url`, for messages.
        gripper: see above; "auto" goes by the server's metadata.

    Raises:
        UsageError: `url` is no address, or no server admits us there.
    """
    parts = _split(url, name)
    client: PolicyClient | WebSocketPolicyClient
    if parts.scheme in ("ws", "wss"):
        client = WebSocketPolicyClient(url, token=token, timeout_s=timeout_s)
    else:
        client = PolicyClient(
            parts.hostname or "",
            parts.port or (443 if parts.scheme == "https" else 80),
            token=token,
            timeout_s=timeout_s,
            tls=parts.scheme == "https",
            prefix=parts.path.rstrip("/").removesuffix("/act"),
        )
    metadata = _metadata(client, url, name)
    opens = metadata.get("gripper_open", -1 if parts.scheme in ("ws", "wss") else 1)
    in_simulator = gripper == "libero" or (gripper == "auto" and opens == -1)
    return RemotePolicy(client.infer, metadata, timeout_s=timeout_s, simulator_gripper=in_simulator)


def _split(url: str, name: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:  # A port that is no number.
        valid = False
    if not valid:
        raise UsageError(f"{name}: {url!r} found; accepted: http://HOST:PORT or ws://HOST:PORT (https, wss)")
    return parts


def _metadata(client: PolicyClient | WebSocketPolicyClient, url: str, name: str) -> dict[str, Any]:
    """Read what the server says about itself; {} from upstream's server, which has no such route."""
    try:
        return client.metadata()
    except ServerError as error:
        if error.status in (401, 403):
            from experiments.robot.serving.access import TOKEN_VARIABLE

            raise UsageError(f"{name}: {url}: {error}; the token is read from {TOKEN_VARIABLE}") from None
        return {}
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(f"{name}: no policy server answers at {url} ({error or type(error).__name__})") from None
    except (WireError, ValueError):
        return {}
