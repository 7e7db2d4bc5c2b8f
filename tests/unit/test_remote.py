"""Remote policies against real servers on loopback ports: batching, grippers, and servers that misbehave."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve as websockets_serve

from experiments.robot.policy import Query
from experiments.robot.serving.client import ServerError, WebSocketPolicyClient, chunk_of
from experiments.robot.serving.observation import PolicySpec
from experiments.robot.serving.remote import open_remote
from experiments.robot.serving.server import PolicyServer, ServerSettings
from experiments.robot.serving.wire import to_json
from experiments.robot.wrappers import TimeLimited
from prismatic.vla.platforms import LIBERO

IMAGE = np.zeros((12, 16, 3), dtype=np.uint8)
SPEC = PolicySpec(
    "policy", LIBERO, 2, (12, 16), use_proprio=True, unnorm_keys=("a", "b"), unnorm_key="a", checkpoint_hash="12ab"
)


class Echo:
    """Answers each query with its state's first number, gripper open; waits as long as the second number says."""

    def __init__(self) -> None:
        self.queries: list[Query] = []
        self.keys: list[str | None] = []

    def act(self, queries: Sequence[Query], unnorm_key: str | None = None) -> np.ndarray:
        self.queries += queries
        self.keys.append(unnorm_key)
        time.sleep(max(query.state[1] for query in queries))
        chunks = np.stack([np.full((8, 7), query.state[0]) for query in queries])
        chunks[..., -1] = 1.0
        return chunks


def query(number: float, wait_s: float = 0.0) -> Query:
    return Query(IMAGE, IMAGE, np.array([number, wait_s, 0, 0, 0, 0, 0, 0]), "go", seed=5)


def serve(policy: Any, port: int = 0, **settings: Any) -> PolicyServer:
    return PolicyServer(policy, SPEC, ServerSettings(port=port, **settings))


@pytest.mark.parametrize("scheme", ["http", "ws"])
@pytest.mark.parametrize("gripper", ["policy", "libero"])
def test_one_question_about_many_robots_is_one_batch_of_the_server(scheme: str, gripper: str) -> None:
    echo = Echo()
    with serve(echo, websocket_gripper=gripper, max_wait_s=20.0, max_batch=6) as server:
        remote = open_remote(f"{scheme}://127.0.0.1:{server.port}")
        assert remote.metadata["checkpoint_hash"] == "12ab"
        remote.unnorm_key = "b"
        chunks = remote.act([query(number) for number in range(6)])
        assert server.batcher.batch_sizes == {6: 1}
    assert [float(chunk[0, 0]) for chunk in chunks if isinstance(chunk, np.ndarray)] == [0, 1, 2, 3, 4, 5]
    assert {float(chunk[0, -1]) for chunk in chunks if isinstance(chunk, np.ndarray)} == {1.0}  # Open, either way.
    assert echo.keys == ["b"] and {asked.seed for asked in echo.queries} == {5}
    assert not any(asked.prepared for asked in echo.queries)  # The policy's size, but from a camera.


@pytest.mark.parametrize("scheme", ["http", "ws"])
def test_what_is_refused_or_late_costs_its_own_query_alone(scheme: str) -> None:
    with serve(Echo(), max_batch=1) as server:
        remote = open_remote(f"{scheme}://127.0.0.1:{server.port}")
        good, refused = remote.act([query(1.0), query(float("inf"))])
        assert isinstance(good, np.ndarray)
        assert isinstance(refused, ServerError) and "state: found values that are not finite" in str(refused)
        remote.timeout_s = 1.0
        (late,) = remote.act([query(2.0, wait_s=1.6)])
        assert isinstance(late, TimeoutError) and str(late) == "no answer from the policy server within 1 s"
        remote.timeout_s = 60.0
        (after,) = remote.act([query(3.0)])
        assert isinstance(after, np.ndarray) and after[0, 0] == 3.0  # Not the late answer to the question before.


@pytest.mark.parametrize("scheme", ["http", "ws"])
def test_numbers_that_are_not_finite_never_leave_the_server(scheme: str) -> None:
    class Diverged(Echo):
        def act(self, queries: Sequence[Query], unnorm_key: str | None = None) -> np.ndarray:
            return super().act(queries, unnorm_key) * np.nan

    with serve(Diverged()) as server:
        (failed,) = open_remote(f"{scheme}://127.0.0.1:{server.port}").act([query(1.0)])
    assert isinstance(failed, ServerError) and "the policy answered values that are not finite numbers" in str(failed)


def test_a_server_that_restarts_is_waited_for_and_one_that_is_gone_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Echo()) as server:
        port = server.port
        remote = open_remote(f"http://127.0.0.1:{port}")
        assert isinstance(remote.act([query(1.0)])[0], np.ndarray)
    again = threading.Timer(0.7, lambda: again_server.__enter__())
    again_server = serve(Echo(), port)
    again_server._socket.listen(128)
    again.start()
    assert isinstance(remote.act([query(2.0)])[0], np.ndarray)
    again.join()
    again_server.__exit__(None, None, None)
    pauses, sleep = [], time.sleep

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", pause)
    remote.timeout_s = 2.0
    assert isinstance(remote.act([query(3.0)])[0], ConnectionError) and pauses
    pauses.clear()
    assert isinstance(remote.act([query(3.0)])[0], ConnectionError) and not pauses


@contextmanager
def upstream_like(answer: str) -> Iterator[str]:
    """A server of POST /act alone, as upstream's is: no metadata, and every answer has status 200."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/act"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_upstreams_server() -> None:
    with upstream_like(to_json([np.full(7, number) for number in range(8)])) as url:
        remote = open_remote(url)
        assert remote.metadata == {} and not remote.simulator_gripper
        np.testing.assert_array_equal(remote.act([query(0)])[0], np.repeat(np.arange(8.0)[:, None], 7, axis=1))
        assert open_remote(url, gripper="libero").act([query(0)])[0][2, -1] == -0.5  # type: ignore[index]
    with upstream_like('"error"') as url:
        (failed,) = open_remote(url).act([query(0)])
        assert isinstance(failed, ServerError) and "answered 'error' instead of actions" in str(failed)


def test_answers_that_are_no_chunks() -> None:
    assert chunk_of({"actions": [[1, 2], [3, 4]]}).shape == (2, 2)
    for answer, reason in (([1.0, 2.0], r"shape \(2,\)"), ({"x": 1}, "NoneType"), ([[1], [2, 3]], "list")):
        with pytest.raises(ServerError, match=f"answered {reason} instead of actions"):
            chunk_of(answer)


def test_a_policy_that_hangs_is_given_up_and_asked_again_when_it_is_back() -> None:
    limited = TimeLimited(Echo(), 0.3)
    assert limited.act([query(1.0)])[0][0, 0] == 1.0
    late = limited.act([query(2.0, wait_s=0.8), query(3.0)])
    assert [type(answer) for answer in late] == [TimeoutError] * 2
    assert isinstance(limited.act([query(4.0)])[0], TimeoutError)  # Still busy.
    assert limited.act([query(5.0)])[0][0, 0] == 5.0


def test_a_policy_that_raises_raises() -> None:
    class Broken:
        def act(self, queries: Sequence[Query]) -> np.ndarray:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        TimeLimited(Broken(), 5.0).act([query(1.0)])


def test_a_server_that_says_nothing_is_left_again() -> None:
    left = threading.Event()

    def say_nothing(connection: Any) -> None:
        with contextlib.suppress(ConnectionClosed):
            connection.recv()
        left.set()

    with websockets_serve(say_nothing, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = WebSocketPolicyClient(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", timeout_s=0.2)
        with pytest.raises(TimeoutError):
            client.metadata()
        assert left.wait(60)
