"""Clients of the policy server, for a robot's computer: need Python and NumPy, no torch; openpi's protocol also needs
msgpack and websockets.

client = PolicyClient("127.0.0.1", 8777)                          # POST /act
client = WebSocketPolicyClient("ws://127.0.0.1:8777")             # openpi's protocol: our server's `/`, or openpi's
actions = client.infer({"full_image": image, "wrist_image": wrist, "state": state, "instruction": "open the drawer"})
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from experiments.robot.policy import Array, Query
from experiments.robot.serving.wire import Unreadable, from_json, from_msgpack, to_json, to_msgpack

if TYPE_CHECKING:
    from typing import Self

    from websockets.sync.client import ClientConnection

MAX_CONNECTIONS = 64
# Our (upstream's) names in openpi's words.
_OPENPI_NAMES = {
    "full_image": "observation/image",
    "wrist_image": "observation/wrist_image",
    "state": "observation/state",
    "instruction": "prompt",
}


class ServerError(RuntimeError):
    """The server refused a request or failed; `status` is the HTTP status, 0 where there is none."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"policy server: {reason}" + (f" (status {status})" if status else ""))
        self.status = status


class _Connection(Protocol):
    def close(self) -> None: ...


class _Client:
    """Keeps one connection open a thread until `close`, or the end of a `with` block, closes all of them."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._opened: set[_Connection] = set()

    def _keep(self, connection: _Connection) -> None:
        self._local.connection = connection
        self._opened.add(connection)

    def _forget(self, connection: _Connection) -> None:
        self._local.connection = None
        self._opened.discard(connection)
        connection.close()

    def close(self) -> None:
        """Close the connections of all threads, none of which is asking; a later request opens one again."""
        while self._opened:
            self._opened.pop().close()
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PolicyClient(_Client):
    """Asks a policy server for actions; may be used from several threads, each of which keeps a connection open.

    It is a policy itself (:meth:`act`), so that rollouts can run against a server.

    Args:
        host: name or address; `prefix` stands before the server's paths, as in http://host:port/prefix/act.
        token: the server's token, if it asks for one.
        unnorm_key: statistics to un-normalize with; "" for the server's default.
        timeout_s: longest wait for one answer.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8777,
        *,
        token: str | None = None,
        unnorm_key: str = "",
        timeout_s: float = 60.0,
        tls: bool = False,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.host, self.port, self.timeout_s = host, port, timeout_s
        self.unnorm_key = unnorm_key
        self._connect = http.client.HTTPSConnection if tls else http.client.HTTPConnection
        self._prefix = prefix.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._threads = ThreadPoolExecutor(max_workers=MAX_CONNECTIONS)  # Threads start when they are needed.

    def infer(self, observation: Mapping[str, object]) -> Array:
        """The chunk (T, A) for {full_image, wrist images, state, instruction}; images are uint8 (H, W, 3).

        Raises:
            ServerError: the server refused the observation or failed.
            OSError: there is no server, or it does not answer in time.
        """
        payload = dict(observation)
        if self.unnorm_key:
            payload.setdefault("unnorm_key", self.unnorm_key)
        return chunk_of(from_json(self._exchange("POST", "/act", to_json(payload).encode()), lenient=True))

    def act(self, queries: Sequence[Query]) -> Array:
        """Chunks (B, T, A) for B queries, sent at the same time so that the server can batch them."""
        return np.stack(list(self._threads.map(self.infer, map(observation_of, queries))))

    def metadata(self) -> dict[str, Any]:
        """Read what the served policy takes and gives."""
        return json.loads(self._exchange("GET", "/metadata"))

    def is_healthy(self) -> bool:
        """Tell whether a server answers at all."""
        try:
            return self._exchange("GET", "/health") == b"ok"
        except (OSError, http.client.HTTPException, ServerError):
            return False

    def _exchange(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """One request; a connection that the server closed while it was idle is opened again, once."""
        for attempt in range(2):
            kept: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
            connection = kept or self._connect(self.host, self.port, timeout=self.timeout_s)
            self._keep(connection)
            try:
                connection.request(method, self._prefix + path, body, self._headers)
                response = connection.getresponse()
                content = response.read()
            except (ConnectionError, http.client.HTTPException, OSError) as error:
                self._forget(connection)
                if kept is None or attempt or isinstance(error, TimeoutError):
                    raise
                continue
            if response.status != 200:
                raise ServerError(response.status, _reason(content))
            return content
        raise AssertionError("the loop above returns or raises")


def _reason(content: bytes) -> str:
    try:
        return str(json.loads(content)["detail"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace")


def chunk_of(answer: object) -> Array:
    """A server's answer, plain or under "actions", as a chunk (T, A). Raises ServerError for one that is no chunk."""
    if isinstance(answer, str):
        raise ServerError(0, f"answered {answer[:200]!r} instead of actions")
    given = answer.get("actions", answer.get("action")) if isinstance(answer, Mapping) else answer
    if isinstance(given, Unreadable):
        raise ServerError(0, f"answered {given.reason}")
    try:
        chunk_TA = np.asarray([] if given is None else given, dtype=np.float64)
    except (TypeError, ValueError):
        chunk_TA = np.empty(0)
    if chunk_TA.ndim != 2:
        received = f"shape {chunk_TA.shape}" if chunk_TA.size else type(given).__name__
        raise ServerError(0, f"answered {received} instead of actions (T, A)")
    return chunk_TA


def observation_of(query: Query) -> dict[str, object]:
    """A query in the words of `POST /act`."""
    extra = {f"wrist_image_{number}": image for number, image in enumerate(query.extra_images, start=2)}
    return {
        "full_image": query.image,
        "wrist_image": query.wrist_image,
        **extra,
        "state": query.state,
        "instruction": query.instruction,
        "seed": query.seed,
        "prepared": query.prepared,
    }


class WebSocketPolicyClient(_Client):
    """Asks a policy server for actions; may be used from several threads, each of which keeps a connection open.

    Args:
        url: ws://host:port or wss://host:port, with a path if the server has one.
        token: sent as openpi's clients send theirs: "Authorization: Api-Key TOKEN".
        timeout_s: longest wait for one answer.
    """

    def __init__(self, url: str, *, token: str | None = None, unnorm_key: str = "", timeout_s: float = 60.0) -> None:
        super().__init__()
        self.url, self.unnorm_key, self.timeout_s = url, unnorm_key, timeout_s
        self._headers = {} if token is None else {"Authorization": f"Api-Key {token}"}

    def infer(self, observation: Mapping[str, object]) -> Array:
        """The chunk (T, A) for an observation, as :meth:`PolicyClient.infer`."""
        payload = {_OPENPI_NAMES.get(name, name): value for name, value in observation.items()}
        if isinstance(payload.get("observation/state"), np.ndarray):
            payload["observation/state"] = np.ascontiguousarray(payload["observation/state"])
        if self.unnorm_key:
            payload.setdefault("unnorm_key", self.unnorm_key)
        answer = self._exchange(to_msgpack(payload))
        if isinstance(answer, str):
            raise ServerError(0, answer.strip().splitlines()[-1][:300] if answer.strip() else "failed")
        return chunk_of(from_msgpack(answer, lenient=True))

    def metadata(self) -> dict[str, Any]:
        """The server's first message: what the served policy takes and gives; of openpi's servers mostly {}."""
        connection, metadata = self._open()
        self._keep(connection)
        return metadata

    def _open(self) -> tuple[ClientConnection, dict[str, Any]]:
        from websockets.exceptions import InvalidStatus, WebSocketException
        from websockets.sync.client import connect

        options: dict[str, Any] = {
            "compression": None,
            "max_size": None,
            "additional_headers": self._headers,
            "open_timeout": self.timeout_s,
            "close_timeout": 2,
            "ping_interval": None,  # A policy that compiles or loads may be silent for minutes.
        }
        try:
            with contextlib.ExitStack() as closing:
                connection = closing.enter_context(connect(self.url, **options))
                first = connection.recv(timeout=self.timeout_s)
                closing.pop_all()  # From here on the connection is kept; what failed before is closed.
        except InvalidStatus as error:
            body = (error.response.body or b"").decode(errors="replace").strip()
            raise ServerError(error.response.status_code, body[:200] or "connection refused") from None
        except WebSocketException as error:
            raise ConnectionError(f"no WebSocket server of openpi's protocol at {self.url} ({error})") from None
        metadata = from_msgpack(first, lenient=True) if isinstance(first, bytes) else None
        return connection, metadata if isinstance(metadata, dict) else {}

    def _exchange(self, message: bytes) -> str | bytes:
        """One request; a connection that the server closed while it was idle is opened again, once."""
        from websockets.exceptions import ConnectionClosed

        for attempt in range(2):
            kept = getattr(self._local, "connection", None)
            connection = kept or self._open()[0]
            self._keep(connection)
            try:
                connection.send(message)
                return connection.recv(timeout=self.timeout_s)
            except TimeoutError:
                self._forget(connection)  # Its answer, should it come, is no answer to the next question.
                raise
            except ConnectionClosed as error:
                self._forget(connection)
                if kept is None or attempt:
                    raise ConnectionError(f"policy server closed the connection: {error}") from None
        raise AssertionError("the loop above returns or raises")
