"""Client of openpi's WebSocket protocol: our server's `/`, and openpi's own servers.

client = WebSocketPolicyClient("ws://127.0.0.1:8777")
actions = client.infer({"full_image": image, "wrist_image": wrist, "state": state, "instruction": "open the drawer"})

Needs NumPy, msgpack and websockets, no torch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.robot.serving.client import ServerError, chunk_of
from experiments.robot.serving.wire import from_msgpack, to_msgpack

# Our (upstream's) names in openpi's words.
_OPENPI_NAMES = {
    "full_image": "observation/image",
    "wrist_image": "observation/wrist_image",
    "state": "observation/state",
    "instruction": "prompt",
}


class WebSocketPolicyClient:
    """Asks a policy server for actions; may be used from several threads, each of which keeps a connection open.

    Args:
        url: ws://host:port or wss://host:port, with a path if the server has one.
        token: sent as openpi's clients send theirs: "Authorization: Api-Key TOKEN".
        timeout_s: longest wait for one answer.
    """

    def __init__(self, url: str, *, token: str | None = None, unnorm_key: str = "", timeout_s: float = 60.0) -> None:
        self.url, self.unnorm_key, self.timeout_s = url, unnorm_key, timeout_s
        self._headers = {} if token is None else {"Authorization": f"Api-Key {token}"}
        self._of_thread = threading.local()

    def infer(self, observation: Mapping[str, Any]) -> npt.NDArray[Any]:
        """The chunk (T, A) for {full_image, wrist images, state, instruction}; images are uint8 (H, W, 3).

        Raises:
            ServerError: the server refused the observation or failed.
            OSError: there is no server, or it does not answer in time (TimeoutError).
        """
        payload = {_OPENPI_NAMES.get(name, name): value for name, value in observation.items()}
        if isinstance(payload.get("observation/state"), np.ndarray):
            payload["observation/state"] = np.ascontiguousarray(payload["observation/state"])
        if self.unnorm_key:
            payload.setdefault("unnorm_key", self.unnorm_key)
        answer = self._exchange(to_msgpack(payload))
        if isinstance(answer, str):
            raise ServerError(0, answer.strip().splitlines()[-1][:300] if answer.strip() else "failed")
        return chunk_of(from_msgpack(answer))

    def metadata(self) -> dict[str, Any]:
        """What the server sent first: what the served policy takes and gives; of openpi's servers mostly {}."""
        connection, metadata = self._open()
        self._of_thread.connection = connection
        return metadata

    def _open(self) -> tuple[Any, dict[str, Any]]:
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
        metadata = from_msgpack(first) if isinstance(first, bytes) else None
        return connection, metadata if isinstance(metadata, dict) else {}

    def _exchange(self, message: bytes) -> str | bytes:
        """One request; a connection that the server closed while it was idle is opened again, once."""
        from websockets.exceptions import ConnectionClosed

        for attempt in range(2):
            kept = getattr(self._of_thread, "connection", None)
            connection = kept or self._open()[0]
            self._of_thread.connection = connection
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

    def _forget(self, connection: Any) -> None:
        self._of_thread.connection = None
        connection.close()
