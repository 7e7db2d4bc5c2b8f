"""The real policy server on a loopback port, asked by the real client, by upstream's way of asking and by openpi's."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import json_numpy
import msgpack
import numpy as np
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import deploy
from experiments.robot.openvla_utils import OpenVLAPolicy, get_vla_action
from experiments.robot.policy import PolicyFlags, Query
from experiments.robot.robot_utils import invert_gripper_action, normalize_gripper_action
from experiments.robot.serving.client import PolicyClient, ServerError
from experiments.robot.serving.server import PolicyServer, ServedPolicy, ServerSettings
from experiments.robot.serving.wire import from_msgpack, to_msgpack
from prismatic.util.errors import UsageError

WORDS = ("put the bowl on the stove", "open the middle drawer of the cabinet and put the mug into it", "stop")


@pytest.fixture(scope="module")
def policy(openvla_checkpoint: Path) -> ServedPolicy:
    return ServedPolicy.from_checkpoint(str(openvla_checkpoint), PolicyFlags(device="cpu"), "libero_tiny")


def serve(policy: ServedPolicy, **settings: Any) -> PolicyServer:
    return PolicyServer(policy, policy.spec("tiny", "libero_tiny"), ServerSettings(port=0, **settings))


@pytest.fixture(scope="module")
def server(policy: ServedPolicy) -> Iterator[PolicyServer]:
    with serve(policy, max_request_bytes=300_000, max_wait_s=0.02) as running:
        yield running


@pytest.fixture(scope="module")
def queries() -> list[Query]:
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (12, 2, 96, 96, 3), dtype=np.uint8)
    states = rng.normal(size=(12, 8))
    return [Query(*pair, state, WORDS[i % 3]) for i, (pair, state) in enumerate(zip(images, states))]


def observation(query: Query) -> dict[str, Any]:
    return {
        "full_image": query.image,
        "wrist_image": query.wrist_image,
        "state": query.state,
        "instruction": query.instruction,
    }


def post(server: PolicyServer, body: str | bytes, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    connection.request("POST", "/act", body, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def test_the_client_gets_what_the_policy_answers(
    server: PolicyServer, policy: ServedPolicy, openvla_checkpoint: Path, queries: list[Query]
) -> None:
    client = PolicyClient(port=server.port)
    assert client.is_healthy()
    expected = OpenVLAPolicy.act(policy, queries[:1])[0]
    actions = client.infer(observation(queries[0]))
    assert actions.shape == (8, 7) and actions.dtype == np.float64
    np.testing.assert_allclose(actions, expected, atol=1e-6)
    other = client.infer({**observation(queries[0]), "unnorm_key": "other_tiny"})
    np.testing.assert_allclose(other, policy.act(queries[:1], "other_tiny")[0], atol=1e-6)
    assert np.abs(other - actions).max() > 1e-2
    metadata = client.metadata()
    assert metadata["unnorm_keys"] == ["libero_tiny", "other_tiny"] and metadata["unnorm_key"] == "libero_tiny"
    assert (metadata["action_horizon"], metadata["action_dim"], metadata["image_size"]) == (8, 7, [56, 56])


def test_many_clients_at_once_share_forward_passes(
    server: PolicyServer, policy: ServedPolicy, queries: list[Query]
) -> None:
    before = dict(server.batcher.batch_sizes)
    together = PolicyClient(port=server.port).act(queries)
    assert together.shape == (12, 8, 7)
    for query, actions in zip(queries, together):
        np.testing.assert_allclose(actions, policy.act([query])[0], atol=1e-4)
    sizes = {size: count - before.get(size, 0) for size, count in server.batcher.batch_sizes.items()}
    assert sum(size * count for size, count in sizes.items()) == 12
    assert max(size for size, count in sizes.items() if count) > 1


def test_upstreams_two_forms(server: PolicyServer, policy: ServedPolicy, queries: list[Query]) -> None:
    """As deployed robots ask: json_numpy's objects, or all of it as a string within JSON."""
    payload = json_numpy.dumps(observation(queries[1]))
    status, content = post(server, payload)
    actions = json_numpy.loads(json.dumps(content))
    assert status == 200 and isinstance(actions, list) and len(actions) == 8
    np.testing.assert_allclose(np.stack(actions), policy.act(queries[1:2])[0], atol=1e-6)
    status, content = post(server, json.dumps({"encoded": payload}))
    assert status == 200 and isinstance(content, str)
    np.testing.assert_array_equal(np.stack(json_numpy.loads(content)), np.stack(actions))


def test_images_of_the_policys_size_are_taken_as_prepared(
    server: PolicyServer, policy: ServedPolicy, queries: list[Query]
) -> None:
    small = Query(queries[0].image[:56, :56], queries[0].wrist_image[:56, :56], queries[0].state, "stop")
    actions = PolicyClient(port=server.port).infer(observation(small))
    cfg = PolicyFlags(unnorm_key="libero_tiny")
    upstream = get_vla_action(cfg, policy.vla, policy.processor, observation(small), "stop", **policy._parts)
    np.testing.assert_allclose(actions, np.stack(upstream), atol=1e-6)


def test_wrong_requests_get_a_reason_and_the_server_goes_on(server: PolicyServer, queries: list[Query]) -> None:
    good = observation(queries[0])
    for body, reason in (
        (b"", "not readable as JSON"),
        (b"\x80\x04.", "not readable as JSON"),
        (json.dumps([1]), "payload: found list"),
        (json.dumps({"encoded": 3}), "encoded: found int"),
        (json.dumps({"encoded": "{"}), "not readable as JSON"),
        (json_numpy.dumps({**good, "full_image": [[1]]}), "full_image: found list"),
        (json_numpy.dumps({**good, "state": [0.0]}), r"state: found shape (1,); accepted: 8 finite numbers"),
        (json_numpy.dumps({**good, "unnorm_key": "nope"}), "unnorm_key: found 'nope'; accepted: libero_tiny"),
    ):
        status, content = post(server, body)
        assert status == 400 and reason in content["detail"] and "\n" not in content["detail"]
    assert post(server, b" " * 300_001)[0] == 413
    assert post(server, json_numpy.dumps(good), Origin="https://example.org")[0] == 403
    with pytest.raises(ServerError, match=r"instruction: found 0 characters.*status 400") as refused:
        PolicyClient(port=server.port).infer({**good, "instruction": ""})
    assert refused.value.status == 400
    assert PolicyClient(port=server.port).infer(good).shape == (8, 7)


def test_a_failing_policy_is_500_and_the_server_goes_on(
    policy: ServedPolicy, queries: list[Query], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(policy) as running:
        client = PolicyClient(port=running.port)

        def broken(*_: Any) -> None:
            raise RuntimeError("secret of the house")

        with monkeypatch.context() as patched:
            patched.setattr(policy, "_prepare", broken)
            with pytest.raises(ServerError, match="the policy failed") as refused:
                client.infer(observation(queries[0]))
        assert refused.value.status == 500 and "secret" not in str(refused.value)
        assert "secret of the house" in caplog.text
        assert client.infer(observation(queries[0])).shape == (8, 7)


def test_openpis_protocol(server: PolicyServer, policy: ServedPolicy, queries: list[Query]) -> None:
    query = queries[2]
    payload = {
        "observation/image": query.image,
        "observation/wrist_image": query.wrist_image,
        "observation/state": query.state,
        "prompt": query.instruction,
    }
    with connect(f"ws://127.0.0.1:{server.port}", compression=None, max_size=None) as socket:
        assert from_msgpack(socket.recv())["action_dim"] == 7
        for _ in range(2):
            socket.send(to_msgpack(payload))
            answer = from_msgpack(socket.recv())
            np.testing.assert_allclose(answer["actions"], policy.act([query])[0], atol=1e-6)
            assert answer["server_timing"]["infer_ms"] > 0
        for message, reason in (
            (b"\xc1", "not readable as msgpack"),
            ("text", "message: found text"),
            (to_msgpack({**payload, "prompt": 3}), "instruction: found int"),
            (msgpack.packb({b"__ndarray__": True}), "an array's dtype"),
        ):
            socket.send(message)
            refused = socket.recv()
            assert isinstance(refused, str) and reason in refused and "\n" not in refused
        socket.send(to_msgpack(payload))
        assert isinstance(socket.recv(), bytes)
        socket.send(b"0" * 400_000)
        with pytest.raises(Exception, match=r"1009|too big"):
            socket.recv()
    assert PolicyClient(port=server.port).is_healthy()


def test_token_and_gripper_of_the_simulator(policy: ServedPolicy, queries: list[Query]) -> None:
    token = "not-to-be-guessed"
    with serve(policy, token=token, websocket_gripper="libero") as running:
        assert PolicyClient(port=running.port).is_healthy()
        for wrong in (None, "guess", ""):
            client = PolicyClient(port=running.port, token=wrong)
            for ask in (client.metadata, lambda client=client: client.infer(observation(queries[0]))):
                with pytest.raises(ServerError, match="a token is needed") as refused:
                    ask()
                assert refused.value.status == 401
        actions = PolicyClient(port=running.port, token=token).infer(observation(queries[0]))
        uri = f"ws://127.0.0.1:{running.port}"
        with pytest.raises(InvalidStatus) as denied:
            connect(uri, additional_headers={"Authorization": "Api-Key guess"})
        assert denied.value.response.status_code == 401
        with connect(uri, additional_headers={"Authorization": f"Api-Key {token}"}) as socket:
            assert from_msgpack(socket.recv())["gripper"] == "-1 = open, +1 = closed"
            socket.send(to_msgpack(observation(queries[0])))
            found = from_msgpack(socket.recv())["actions"]
        np.testing.assert_allclose(found, invert_gripper_action(normalize_gripper_action(actions)), atol=1e-6)
        assert set(np.unique(found[:, -1])) <= {-1.0, 0.0, 1.0}


def test_the_client_opens_a_lost_connection_again(policy: ServedPolicy, queries: list[Query]) -> None:
    client = PolicyClient(port=0)
    assert not client.is_healthy()
    for _ in range(2):
        with serve(policy) as running:
            client.port = running.port
            if getattr(client._local, "connection", None) is not None:
                client._local.connection.port = running.port
            assert client.infer(observation(queries[0])).shape == (8, 7)


def run_script(repo_root: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, repo_root / "vla-scripts" / "deploy.py", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_script_serves_until_interrupted(repo_root: Path, l1_checkpoint: Path, queries: list[Query]) -> None:
    flags = ["--pretrained_checkpoint", str(l1_checkpoint), "--unnorm_key", "libero_tiny", "--port", "0"]
    process = run_script(repo_root, *flags, "--device", "cpu", POLICY_SERVER_TOKEN="not-to-be-guessed")
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        port = int(line.split("http://127.0.0.1:")[1].split()[0])
        actions = PolicyClient(port=port, token="not-to-be-guessed").infer(observation(queries[0]))
        assert actions.shape == (8, 7)
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=600)
    assert process.returncode in (0, 130) and "Traceback" not in err
    assert "not-to-be-guessed" not in line + out + err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"unnorm_key": "nope"}, "--unnorm_key: no statistics of 'nope' in the checkpoint; accepted: libero_tiny"),
        ({"use_diffusion": True}, "--use_l1_regression, --use_diffusion: both are True"),
        ({"pretrained_checkpoint": "/no/such"}, "--pretrained_checkpoint: no such folder"),
        ({"host": "no.such.host.invalid"}, "--host: 'no.such.host.invalid' is no address of this machine"),
        ({"token_file": "/no/such"}, "--token_file: /no/such: cannot be read"),
        ({"use_film": True}, "--use_film: .* has no vision_backbone"),
    ],
)
def test_wrong_flags_are_refused(l1_checkpoint: Path, flags: dict[str, Any], message: str) -> None:
    config = deploy.DeployConfig(**{"pretrained_checkpoint": str(l1_checkpoint), "port": 0, **flags})
    with pytest.raises(UsageError, match=message):
        deploy.main(config)


def test_a_policy_that_was_trained_otherwise_is_refused(
    l1_checkpoint: Path, openvla_checkpoint: Path, tmp_path: Path
) -> None:
    """As in an evaluation: it would answer, but with wrong actions."""
    trained = Path(shutil.copytree(l1_checkpoint, tmp_path / "trained"))
    (trained / "run_config.json").write_text(json.dumps({"use_proprio": True}))
    for folder, flags, message in (
        (trained, {"use_proprio": False}, "--use_proprio: found False; accepted: True, as .* says"),
        (openvla_checkpoint, {}, "--use_l1_regression: .* holds a diffusion head"),
    ):
        config = deploy.DeployConfig(pretrained_checkpoint=str(folder), **flags)
        with pytest.raises(UsageError, match=message):
            deploy.main(config)


def test_a_port_in_use_is_refused_before_the_policy_is_loaded(
    l1_checkpoint: Path, server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServedPolicy, "from_checkpoint", lambda *_: pytest.fail("loaded"))
    config = deploy.DeployConfig(pretrained_checkpoint=str(l1_checkpoint), port=server.port)
    with pytest.raises(UsageError, match=rf"--port: 127.0.0.1:{server.port} cannot be used"):
        deploy.main(config)
