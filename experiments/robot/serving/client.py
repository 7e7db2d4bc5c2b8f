"""Client of the policy server, for a robot's computer: needs Python and NumPy, no torch.

client = PolicyClient("127.0.0.1", 8777)
actions = client.infer({"full_image": image, "wrist_image": wrist, "state": state, "instruction": "open the drawer"})
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.robot.policy import Query
from experiments.robot.serving.wire import from_json, to_json

MAX_CONNECTIONS = 64
Array = npt.NDArray[Any]


class ServerError(RuntimeError):
    """The server refused a request or failed; `status` is the HTTP status, 0 where there is none."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"policy server: {reason}" + (f" (status {status})" if status else ""))
        self.status = status


class PolicyClient:
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
        self.host, self.port, self.timeout_s = host, port, timeout_s
        self.unnorm_key = unnorm_key
        self._connect = http.client.HTTPSConnection if tls else http.client.HTTPConnection
        self._prefix = prefix.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._of_thread = threading.local()
        self._threads = ThreadPoolExecutor(max_workers=MAX_CONNECTIONS)  # Threads start when they are needed.

    def infer(self, observation: Mapping[str, Any]) -> Array:
        """The chunk (T, A) for {full_image, wrist images, state, instruction}; images are uint8 (H, W, 3).

        Raises:
            ServerError: the server refused the observation or failed.
            OSError: there is no server, or it does not answer in time.
        """
        payload = dict(observation)
        if self.unnorm_key:
            payload.setdefault("unnorm_key", self.unnorm_key)
        return chunk_of(from_json(self._exchange("POST", "/act", to_json(payload).encode())))

    def act(self, queries: Sequence[Query]) -> Array:
        """Chunks (B, T, A) for B queries, sent at the same time so that the server can batch them."""
        return np.stack(list(self._threads.map(self.infer, map(observation_of, queries))))

    def metadata(self) -> dict[str, Any]:
        """What the served policy takes and gives."""
        return json.loads(self._exchange("GET", "/metadata"))

    def is_healthy(self) -> bool:
        """Whether a server answers at all."""
        try:
            return self._exchange("GET", "/health") == b"ok"
        except (OSError, http.client.HTTPException, ServerError):
            return False

    def _exchange(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """One request; a connection that the server closed while it was idle is opened again, once."""
        for attempt in range(2):
            kept: http.client.HTTPConnection | None = getattr(self._of_thread, "connection", None)
            connection = kept or self._connect(self.host, self.port, timeout=self.timeout_s)
            self._of_thread.connection = connection
            try:
                connection.request(method, self._prefix + path, body, self._headers)
                response = connection.getresponse()
                content = response.read()
            except (ConnectionError, http.client.HTTPException, OSError) as error:
                connection.close()
                self._of_thread.connection = None
                if kept is None or attempt or isinstance(error, TimeoutError):
                    raise
                continue
            if response.status != 200:
                raise ServerError(response.status, _reason(content))
            return content
        raise AssertionError("the loop above returns or raises")


def _reason(content: bytes) -> str:
    """The one-line reason in an error's body."""
    try:
        return str(json.loads(content)["detail"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace")


def chunk_of(answer: Any) -> Array:
    """A server's answer as a chunk (T, A): a list of actions, an array, or either under "actions".

    Raises:
        ServerError: it is none of these; upstream's server answers "error" when it failed.
    """
    if isinstance(answer, str):
        raise ServerError(0, f"answered {answer[:200]!r} instead of actions")
    given = answer.get("actions", answer.get("action")) if isinstance(answer, Mapping) else answer
    try:
        chunk_TA = np.asarray([] if given is None else given, dtype=np.float64)
    except (TypeError, ValueError):
        chunk_TA = np.empty(0)
    if chunk_TA.ndim != 2:
        found = f"shape {chunk_TA.shape}" if chunk_TA.size else type(given).__name__
        raise ServerError(0, f"answered {found} instead of actions (T, A)")
    return chunk_TA


def observation_of(query: Query) -> dict[str, Any]:
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
