"""`rotary-export serve` over HTTP and gRPC: the same answers from every engine."""

import http.client
import json
import socket
from urllib.request import urlopen

import numpy as np
import pytest
from helpers.bundles import get_bundle, make_arrays
from helpers.http_calls import make_body, send
from helpers.serving_runs import (
    MLSERVER,
    PROTOCOLS,
    RAY,
    SHAPES,
    Server,
    ask,
    compare_replies,
    compute_eager,
)
from helpers.target_runs import compare

from rotary_export import load
from rotary_export.serving.messages import HEADER_LENGTH

LENGTH = "Content-Length"
SMALL_BODY = 32 << 10  # bytes; as in json_workers.py, which requires anyio


@pytest.fixture(scope="module", params=[MLSERVER, RAY], ids=lambda engine: engine.name)
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def python(engine):
    return engine.python


@pytest.fixture(scope="module")
def server(engine, python, tmp_path_factory):
    """A server of `plain`."""
    folder = tmp_path_factory.mktemp(engine.name)
    with Server(python, folder, get_bundle("plain").path, *engine.options) as running:
        yield running


# ---- right answers


def test_rotate_has_the_bits_of_eager(engine, server, python, tmp_path):
    requests = [make_arrays("plain", batch=b, seq_len=s, seed=s) for b, s in SHAPES]
    wants = [compute_eager("plain", request) for request in requests]
    compare_replies(server, python, tmp_path, requests, wants, 0)
    engine.record("rotate", "float32", 0.0, exact=True)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_bad_id_fails_alone(protocol, server, python, tmp_path):
    requests = [make_arrays("plain", batch=1, seed=seed) for seed in range(16)]
    requests[5]["position_ids"][0, 3] = -1
    replies = ask(python, tmp_path, protocol, getattr(server, protocol), "plain", requests)
    assert "position_ids must be in [0, 32), got -1 at batch 0, row 3" in replies.pop(5)
    del requests[5]
    for request, reply in zip(requests, replies, strict=True):
        compare(reply, compute_eager("plain", request), 0)


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain"])
def test_a_body_is_json_whatever_its_content_type(kind, server):
    """As of `curl -d`, which names the first one."""
    inputs = make_arrays("plain", batch=1)
    status, answer = send(server.http, make_body(inputs), {"Content-Type": kind})
    assert status == 200, answer
    got = {o["name"]: np.array(o["data"], "f").reshape(o["shape"]) for o in answer["outputs"]}
    compare(got, compute_eager("plain", inputs), 0)


# ---- health and metadata


def test_health_and_metadata(server):
    assert server.is_ready()
    for path, key, want in (
        ("/v2", "name", "rotary_export"),
        ("/v2/models/plain", "platform", "onnxruntime_onnx"),
        ("/v2/models/plain/versions/1", "versions", ["1"]),
    ):
        with urlopen(f"http://{server.http}{path}", timeout=20) as answer:
            assert json.loads(answer.read())[key] == want
    kernel_path = load(get_bundle("plain").path).kernel_path
    assert kernel_path.startswith("fused")
    assert kernel_path in server.line


# ---- bad requests


def list_malformed():
    """Return (status, message, body, headers) of requests that every engine refuses."""
    good = make_arrays("plain", batch=1)
    body = make_body(good)
    return [
        (400, "rotate has no input 'q'", make_body(good, name="q"), {}),
        (400, "rotate needs the input 'key'", make_body({"query": good["query"]}), {}),
        (400, "must have the datatype FP32, got INT64", make_body(good, datatype="INT64"), {}),
        (400, "query must have shape (batch_size, ", make_body(good, shape=[1, 28, 24]), {}),
        (400, "key must have shape (batch_size, ", make_body(good, shape=[1, 7, 4, 24]), {}),
        (400, "its shape (1000000000, 1000000000)", make_body(good, shape=[10**9] * 2), {}),
        (400, "query must contain FP32 numbers", make_body(good, data=["x"] * 672), {}),
        (400, "query must have the shape", make_body(good, shape=[1] * 69 + [672]), {}),
        (400, "query must have the shape", make_body(good, shape=[2**62, 0], data=[]), {}),
        (400, "must have the datatype FP32, got BF16", make_body(good, datatype="BF16"), {}),
        (413, "the body must be <= 67108864 bytes, got 1073741824", b"{}", {LENGTH: 2**30}),
        (415, "must not be compressed", body, {"Content-Encoding": "gzip"}),
        (400, "must be a number <= the size of the body", body, {HEADER_LENGTH: 2**30}),
        (400, "must have 'datatype', a str, got int", make_body(good, datatype=3), {}),
        (400, "the input 'key' must be given once", make_body(good, name="key"), {}),
        (400, "shape of inputs[0] must contain integers", make_body(good, shape=[1.5]), {}),
        (400, "the body must be JSON", body[: len(body) // 2], {}),
        (400, "the body must be JSON", b"", {}),
        (400, "the body must be JSON", b"[" * 5000, {}),
        (400, "the request must be an object, got list", b"[]", {}),
        (400, "must have 'inputs', a list, got nothing", b"{}", {}),
    ]  # fmt: skip


def test_malformed_requests_get_an_error_and_the_server_continues(engine, server):
    body = make_body(make_arrays("plain", batch=1))
    for status, message, sent, headers in list_malformed():
        got, answer = send(server.http, sent, headers)
        assert (got, message in answer["error"]) == (status, True), (message, got, answer)
    assert send(server.http, body, path="/v2/models/x/infer")[0] == 404
    assert send(server.http, body)[0] == 200
    # A truncated body: the client disconnects early.
    host, _, port = server.http.partition(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.putrequest("POST", "/v2/models/plain/infer")
    connection.putheader(LENGTH, str(len(body)))
    connection.endheaders(body[:100])
    connection.close()
    assert send(server.http, body)[0] == 200
    if engine is MLSERVER:
        assert server.errors.read_text() == ""


def test_a_large_request_is_read_apart(server):
    inputs = make_arrays("plain", batch=4, seq_len=32)
    body = make_body(inputs)
    assert len(body) > SMALL_BODY
    status, answer = send(server.http, body)
    assert status == 200, answer
    outputs = {
        output["name"]: np.array(output["data"], np.float32).reshape(output["shape"])
        for output in answer["outputs"]
    }
    compare(outputs, compute_eager("plain", inputs), 0)
    for message, wrong in (
        ("the body must be JSON", body[:-9]),
        ("at most 1048576 lists", b"[" + b"[]," * (2**20 + 1) + b"0]"),
        ("has no input 'q'", make_body(inputs, name="q")),
    ):
        status, answer = send(server.http, wrong)
        assert (status, message in answer["error"]) == (400, True), answer
    assert send(server.http, body)[0] == 200


def test_the_body_of_a_request_must_arrive(server):
    host, _, port = server.http.partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"POST /v2/models/plain/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\n"
        connection.sendall(head.encode() + b"{")
        assert server.is_ready()
        answer = connection.makefile("rb").read()
    assert b" 408 " in answer
    assert b"the body must arrive within 10 s" in answer


def test_a_grpc_message_that_does_not_match_gets_an_error(server, python, tmp_path):
    good = make_arrays("plain", batch=1)
    narrow, long = (good | {"query": np.zeros(shape, np.float32)} for shape in ((1, 2), (1, 2**25)))
    replies = ask(
        python, tmp_path, "grpc", server.grpc, "plain",
        [good | {"x": good["key"]}, {"query": good["query"]}, narrow, long, good],
    )  # fmt: skip
    messages = ("no input 'x'", "needs the input 'key'", "query must have shape", "larger than max")
    *refused, reply = replies
    for message, got in zip(messages, refused, strict=True):
        assert message in got
    compare(reply, compute_eager("plain", good), 0)
