"""`rotary-export serve --engine ray`, and the kit for a cluster, asked by tritonclient."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from helpers.bundles import get_bundle, make_arrays, run_eager, to_numpy
from helpers.http_calls import make_binary_body, make_body, send
from helpers.paths import ROOT, TOOLS
from helpers.processes import find_alive, find_family, wait_for
from helpers.serving_runs import Server, ask
from helpers.target_runs import (
    Row,
    compare,
    get_model_bundle,
    make_model_arrays,
    read_version,
    record,
    require,
    run_model_eager,
)

from rotary_export import load
from rotary_export.proof.tolerances import TOLERANCES

PROTOCOLS = ("http", "grpc")
SHAPES = ((1, 1), (3, 7), (2, 32))
REPLICA = "ray::ServeReplica"
LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def python():
    return require("ray") / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def server(python, tmp_path_factory):
    """A server of `plain`; requests wait for each other, so that what is sent at once runs so."""
    folder = tmp_path_factory.mktemp("ray")
    arguments = ("--engine", "ray", "--replicas", 2, "--max-batch-delay-ms", 20)
    with Server(python, folder, get_bundle("plain").path, *arguments) as running:
        yield running


def compute_eager(name, inputs):
    return {key: to_numpy(value) for key, value in run_eager(name, inputs).items()}


# ---- right answers


def test_rotate(server, python, tmp_path):
    requests = [make_arrays("plain", batch=b, seq_len=s, seed=s) for b, s in SHAPES]
    for protocol in PROTOCOLS:
        replies = ask(python, tmp_path, protocol, getattr(server, protocol), "plain", requests)
        for request, reply in zip(requests, replies, strict=True):
            compare(reply, compute_eager("plain", request), 0)
    record(
        Row(
            "Ray Serve", read_version(python, "ray"), "rotate", "ran", "fused", ("float32",),
            [f"{b}x{s}" for b, s in SHAPES], 0.0, True,
            "rotary-export serve --engine ray --replicas 2; HTTP and gRPC",
        )
    )  # fmt: skip


def test_binary_tensors_over_http(server):
    inputs = make_arrays("plain", batch=2, seq_len=5)
    header, tensors = make_binary_body(inputs)
    request = Request(f"http://{server.http}/v2/models/plain/versions/1/infer", header + tensors)
    request.add_header(LENGTH, str(len(header)))
    with urlopen(request, timeout=20) as answer:
        size, body = int(answer.headers[LENGTH]), answer.read()
    described, outputs = json.loads(body[:size])["outputs"], {}
    rest = body[size:]
    for tensor in described:
        size = tensor["parameters"]["binary_data_size"]
        outputs[tensor["name"]] = np.frombuffer(rest[:size], np.float32).reshape(tensor["shape"])
        rest = rest[size:]
    compare(outputs, compute_eager("plain", inputs), 0)
    wrong = [
        ("must be a number <= the size of the body", header + tensors, 2**30),
        ("must be a number <= the size of the body", header + tensors, "x"),
        ("binary_data_size must be >= 0 and <= the", header + tensors[:-1], len(header)),
        ("has 1 bytes more than its inputs take", header + tensors + b"x", len(header)),
    ]
    for message, body, length in wrong:
        status, answer = send(server.http, body, {LENGTH: length})
        assert (status, message in answer["error"]) == (400, True), answer


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_bad_id_fails_alone(protocol, server, python, tmp_path):
    requests = [make_arrays("plain", batch=1, seed=seed) for seed in range(16)]
    requests[5]["position_ids"][0, 3] = -1
    replies = ask(python, tmp_path, protocol, getattr(server, protocol), "plain", requests)
    assert "position_ids must be in [0, 32), got -1 at batch 0, row 3" in replies.pop(5)
    del requests[5]
    for request, reply in zip(requests, replies, strict=True):
        compare(reply, compute_eager("plain", request), 0)


def test_load(server, python, tmp_path):
    """16 clients, mixed lengths, half of them over HTTP."""
    script = TOOLS / "targets" / "load_server.py"
    bundle = str(get_bundle("plain").path)
    load_server = [sys.executable, script, "prepare", bundle, tmp_path / "requests"]
    subprocess.run(
        load_server, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True
    )
    addresses = ["--http", server.http, "--grpc", server.grpc, "--binary"]
    run = subprocess.run(
        [
            python, script, "run", tmp_path / "requests", "--model", "plain", *addresses,
            "--seconds", "3", "--json",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    assert (found["clients"], found["errors"], found["wrong"]) == (16, 0, 0)
    assert found["requests"] > 50


# ---- what is told to clients and to whoever watches


def test_health_metadata_and_metrics(server):
    assert server.is_ready()
    for path, key, want in (
        ("/v2", "name", "rotary_export"),
        ("/v2/models/plain", "platform", "onnxruntime_onnx"),
        ("/v2/models/plain/versions/1", "versions", ["1"]),
    ):
        with urlopen(f"http://{server.http}{path}", timeout=20) as answer:
            assert json.loads(answer.read())[key] == want
    with urlopen(f"http://{server.http}/v2/models/plain/ready", timeout=20) as answer:
        assert answer.status == 200
    for path in ("/v2/models/other", "/v2/models/plain/versions/2", "/v2/models/x/ready", "/x"):
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"http://{server.http}{path}", timeout=20)
    kernel_path = load(get_bundle("plain").path).kernel_path
    assert kernel_path.startswith("fused")
    assert f"({kernel_path}, 2 replicas)" in server.line

    def count_replicas():
        metrics = server.read_metrics()
        found = [m for m in metrics if m.startswith("ray_rotary_export_kernel_path{")]
        assert all(f'kernel_path="{kernel_path}",model="plain"' in m for m in found)
        together = [m for m in metrics if m.startswith("ray_rotary_export_requests_together_count")]
        return len(found) == 2 and len(together) == 2

    wait_for(count_replicas)  # Ray collects them every few seconds


def test_what_others_can_reach_wants_a_token(server, python, tmp_path):
    family = find_family(server.process.pid)
    sockets = {
        os.readlink(file)
        for pid in family
        for file in Path(f"/proc/{pid}/fd").iterdir()
        if file.is_symlink()
    }
    loopback = ("0100007F", "0000000000000000FFFF00000100007F")
    listening, open_to_all = set(), set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                listening.add(int(port, 16))
                if address not in loopback:
                    open_to_all.add(int(port, 16))
    ports = {int(a.rpartition(":")[2]) for a in (server.http, server.grpc, server.metrics)}
    assert ports <= listening
    assert not ports & open_to_all
    # Each replica has a port for other replicas that Ray opens to all.
    assert len(open_to_all) == 2
    script = (
        "import sys, grpc\n"
        "for port in sys.argv[1:]:\n"
        "    channel = grpc.insecure_channel(f'127.0.0.1:{port}')\n"
        "    call = channel.unary_unary('/ray.serve.ASGIService/HandleRequest')\n"
        "    try: call(b'', timeout=10); print('answered')\n"
        "    except grpc.RpcError as error: print(error.code().name)\n"
    )
    run = subprocess.run(
        [python, "-c", script, *map(str, open_to_all)], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["UNAUTHENTICATED"] * 2


# ---- bad requests


def test_malformed_requests_get_an_error_and_the_server_goes_on(server):
    good = make_arrays("plain", batch=1)
    body = make_body(good)
    length = "Content-Length"
    cases = [
        (400, "rotate has no input 'q'", make_body(good, name="q"), {}),
        (400, "rotate needs the input 'key'", make_body({"query": good["query"]}), {}),
        (400, "must have the datatype FP32, got INT64", make_body(good, datatype="INT64"), {}),
        (400, "must have 'datatype', a str, got int", make_body(good, datatype=3), {}),
        (400, "the input 'key' must be given once", make_body(good, name="key"), {}),
        (400, "must have shape (batch_size, ", make_body(good, shape=[1, 7, 4, 24]), {}),
        (400, "shape (1000000000, 1000000000) says", make_body(good, shape=[10**9] * 2), {}),
        (400, "shape of inputs[0] must hold integers", make_body(good, shape=[1.5]), {}),
        (400, "query must hold FP32 numbers", make_body(good, data=["x"] * 672), {}),
        (400, "the body must be JSON", body[: len(body) // 2], {}),
        (400, "the body must be JSON", b"", {}),
        (400, "the body must be JSON", b"[" * 5000, {}),
        (400, "the request must be an object, got list", b"[]", {}),
        (400, "must have 'inputs', a list, got nothing", b"{}", {}),
        (413, "the body must be <= 67108864 bytes", b"{}", {length: 2**30}),
        (415, "must not be compressed", body, {"Content-Encoding": "gzip"}),
    ]  # fmt: skip
    for status, message, sent, headers in cases:
        got, answer = send(server.http, sent, headers)
        assert (got, message in answer["error"]) == (status, True), (message, got, answer)
    assert send(server.http, body, path="/v2/models/x/infer")[0] == 404
    assert send(server.http, body)[0] == 200
    # A truncated body: its client has gone before it is there.
    host, _, port = server.http.partition(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.putrequest("POST", "/v2/models/plain/infer")
    connection.putheader(length, str(len(body)))
    connection.endheaders(body[:100])
    connection.close()
    assert send(server.http, body)[0] == 200


def test_a_grpc_message_that_does_not_fit_gets_an_error(server, python, tmp_path):
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


def test_a_grpc_message_that_is_none_gets_an_error(server, python):
    script = (
        "import sys, grpc\n"
        "channel = grpc.insecure_channel(sys.argv[1])\n"
        "for method in ('ModelInfer', 'ModelMetadata', 'ModelConfig'):\n"
        "    call = channel.unary_unary('/inference.GRPCInferenceService/' + method)\n"
        "    try: call(bytes.fromhex(sys.argv[2]), timeout=10); print('answered')\n"
        "    except grpc.RpcError as error: print(error.code().name)\n"
    )
    # A field that claims 1 GB: tag 1, length 2**30, and nothing of it.
    claim = (b"\x0a" + b"\x80\x80\x80\x80\x04").hex()
    run = subprocess.run(
        [python, "-c", script, server.grpc, claim], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["INVALID_ARGUMENT", "INVALID_ARGUMENT", "UNIMPLEMENTED"]
    assert server.is_ready()


# ---- dying, stopping, starting


def test_a_replica_that_dies_is_replaced(server, python, tmp_path):
    find = lambda: {  # noqa: E731
        pid for pid, args in find_family(server.process.pid).items() if args.startswith(REPLICA)
    }
    before = find()
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    wait_for(lambda: len(find()) == 2 and find() != before)
    requests = [make_arrays("plain", batch=1, seed=seed) for seed in range(16)]
    replies = ask(python, tmp_path, "grpc", server.grpc, "plain", requests)
    for request, reply in zip(requests, replies, strict=True):
        compare(reply, compute_eager("plain", request), 0)


def test_killed_it_leaves_nothing_and_restarted_it_serves_a_model(server, python, tmp_path):
    family = find_family(server.process.pid)
    assert len(family) > 6
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    wait_for(lambda: not find_alive(family))
    assert not server.is_ready()

    addresses = {name: getattr(server, name) for name in ("http", "grpc", "metrics")}
    ports = [p for name, a in addresses.items() for p in (f"--{name}-port", a.rpartition(":")[2])]
    allowed = TOLERANCES["model"].max_ulp * float(np.finfo(np.float32).eps)
    requests = [make_model_arrays(*shape) for shape in SHAPES]
    worst, exact = 0.0, True
    arguments = ("--engine", "ray", "--replicas", 2, "--max-batch-delay-ms", 1500, *ports)
    with Server(python, tmp_path, get_model_bundle().path, *arguments) as again:
        assert {name: getattr(again, name) for name in addresses} == addresses
        for protocol in PROTOCOLS:
            replies = ask(python, tmp_path, protocol, getattr(again, protocol), "llama", requests)
            for request, reply in zip(requests, replies, strict=True):
                error, same = compare(reply, run_model_eager(request), allowed)
                worst, exact = max(worst, error), exact and same
        family = find_family(again.process.pid)
        check_that_a_stop_answers_what_is_in(again, requests[0], allowed)
        assert find_alive(family) == {}
    record(
        Row(
            "Ray Serve", read_version(python, "ray"), "model", "ran", "fused", ("float32",),
            [f"{b}x{s}" for b, s in SHAPES], worst, exact,
            "rotary-export serve --engine ray --replicas 2; HTTP and gRPC",
        )
    )  # fmt: skip


def check_that_a_stop_answers_what_is_in(server, request, allowed):
    answers = []
    body = make_body(request)
    call = lambda: answers.append(send(server.http, body, path="/v2/models/llama/infer"))  # noqa: E731
    asking = threading.Thread(target=call)
    asking.start()
    time.sleep(0.5)  # of the 1.5 s that it waits for company
    assert server.stop() == 0
    asking.join()
    ((status, answer),) = answers
    assert status == 200, answer
    (output,) = answer["outputs"]
    logits = np.array(output["data"], np.float32).reshape(output["shape"])
    compare({"logits": logits}, run_model_eager(request), allowed)
