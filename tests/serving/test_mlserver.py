"""`rotary-export serve`: the embedded server, asked by tritonclient over HTTP and gRPC."""

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.bundles import copy_bundle, get_bundle, make_arrays, run_eager
from helpers.http_calls import make_body, send
from helpers.paths import TOOLS
from helpers.serving_runs import Server, ask, make_environment
from helpers.target_runs import (
    Row,
    compare,
    get_model_bundle,
    make_model_arrays,
    record,
    require,
    run_model_eager,
)

from rotary_export import load
from rotary_export.deploy.deploy import deploy
from rotary_export.proof.tolerances import TOLERANCES
from rotary_export.serving.ports import find_ports

PROTOCOLS = ("http", "grpc")
SHAPES = ((1, 1), (3, 7), (2, 32))
# As FP32 on the wire. Eager rounds three times where the kernel rounds once.
ALLOWED = {"float32": 0.0, "float16": 2**-10, "bfloat16": 2**-7, "float64": 2**-50}


@pytest.fixture(scope="module")
def python():
    return require("mlserver") / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def version(python):
    (found,) = python.parent.parent.glob("lib/python*/site-packages/mlserver-*.dist-info")
    return found.name.removeprefix("mlserver-").removesuffix(".dist-info")


@pytest.fixture(scope="module")
def server(python, tmp_path_factory):
    """A server of `plain`; requests wait for each other, so that what is sent at once runs so."""
    folder = tmp_path_factory.mktemp("mlserver")
    with Server(python, folder, get_bundle("plain").path, "--max-batch-delay-ms", 200) as running:
        yield running


def to_wire(value):
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def compute_eager(name, inputs):
    return {
        k: np.asarray(v.float() if name == "bfloat16" else v)
        for k, v in run_eager(name, inputs).items()
    }


# ---- right answers


@pytest.mark.parametrize("name", ["plain", "xpos", "float16", "bfloat16", "float64"])
def test_rotate(name, python, version, tmp_path):
    requests = [make_arrays(name, batch=b, seq_len=s, seed=s) for b, s in SHAPES]
    wire = [{key: to_wire(value) for key, value in request.items()} for request in requests]
    worst, exact = 0.0, True
    with Server(python, tmp_path, get_bundle(name).path) as server:
        assert server.model == name
        for protocol in PROTOCOLS:
            replies = ask(python, tmp_path, protocol, getattr(server, protocol), name, wire)
            for request, reply in zip(requests, replies, strict=True):
                dtype = request["query"].dtype.name
                error, same = compare(reply, compute_eager(name, request), ALLOWED[dtype])
                worst, exact = max(worst, error), exact and same
    if name != "xpos":
        record(
            Row(
                "MLServer", version, "rotate", "ran", "fused", (dtype,),
                [f"{b}x{s}" for b, s in SHAPES], worst, exact,
                "rotary-export serve; HTTP (JSON) and gRPC"
                + (", FP32 on the wire" if name == "bfloat16" else ""),
            )
        )  # fmt: skip


def test_model(python, version, tmp_path):
    allowed = TOLERANCES["model"].max_ulp * float(np.finfo(np.float32).eps)
    requests = [make_model_arrays(*shape) for shape in SHAPES]
    worst, exact = 0.0, True
    with Server(python, tmp_path, get_model_bundle().path) as server:
        for protocol in PROTOCOLS:
            replies = ask(python, tmp_path, protocol, getattr(server, protocol), "llama", requests)
            for request, reply in zip(requests, replies, strict=True):
                error, same = compare(reply, run_model_eager(request), allowed)
                worst, exact = max(worst, error), exact and same
    record(
        Row(
            "MLServer", version, "model", "ran", "fused", ("float32",),
            [f"{b}x{s}" for b, s in SHAPES], worst, exact,
            "rotary-export serve; HTTP (JSON) and gRPC",
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["rotate", "model"])
def test_kit(kind, python, tmp_path):
    bundle = get_bundle("plain") if kind == "rotate" else get_model_bundle()
    kit = deploy("mlserver", bundle.path, tmp_path / "kit")
    ports = find_ports("127.0.0.1", 0, 0, 0)
    names = ("MLSERVER_HTTP_PORT", "MLSERVER_GRPC_PORT", "MLSERVER_METRICS_PORT")
    environment = make_environment(tmp_path) | dict(zip(names, map(str, ports), strict=True))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [python.with_name("mlserver"), "start", "."],
            cwd=kit, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while b"gRPC server running" not in (text := (tmp_path / "log").read_bytes()):
            assert process.poll() is None, text.decode()
            assert time.monotonic() < deadline, text.decode()
            time.sleep(0.2)
        addresses = [f"--http=127.0.0.1:{ports[0]}", f"--grpc=127.0.0.1:{ports[1]}"]
        client = subprocess.run(
            [python, "client.py", *addresses], cwd=kit, capture_output=True, text=True, check=False
        )
        assert client.returncode == 0, client.stdout + client.stderr
        assert client.stdout.count("largest error") == 2 * len(bundle.manifest.graphs[kind].outputs)
        assert client.stdout.count("equal to the bit") == (4 if kind == "rotate" else 0)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_numbers_that_json_has_not(server, python, tmp_path):
    large, empty = make_arrays("plain", batch=1), make_arrays("plain", batch=1)
    large["query"] = np.full_like(large["query"], 3e38)
    empty["query"][0, 0, 0, 0] = np.nan
    want = [compute_eager("plain", inputs) for inputs in (large, empty)]
    assert np.isinf(want[0]["query_out"]).any()
    got = ask(python, tmp_path, "grpc", server.grpc, "plain", [large])
    np.testing.assert_array_equal(got[0]["query_out"], want[0]["query_out"])
    status, answer = send(server.http, make_body(large))
    assert (status, answer["error"]) == (
        400,
        "query_out must be finite for JSON, got inf; use gRPC",
    )
    body = json.loads(make_body(empty))
    body["inputs"][0]["data"][0] = None
    body["outputs"] = [{"name": "query_out"}]
    status, answer = send(server.http, json.dumps(body).encode())
    (output,) = answer["outputs"]
    reply = np.array(output["data"], np.float32).reshape(output["shape"])
    np.testing.assert_array_equal(reply, want[1]["query_out"])
    assert np.isnan(reply).any()


# ---- together


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_bad_id_fails_alone(protocol, server, python, tmp_path):
    requests = [make_arrays("plain", batch=1, seed=seed) for seed in range(16)]
    requests[5]["position_ids"][0, 3] = -1
    before = server.read_metrics()
    replies = ask(python, tmp_path, protocol, getattr(server, protocol), "plain", requests)
    assert "position_ids must be in [0, 32), got -1 at batch 0, row 3" in replies.pop(5)
    del requests[5]
    for request, reply in zip(requests, replies, strict=True):
        compare(reply, compute_eager("plain", request), 0)
    after = server.read_metrics()
    count, total = (
        after[name] - before[name]
        for name in (
            f'rotary_export_requests_together_{what}{{model="plain"}}' for what in ("count", "sum")
        )
    )
    assert total == 16
    assert count <= 8  # they did run together


def test_under_load_every_answer_is_right(python, tmp_path):
    requests, tool = tmp_path / "requests", TOOLS / "targets" / "load_server.py"
    bundle = get_bundle("plain").path
    subprocess.run([sys.executable, tool, "prepare", bundle, requests], check=True)
    with Server(python, tmp_path, bundle) as server:
        run = subprocess.run(
            [python, tool, "run", requests, "--model", "plain", "--http", server.http,
             "--grpc", server.grpc, "--clients", "16", "--seconds", "4", "--json"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    assert (found["errors"], found["wrong"]) == (0, 0)
    assert found["requests"] > 16


# ---- what is told to clients and to whoever watches


def test_health_metadata_and_metrics(server):
    assert server.is_ready()
    for path, key, want in (
        ("/v2", "name", "rotary_export"),
        ("/v2/models/plain", "platform", "onnxruntime_onnx"),
        ("/v2/models/plain/versions/1", "versions", ["1"]),
    ):
        connection = http.client.HTTPConnection(server.http, timeout=5)
        connection.request("GET", path)
        assert json.loads(connection.getresponse().read())[key] == want
        connection.close()
    kernel_path = load(get_bundle("plain").path).kernel_path
    assert kernel_path.startswith("fused")
    assert kernel_path in server.line
    metric = f'rotary_export_kernel_path{{kernel_path="{kernel_path}",model="plain"}}'
    assert server.read_metrics()[metric] == 1


def test_listens_on_loopback_alone(server):
    ports = {int(a.rpartition(":")[2]) for a in (server.http, server.grpc, server.metrics)}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, port = local.split(":")
            if state == "0A" and int(port, 16) in ports:
                found.add((address, int(port, 16)))
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}  # the same, as IPv6 writes it
    assert {port for _, port in found} == ports
    assert {address for address, _ in found} <= loopback


# ---- bad requests


def test_malformed_requests_get_an_error_and_the_server_goes_on(server):
    good = make_arrays("plain", batch=1)
    body = make_body(good)
    length = "Content-Length"
    wrong = "query must have the datatype FP32, got INT64"
    cases = [
        (400, "rotate has no input 'q'", make_body(good, name="q"), {}),
        (400, "rotate needs the input 'key'", make_body({"query": good["query"]}), {}),
        (400, wrong, make_body(good, datatype="INT64"), {}),
        (400, "datatype: Input should be", make_body(good, datatype="BF16"), {}),
        (400, "query must have shape", make_body(good, shape=[1, 28, 24]), {}),
        (400, "shape (1000000000, 1000000000) says", make_body(good, shape=[10**9] * 2), {}),
        (400, "query must hold FP32 numbers", make_body(good, data=["x"] * 672), {}),
        (400, "JSON decode error", body[: len(body) // 2], {}),
        (400, "malformed", b"", {}),
        (400, "malformed", b"[" * 5000, {}),
        (413, "the body must be <= 67108864 bytes, got 1073741824", b"{}", {length: 2**30}),
        (415, "binary_data=False", body, {"Inference-Header-Content-Length": str(2**30)}),
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
    assert server.errors.read_text() == ""


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


# ---- starting, stopping


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sigterm_answers_what_is_in(protocol, python, tmp_path):
    good, replies = make_arrays("plain", batch=1), []
    with Server(python, tmp_path, get_bundle("plain").path, "--max-batch-delay-ms", 3000) as server:

        def call():
            replies.extend(
                ask(python, tmp_path, protocol, getattr(server, protocol), "plain", [good])
            )

        asking = threading.Thread(target=call)
        asking.start()
        deadline = time.monotonic() + 60
        while not any("model_infer_request_duration" in name for name in server.read_metrics()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert server.stop() == 0
        asking.join()
        assert not server.is_ready()
    compare(replies[0], compute_eager("plain", good), 0)


def test_killed_and_restarted_it_serves_again(python, tmp_path):
    good = make_arrays("plain")
    bundle = get_bundle("plain").path
    with Server(python, tmp_path, bundle) as first:
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        assert not first.is_ready()
    ports = [first.http, first.grpc, first.metrics]
    names = ("--http-port", "--grpc-port", "--metrics-port")
    arguments = [
        part
        for name, address in zip(names, ports, strict=True)
        for part in (name, address.rpartition(":")[2])
    ]
    with Server(python, tmp_path, bundle, *arguments) as second:
        assert second.http == first.http
        (reply,) = ask(python, tmp_path, "grpc", second.grpc, "plain", [good])
        compare(reply, compute_eager("plain", good), 0)
        assert second.stop(signal.SIGINT) == 0


def test_what_a_newcomer_gets_wrong_is_one_line(server, python, tmp_path):
    broken = copy_bundle("plain", tmp_path)
    (broken / "rotate.onnx").write_bytes(b"")
    bundle = get_bundle("plain").path
    cases = [
        (2, "is not a bundle", [tmp_path]),
        (1, "sha256 differs", [broken]),
        (2, "has no graph 'x'; it has tables, rotate", [bundle, "--graph", "x"]),
        (2, "--allow-torchscript", [bundle, "--runtime", "torchscript"]),
        (2, "pip install torch", [bundle, "--runtime", "torchscript", "--allow-torchscript"]),
        (2, "needs a free port", [bundle, "--http-port", server.http.rpartition(":")[2]]),
        (2, "needs a free port, got 192.0.2.1:", [bundle, "--host", "192.0.2.1"]),
    ]
    for code, message, arguments in cases:
        run = subprocess.run(
            [python, "-m", "rotary_export", "serve", *map(str, arguments)],
            env=make_environment(tmp_path), cwd=tmp_path, capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip
        assert (run.returncode, run.stdout) == (code, ""), run.stderr
        assert message in run.stderr
        assert run.stderr.count("\n") == 1, run.stderr
