"""Parts of the policy server without a server: wire formats, checks of requests, tokens, batching."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import json_numpy
import msgpack
import numpy as np
import pytest
from PIL import Image

from experiments.robot.policy import Query
from experiments.robot.serving.access import TOKEN_VARIABLE, read_token, refusal
from experiments.robot.serving.batching import Batcher, Overloaded
from experiments.robot.serving.observation import PolicySpec, Request, RequestError, from_openpi, parse_request
from experiments.robot.serving.wire import WireError, from_json, from_msgpack, to_json, to_msgpack, to_vla_eval
from prismatic.util.errors import UsageError
from prismatic.vla.platforms import LIBERO

IMAGE = np.zeros((12, 16, 3), dtype=np.uint8)
SPEC = PolicySpec("policy", LIBERO, 2, (12, 16), use_proprio=True, unnorm_keys=("a", "b"), unnorm_key="a")
PAYLOAD = {"full_image": IMAGE, "wrist_image": IMAGE + 1, "state": np.arange(8.0), "instruction": "open the drawer"}
VALUES: dict[str, Any] = {
    "image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "state": np.linspace(0, 1, 5),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3)),
    "nested": [{"x": np.array([True, False])}, "text", 3, None],
}


def assert_same(found: Any, expected: Any) -> None:
    """Types, shapes and bytes of all arrays, in the form that test_msgpack_is_what_openpi_writes has by hand."""
    assert to_msgpack(found) == to_msgpack(expected)


def test_json_is_what_the_json_numpy_package_reads_and_writes() -> None:
    assert_same(from_json(to_json(VALUES)), VALUES)
    assert_same(json_numpy.loads(to_json(VALUES)), VALUES)
    assert_same(from_json(json_numpy.dumps(VALUES)), VALUES)


def test_msgpack_is_what_openpi_writes() -> None:
    assert_same(from_msgpack(to_msgpack(VALUES)), VALUES)
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    by_hand = {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": "<f4", b"shape": [2, 3]}
    assert_same(from_msgpack(msgpack.packb({"x": by_hand})), {"x": array})
    assert msgpack.unpackb(to_msgpack({"x": array})) == {"x": by_hand}
    assert msgpack.unpackb(to_msgpack(np.float32(1.5))) == {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        b"\xff\xfe",
        "[" * 100_000,
        '{"__numpy__": "AAAA", "dtype": "|u1", "shape": [4]}',
        '{"__numpy__": "AAAA", "dtype": "|u1", "shape": [-3, -1]}',
        '{"__numpy__": "AAAA", "dtype": "|u1", "shape": 3}',
        '{"__numpy__": "AAAA", "dtype": "|u1"}',
        '{"__numpy__": "!", "dtype": "|u1", "shape": [1]}',
        '{"__numpy__": 7, "dtype": "|u1", "shape": [1]}',
        '{"__numpy__": "AAAAAAAAAAA=", "dtype": "|O", "shape": [1]}',
        '{"__numpy__": "AAAA", "dtype": "S3", "shape": [1]}',
        '{"__numpy__": "AAAA", "dtype": [["a", "u1"]], "shape": [3]}',
        '{"__numpy__": "AAAA", "dtype": "(3,)u1", "shape": [1]}',
        '{"__numpy__": "AAAA", "dtype": "nonsense,,(", "shape": [1]}',
    ],
)
def test_wrong_json_is_one_line(text: str | bytes) -> None:
    with pytest.raises(WireError) as refused:
        from_json(text)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "value",
    [
        {b"__ndarray__": True},
        {b"__ndarray__": True, b"data": "text", b"dtype": "<f4", b"shape": [1]},
        {b"__ndarray__": True, b"data": b"1234", b"dtype": "|O", b"shape": [1]},
        {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [2**40, 2**40]},
        {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"},
        {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"},
    ],
)
def test_wrong_msgpack_is_one_line(value: Any) -> None:
    for data in (msgpack.packb(value), msgpack.packb(value)[:-1], b"\xc1"):
        with pytest.raises(WireError) as refused:
            from_msgpack(data)
        assert "\n" not in str(refused.value)


def picture(side: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, 8), (10, 200, 30)).save(file, kind)
    return file.getvalue()


def test_vla_evals_arrays_and_pictures() -> None:
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    assert_same(from_msgpack(to_vla_eval({"x": array})), {"x": array})
    assert msgpack.unpackb(to_vla_eval(array))["shape"] == [2, 3]
    for kind in ("PNG", "JPEG"):
        found = from_msgpack(msgpack.packb({"__image__": True, "format": kind.lower(), "data": picture(16, kind)}))
        assert found.shape == (8, 16, 3) and found.dtype == np.uint8
        assert abs(found[0, 0].astype(int) - (10, 200, 30)).max() <= 3
    for data, reason in (
        (picture(5000, "PNG"), r"a picture of \(5000, 8\) pixels; accepted: sides up to 4096"),
        (picture(16, "BMP"), "neither a PNG nor a JPEG"),
        (picture(16, "PNG")[:44], "neither a PNG nor a JPEG"),
        ("text", "a picture's data is str"),
    ):
        with pytest.raises(WireError, match=reason):
            from_msgpack(msgpack.packb({"__image__": True, "format": "png", "data": data}))


def test_objects_are_not_sent() -> None:
    for encode in (to_json, to_msgpack):
        with pytest.raises(TypeError, match=r"arrays of object cannot be sent"):
            encode(np.array([object()]))


def test_a_request_in_upstreams_words() -> None:
    request = parse_request({**PAYLOAD, "unnorm_key": "b", "seed": 3, "comment": "ignored"}, SPEC)
    assert (request.unnorm_key, request.query.seed, request.query.instruction) == ("b", 3, "open the drawer")
    assert request.query.image is IMAGE and (request.query.wrist_image == 1).all()
    np.testing.assert_array_equal(request.query.state, np.arange(8))
    assert parse_request({**PAYLOAD, "state": list(range(8))}, SPEC).unnorm_key == "a"


def test_views_come_in_the_order_sent() -> None:
    spec = PolicySpec("policy", LIBERO, 3, (12, 16), use_proprio=False, unnorm_keys=("a",), unnorm_key="a")
    views = {"right_wrist_image": IMAGE + 1, "left_wrist_image": IMAGE + 2, "full_image": IMAGE}
    query = parse_request({**views, "instruction": "go"}, spec).query
    assert [int(image.max()) for image in (query.image, query.wrist_image, *query.extra_images)] == [0, 1, 2]


def test_openpis_names() -> None:
    payload = {
        "observation/image": IMAGE,
        "observation/wrist_image": IMAGE + 1,
        "observation/state": np.arange(8.0, dtype=np.float32),
        "prompt": "open the drawer",
    }
    request = parse_request(from_openpi(payload), SPEC)
    assert request.query.instruction == "open the drawer" and (request.query.wrist_image == 1).all()


def test_statistics_are_named_as_for_an_evaluation() -> None:
    spec = PolicySpec("policy", LIBERO, 2, (12, 16), use_proprio=True, unnorm_keys=("libero_goal_no_noops",))
    assert parse_request({**PAYLOAD, "unnorm_key": "libero_goal"}, spec).unnorm_key == "libero_goal_no_noops"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_image": None}, "full_image: found NoneType"),
        ({"full_image": IMAGE.astype(np.float32)}, r"full_image: found float32 \(12, 16, 3\)"),
        ({"wrist_image": IMAGE[..., 0]}, r"wrist_image: found uint8 \(12, 16\); accepted: uint8 \(height, width, 3\)"),
        ({"wrist_image": IMAGE[:0]}, "wrist_image: found uint8"),
        ({"state": None}, "state: found nothing; accepted: 8 finite numbers"),
        ({"state": [1, 2]}, r"state: found shape \(2,\)"),
        ({"state": [[1], [2, 3]]}, "state: found list that is no array of numbers"),
        ({"state": {"x": 1}}, "state: found dict that is no array of numbers"),
        ({"state": [float("nan")] * 8}, "state: found values that are not finite"),
        ({"instruction": ""}, "instruction: found 0 characters"),
        ({"instruction": "a" * 1001}, "instruction: found 1001 characters"),
        ({"instruction": 4}, "instruction: found int"),
        ({"unnorm_key": "c"}, "unnorm_key: found 'c'; accepted: a, b"),
        ({"unnorm_key": ["a"]}, "unnorm_key: found"),
        ({"unnorm_key": np.ones(2)}, "unnorm_key: found"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": True}, "seed: found True"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        parse_request({**PAYLOAD, **changes}, SPEC)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", [np.array("open it"), np.str_("open it"), np.array(b"open it"), b"open it", "open it"])
def test_text_is_text_in_whatever_form_a_client_sends_it(text: Any) -> None:
    payload = {**PAYLOAD, "instruction": text, "unnorm_key": np.array("b")}
    received = [from_msgpack(to_msgpack(payload), lenient=True)]
    if not isinstance(text, bytes):
        received.append(from_json(to_json(payload), lenient=True))
    for content in received:
        request = parse_request(content, SPEC)
        assert type(request.query.instruction) is str and request.query.instruction == "open it"
        assert request.unnorm_key == "b"


def test_a_field_that_nobody_reads_refuses_no_request() -> None:
    names = np.array(["joint_1", "joint_2"])
    odd: dict[str, Any] = {
        "joint_names": {b"__ndarray__": True, b"data": names.tobytes(), b"dtype": names.dtype.str, b"shape": [2]},
        "time": {b"__ndarray__": True, b"data": b"", b"dtype": "<M8[ns]", b"shape": [0]},
        "cut": {b"__ndarray__": True, b"data": b"12", b"dtype": "<f4", b"shape": [2]},
        "thumbnail": {"__image__": True, "format": "png", "data": b"no picture"},
        "wrist_force": np.zeros(6),
        "counts": {1: 2},
        "note": "\udcff",
    }
    packing = {"default": lambda value: msgpack.unpackb(to_msgpack(value)), "unicode_errors": "surrogateescape"}
    message = msgpack.packb({**odd, **PAYLOAD}, **packing)
    content: Any = from_msgpack(message, lenient=True)
    request = parse_request(content, SPEC)
    assert (request.query.wrist_image == 1).all()
    for field in ("time", "cut", "thumbnail"):
        with pytest.raises(RequestError, match=r"instruction: found a"):
            parse_request({**content, "instruction": content[field]}, SPEC)
    with pytest.raises(WireError):
        from_msgpack(message)
    text = '{"full_image": 1, "x": {"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}}'
    with pytest.raises(RequestError, match="full_image: found int"):
        parse_request({**PAYLOAD, **from_json(text, lenient=True)}, SPEC)  # type: ignore[dict-item]
    with pytest.raises(RequestError, match="text: found bytes that are no UTF-8"):
        parse_request({**PAYLOAD, "instruction": content["note"]}, SPEC)


def test_missing_views_and_payloads_that_are_none() -> None:
    with pytest.raises(RequestError, match="full_image and 1 wrist images are needed; found fields: full_image, state"):
        parse_request({key: value for key, value in PAYLOAD.items() if key != "wrist_image"}, SPEC)
    with pytest.raises(RequestError, match="found fields: none"):
        parse_request({}, SPEC)
    with pytest.raises(RequestError, match="payload: found list"):
        parse_request(from_openpi([1]), SPEC)


def test_a_request_must_name_the_statistics_when_there_is_no_default() -> None:
    spec = PolicySpec("policy", LIBERO, 2, (12, 16), use_proprio=True, unnorm_keys=("a", "b"))
    with pytest.raises(RequestError, match="unnorm_key: not given, and the server has no default; accepted: a, b"):
        parse_request(PAYLOAD, spec)
    assert parse_request({**PAYLOAD, "unnorm_key": "b"}, spec).unnorm_key == "b"


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token("") is None
    monkeypatch.setenv(TOKEN_VARIABLE, "from-environment")
    assert read_token("") == "from-environment"
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert read_token(str(file)) == "from-file"
    for content, message in (("", "holds no token"), ("two words", "holds no token")):
        file.write_text(content)
        with pytest.raises(UsageError, match=message) as refused:
            read_token(str(file))
        assert "two words" not in str(refused.value)
    with pytest.raises(UsageError, match=r"--token_file: .*cannot be read"):
        read_token(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("headers", "token", "status"),
    [
        ({}, None, None),
        ({"authorization": "Bearer secret"}, "secret", None),
        ({"authorization": "Api-Key secret"}, "secret", None),
        ({}, "secret", 401),
        ({"authorization": "Bearer secre"}, "secret", 401),
        ({"authorization": "Bearer \xe9"}, "secret", 401),
        ({"authorization": "Basic secret"}, "secret", 401),
        ({"authorization": "Basic " + base64.b64encode(b"any:secret").decode()}, "secret", None),
        ({"authorization": "Basic " + base64.b64encode(b"secret:").decode()}, "secret", 401),
        ({"authorization": "Basic " + base64.b64encode(b"\xff:\xff").decode()}, "secret", 401),
        ({"origin": "https://example.org"}, None, 403),
        ({"origin": "http://127.0.0.1:8777", "host": "127.0.0.1:8777"}, None, None),
        ({"origin": "https://[::1]", "host": "[::1]:443"}, None, None),
        ({"origin": f"http://{socket.gethostname()}:8777", "host": f"{socket.gethostname()}:8777"}, None, None),
        ({"origin": "http://127.0.0.1:9999", "host": "127.0.0.1:8777"}, None, 403),
        ({"origin": "null", "host": "127.0.0.1:8777"}, None, 403),
        ({"origin": "http://127.0.0.1:port", "host": "127.0.0.1:8777"}, None, 403),
        ({"origin": "http://evil.example:8777", "host": "evil.example:8777"}, None, 403),  # DNS rebinding
        ({"origin": "http://evil.example:8777", "host": "evil.example:8777"}, "secret", 401),
    ],
)
def test_access(headers: dict[str, str], token: str | None, status: int | None) -> None:
    assert (refusal(headers, token) or (None,))[0] == status


class CountingPolicy:
    """Answers each query with the first number of its state; fails where that is negative. Waits for `gate`."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, str | None]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.entered = threading.Event()

    def act(self, queries: Sequence[Query], unnorm_key: str | None = None) -> np.ndarray:
        self.entered.set()
        assert self.gate.wait(120)
        self.batches.append((len(queries), unnorm_key))
        self.threads.add(threading.get_ident())
        if any(query.state[0] < 0 for query in queries):
            raise RuntimeError("the policy broke")
        return np.stack([np.full((8, 7), query.state[0]) for query in queries])


def request(number: float, key: str = "a") -> Request:
    return Request(Query(IMAGE, IMAGE, np.full(8, number), "go"), key)


def test_what_waits_is_answered_together() -> None:
    policy = CountingPolicy()
    batcher = Batcher(policy, max_batch=4, max_wait_s=0)
    first = batcher.submit(request(0))
    assert policy.entered.wait(120)
    waiting = [batcher.submit(request(number, "b" if number == 3 else "a")) for number in range(1, 7)]
    waiting[1].cancel()  # Its client has gone.
    policy.gate.set()
    numbers = [future.result(120)[0, 0] for future in (first, *waiting[:1], *waiting[2:])]
    assert numbers == [0, 1, 3, 4, 5, 6]
    assert policy.batches == [(1, "a"), (2, "a"), (1, "b"), (2, "a")]
    assert len(policy.threads) == 1
    batcher.close()


def test_a_request_that_breaks_the_policy_spoils_no_other() -> None:
    policy = CountingPolicy()
    batcher = Batcher(policy, max_batch=8, max_wait_s=0)
    batcher.submit(request(0))
    assert policy.entered.wait(120)
    good, bad, better = (batcher.submit(request(number)) for number in (1, -1, 2))
    policy.gate.set()
    assert good.result(120)[0, 0] == 1 and better.result(120)[0, 0] == 2
    with pytest.raises(RuntimeError, match="the policy broke"):
        bad.result(120)
    assert batcher.submit(request(5)).result(120)[0, 0] == 5
    batcher.close()


def test_a_policy_that_answers_too_few_of_a_batch_leaves_nobody_waiting() -> None:
    policy = CountingPolicy()
    act, policy.act = policy.act, lambda queries, key=None: act(queries, key)[:1]  # type: ignore[method-assign]
    batcher = Batcher(policy, max_batch=8, max_wait_s=0)
    futures = [batcher.submit(request(number)) for number in range(3)]
    policy.gate.set()
    assert [future.result(120)[0, 0] for future in futures] == [0, 1, 2]
    batcher.close()


def test_too_many_requests_and_shutting_down() -> None:
    policy = CountingPolicy()
    batcher = Batcher(policy, max_batch=1, max_wait_s=0, max_queue=2)
    running = batcher.submit(request(0))
    assert policy.entered.wait(120)
    waiting = [batcher.submit(request(number)) for number in (1, 2)]
    assert waiting.pop(0).cancel()  # Closing must not stumble over it.
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        batcher.submit(request(3))
    pool = ThreadPoolExecutor(1)
    closing = pool.submit(batcher.close)
    while True:
        try:
            batcher.submit(request(4))
        except Overloaded as error:
            if "shutting down" in str(error):
                break
    policy.gate.set()
    closing.result(120)
    assert running.result(120)[0, 0] == 0
    for future in waiting:
        with pytest.raises(Overloaded, match="shutting down"):
            future.result(120)


def test_a_request_that_comes_while_the_batcher_closes_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was let in before, and gets into the queue when closing has had the time to end."""
    policy = CountingPolicy()
    policy.gate.set()
    batcher, pool = Batcher(policy), ThreadPoolExecutor(1)
    put, closing = batcher._waiting.put_nowait, []

    def put_late(item: Any) -> None:
        if item is not None:
            closing.append(pool.submit(batcher.close))
            wait(closing, timeout=0.3)
        put(item)

    monkeypatch.setattr(batcher._waiting, "put_nowait", put_late)
    with contextlib.suppress(Overloaded):
        wait([future := batcher.submit(request(1))], timeout=120)
        assert future.done()
    closing[0].result(120)
