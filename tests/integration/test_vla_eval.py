"""vla-eval (PyPI) and openpi-client (PyPI) as real clients of the real server."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.policy import Query
from experiments.robot.robot_utils import invert_gripper_action, normalize_gripper_action
from experiments.robot.serving.observation import PolicySpec
from experiments.robot.serving.server import PolicyServer, ServerSettings
from experiments.robot.serving.vla_eval import VlaEvalSession
from experiments.robot.serving.wire import from_msgpack, to_msgpack
from prismatic.vla.platforms import LIBERO
from tests.helpers.programs import run_program

KEYS = ("libero_goal", "libero_object_no_noops")
SPEC = PolicySpec("seeded", LIBERO, 2, (64, 64), use_proprio=True, unnorm_keys=KEYS, unnorm_key="libero_goal")


class Seeded:
    """Random chunks that depend on all of a query, which show what arrived; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Query, str | None]] = []

    @staticmethod
    def chunk(query: Query) -> np.ndarray:
        total = int(query.image.sum()) + 7 * int(query.wrist_image.sum()) + len(query.instruction)
        chunk = np.random.default_rng(total).uniform(-1, 1, (8, 7))
        chunk[:, -1] = (chunk[:, -1] > 0) + 0.01 * query.state[0]
        return chunk

    def act(self, queries: Sequence[Query], unnorm_key: str | None = None) -> np.ndarray:
        self.asked += [(query, unnorm_key) for query in queries]
        return np.stack([self.chunk(query) for query in queries])


@pytest.fixture
def policy() -> Seeded:
    return Seeded()


@pytest.fixture
def server(policy: Seeded) -> Iterator[PolicyServer]:
    with PolicyServer(policy, SPEC, ServerSettings(port=0)) as running:
        yield running


@pytest.mark.parametrize("path", ["/", "/vla-eval"])
def test_clients_that_ping_by_themselves_get_answers_that_take_long(path: str, policy: Seeded) -> None:
    """Since websockets 15 every client does, and gives a connection up whose other end is silent."""
    from websockets.sync.client import connect

    class Slow(Seeded):
        def act(self, queries: Sequence[Query], unnorm_key: str | None = None) -> np.ndarray:
            time.sleep(4)
            return super().act(queries, unnorm_key)

    black, state = np.zeros((64, 64, 3), np.uint8), np.zeros(8)
    seen: dict[str, Any] = {"image": black, "wrist_image": black, "state": state, "prompt": "go"}
    if path == "/vla-eval":
        views = {"agentview": black, "wrist": black}
        seen = {"type": "observation", "payload": {"images": views, "states": state, "task_description": "go"}}
    with PolicyServer(Slow(), SPEC, ServerSettings(port=0)) as server:
        address = f"ws://127.0.0.1:{server.port}{path}"
        with connect(address, ping_interval=0.2, ping_timeout=3, compression=None) as connection:
            if path == "/":
                connection.recv()
            connection.send(to_msgpack(seen))
            answer: Any = from_msgpack(connection.recv(timeout=300))
            assert np.shape(answer.get("payload", answer)["actions"])[-1] == 7


@pytest.mark.parametrize(
    ("suite", "key"),
    [
        ("libero_object", "libero_object_no_noops"),
        ("libero_object_swap", "libero_object_no_noops"),  # LIBERO-PRO's
        ("libero_plus_object", "libero_object_no_noops"),
        ("libero_goal_with_mug", "libero_goal"),
        ("kitchen", "libero_goal"),  # None of LIBERO's: the server's default.
        ("libero_spatial", "no statistics of 'libero_spatial'"),
        ("libero_10_lan", "no statistics of 'libero_10'"),
        ("libero_plus", "the parts of libero_plus differ"),
    ],
)
def test_the_suite_decides_the_statistics_as_in_the_evaluation(suite: str, key: str) -> None:
    async def infer(payload: dict[str, object]) -> np.ndarray:
        assert payload["unnorm_key"] == key
        return np.zeros((8, 7))

    session = VlaEvalSession(SPEC, infer)
    start = {"type": "episode_start", "payload": {"task": {"suite": suite, "task_id": 0}}}
    assert asyncio.run(session.answer(to_msgpack(start))) is None
    black = np.zeros((4, 4, 3), np.uint8)
    seen = {"images": {"a": black, "b": black}, "states": np.zeros(8), "task_description": "go"}
    reply: Any = from_msgpack(asyncio.run(session.answer(to_msgpack({"type": "observation", "payload": seen}))) or b"")
    assert reply["type"] == ("error" if " " in key else "action")
    assert " " not in key or key in reply["payload"]["error"]


def in_simulator(chunk_TA: np.ndarray) -> np.ndarray:
    return invert_gripper_action(normalize_gripper_action(chunk_TA))


def test_openpis_client(server: PolicyServer, policy: Seeded) -> None:
    reason = "openpi-client is not installed (it wants numpy<2: pip install --no-deps openpi-client)"
    client_module = pytest.importorskip("openpi_client.websocket_client_policy", reason=reason)
    rng = np.random.default_rng(0)
    client = client_module.WebsocketClientPolicy("127.0.0.1", server.port)
    assert client.get_server_metadata()["action_horizon"] == 8
    observation = {
        "observation/image": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        "observation/state": rng.normal(size=8),
        "prompt": "open the drawer",
    }
    actions = client.infer(observation)["actions"]
    (query, key), *_ = policy.asked
    np.testing.assert_array_equal(query.image, observation["observation/image"])
    np.testing.assert_array_equal(actions, policy.chunk(query))
    assert key == "libero_goal" and query.instruction == "open the drawer"
    with pytest.raises(RuntimeError, match="instruction: found int"):
        client.infer({**observation, "prompt": 3})
    assert client.infer(observation)["actions"].shape == (8, 7)


def test_vla_evals_connection(server: PolicyServer, policy: Seeded) -> None:
    """Its hello, its PNG pictures, a chunk handed out action by action, an episode's start, and an error."""
    connection_module = pytest.importorskip("vla_eval.connection", reason="vla-eval is not installed")
    specs = pytest.importorskip("vla_eval.specs")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    state = rng.normal(size=8)

    def observation(number: int) -> dict[str, Any]:
        images = {"agentview": pictures[number], "wrist": pictures[2]}
        return {"images": images, "states": state, "task_description": "lift the pot"}

    async def talk() -> tuple[dict[str, Any], list[np.ndarray]]:
        task = {"suite": "libero_object", "task_id": 3, "episode_idx": 1}
        async with connection_module.Connection(f"ws://127.0.0.1:{server.port}/vla-eval") as connection:
            await connection.start_episode({"task": task})
            found = [(await connection.act(observation(0)))["actions"] for _ in range(10)]
            await connection.end_episode({"metrics": {"success": False}})
            await connection.start_episode({"task": task})
            found.append((await connection.act(observation(1)))["actions"])
            await connection.start_episode({"task": task})
            with pytest.raises(RuntimeError, match="instruction: found NoneType; accepted: a text"):
                await connection.act({**observation(0), "task_description": None})
            with pytest.raises(RuntimeError, match="images: found none"):
                await connection.act({})
            found.append((await connection.act(observation(0)))["actions"])
            return connection.server_info, found

    info, actions = asyncio.run(talk())
    asked = {"env_seed": 0, "quat_no_antipodal": True, "send_wrist_image": True, "send_state": True}
    assert info["observation_params"] == asked
    announced = {name: specs.DimSpec.from_dict(spec) for name, spec in info["action_spec"].items()}
    wanted = {"position": specs.POSITION_DELTA, "rotation": specs.ROTATION_AA, "gripper": specs.GRIPPER_CLOSE_POS}
    assert specs.check_specs(announced, wanted, {}, {}) == []
    first, second = (in_simulator(Seeded.chunk(policy.asked[index][0])) for index in (0, 2))
    expected = [*first, *first[:2], second[0], first[0]]
    np.testing.assert_allclose(actions, np.float32(expected), atol=1e-6)
    assert [key for _, key in policy.asked] == ["libero_object_no_noops"] * 4  # The suite's statistics.
    assert not any(query.prepared for query, _ in policy.asked)
    np.testing.assert_array_equal(policy.asked[0][0].image, pictures[0])
    assert policy.asked[0][0].seed == policy.asked[2][0].seed != policy.asked[1][0].seed


def test_vla_evals_connection_with_a_token(policy: Seeded) -> None:
    """It cannot set headers, but its address can hold the token."""
    connection_module = pytest.importorskip("vla_eval.connection", reason="vla-eval is not installed")

    async def connect(user: str) -> Any:
        address = f"ws://{user}127.0.0.1:{server.port}/vla-eval"
        connection = connection_module.Connection(address, max_retries=1, backoff_base=0.1)
        async with connection:
            return connection.server_info["model_server"]

    with PolicyServer(policy, SPEC, ServerSettings(port=0, token="not-to-be-guessed")) as server:
        assert asyncio.run(connect("any:not-to-be-guessed@")) == "seeded"
        for user in ("", "any:guess@"):
            with pytest.raises(ConnectionError, match="unreachable"):
                asyncio.run(connect(user))


@pytest.mark.sim
def test_vla_eval_runs_an_episode_of_libero_against_the_server(
    server: PolicyServer, policy: Seeded, tmp_path: Path
) -> None:
    """The harness itself, in a process of its own, since it changes torch.load; a few steps in the real simulator."""
    pytest.importorskip("vla_eval", reason="vla-eval is not installed")
    pytest.importorskip("libero", reason="LIBERO is not installed")
    benchmark = {"benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark", "mode": "sync"}
    benchmark |= {"params": {"suite": "libero_object", "num_steps_wait": 2}}
    benchmark |= {"episodes_per_task": 1, "max_tasks": 1, "max_steps": 9}
    address = {"url": f"ws://127.0.0.1:{server.port}/vla-eval", "timeout": 60}
    config = {"server": address, "output_dir": str(tmp_path), "benchmarks": [benchmark]}
    program = (
        "import json, sys; from vla_eval import api; "
        "print('RESULT', json.dumps(api.run(json.loads(sys.argv[1]), docker=False, no_save=True), default=str))"
    )
    command = [sys.executable, "-c", program, json.dumps(config)]
    run = run_program(command)
    assert run.returncode == 0, run.stderr[-2000:]
    (result,) = json.loads(run.stdout.split("RESULT ")[-1])
    (episode,) = result["tasks"][0]["episodes"]
    assert result.get("num_errors", 0) == 0 and episode["steps"] == 9, run.stderr[-2000:]
    assert "failure_reason" not in episode, run.stderr[-2000:]
    assert "mismatch" not in run.stderr.lower()
    assert len(policy.asked) == 2 and {key for _, key in policy.asked} == {"libero_object_no_noops"}
    query = policy.asked[0][0]
    assert query.image.shape == (256, 256, 3) and query.image.std() > 10 and query.state.shape == (8,)
    assert query.instruction == "pick up the alphabet soup and place it in the basket"
