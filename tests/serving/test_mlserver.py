"""What is particular to MLServer: types, its kit, its metrics, JSON numbers, start and stop."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.bundles import copy_bundle, get_bundle, make_arrays
from helpers.fuse_graphs import make_feeds
from helpers.http_calls import make_body, send
from helpers.paths import TOOLS
from helpers.serving_runs import (
    MLSERVER,
    PROTOCOLS,
    SHAPES,
    Server,
    ask,
    compare_replies,
    compute_eager,
    make_environment,
    run_load,
    run_serve,
)
from helpers.target_runs import (
    compare,
    get_fused_bundle,
    get_model_allowed,
    get_model_bundle,
    make_model_arrays,
    run_model_eager,
)

from rotary_export import load
from rotary_export.deploy.deploy import deploy
from rotary_export.serving.ports import find_ports

PATH = "/v2/models/static/infer"
# As FP32 on the wire. Eager rounds three times where the kernel rounds once.
ALLOWED = {"float32": 0.0, "float16": 2**-10, "bfloat16": 2**-7, "float64": 2**-50}


@pytest.fixture(scope="module")
def python():
    return MLSERVER.python


@pytest.fixture(scope="module")
def server(python, tmp_path_factory):
    """A server of `plain`."""
    folder = tmp_path_factory.mktemp("mlserver")
    with Server(python, folder, get_bundle("plain").path, *MLSERVER.options) as running:
        yield running


def to_wire(value):
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


# ---- right answers


@pytest.mark.parametrize("name", ["xpos", "float16", "bfloat16", "float64"])
def test_rotate(name, python, tmp_path):
    requests = [make_arrays(name, batch=b, seq_len=s, seed=s) for b, s in SHAPES]
    wire = [{key: to_wire(value) for key, value in request.items()} for request in requests]
    wants = [compute_eager(name, request) for request in requests]
    dtype = requests[0]["query"].dtype.name
    with Server(python, tmp_path, get_bundle(name).path) as server:
        assert server.model == name
        worst, exact = compare_replies(server, python, tmp_path, wire, wants, ALLOWED[dtype])
    if name != "xpos":
        note = ", FP32 on the wire" if name == "bfloat16" else ""
        MLSERVER.record("rotate", dtype, worst, exact, note)


def test_model(python, tmp_path):
    allowed = get_model_allowed()
    requests = [make_model_arrays(*shape) for shape in SHAPES]
    wants = [run_model_eager(request) for request in requests]
    with Server(python, tmp_path, get_model_bundle().path) as server:
        assert server.model == "llama"
        worst, exact = compare_replies(server, python, tmp_path, requests, wants, allowed)
    MLSERVER.record("model", "float32", worst, exact)


def test_a_fused_bundle(python, tmp_path):
    """Of `fuse --bundle`, by the command itself, over both protocols."""
    bundle = get_fused_bundle()
    requests = [make_feeds(*shape) for shape in SHAPES]
    session = load(bundle, require_fused=True)
    wants = [session(**request) for request in requests]
    with Server(python, tmp_path, bundle.path) as server:
        assert (server.model, session.kernel_path in server.line) == ("fused", True)
        compare_replies(server, python, tmp_path, requests, wants, 0)


KITS = {"rotate": lambda: get_bundle("plain"), "model": get_model_bundle, "fused": get_fused_bundle}


@pytest.mark.parametrize("kind", KITS)
def test_kit(kind, python, tmp_path):
    bundle = KITS[kind]()
    (graph,) = bundle.manifest.graphs.keys() - {"tables"}
    kit = deploy("mlserver", bundle.path, tmp_path / "kit")
    ports = find_ports("127.0.0.1", 0, 0, 0)
    names = ("MLSERVER_HTTP_PORT", "MLSERVER_GRPC_PORT", "MLSERVER_METRICS_PORT")
    environment = make_environment(tmp_path) | dict(zip(names, map(str, ports), strict=True))
    del environment["PYTHONPATH"]  # the kit has the package
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
        assert client.stdout.count("largest error") == 2 * len(
            bundle.manifest.graphs[graph].outputs
        )
        assert client.stdout.count("equal to the bit") == client.stdout.count("largest error")
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_numbers_that_json_lacks(server, python, tmp_path):
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
        "query_out must be finite for JSON, got inf; use binary data, or gRPC",
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
def test_requests_sent_at_once_run_together(protocol, server, python, tmp_path):
    requests = [make_arrays("plain", batch=1, seed=seed) for seed in range(16)]
    before = server.read_metrics()
    ask(python, tmp_path, protocol, getattr(server, protocol), "plain", requests)
    after = server.read_metrics()
    count, total = (
        after[name] - before[name]
        for name in (
            f'rotary_export_requests_together_{what}{{model="plain"}}' for what in ("count", "sum")
        )
    )
    assert total == 16
    assert count <= 8


def test_under_load_every_answer_is_right(python, tmp_path):
    bundle = get_bundle("plain").path
    with Server(python, tmp_path, bundle) as server:
        found = run_load(server, python, tmp_path, bundle)
    assert (found["clients"], found["errors"], found["wrong"]) == (16, 0, 0)
    assert found["requests"] > 16


# ---- limits


def test_half_sent_requests_are_closed_and_do_not_keep_others_out(python, tmp_path):
    with Server(python, tmp_path, get_bundle("static").path) as server:
        status, answer = send(server.http, b"", {"Content-Length": 2**22}, path=PATH)
        assert (status, "the body must be <= " in answer["error"]) == (413, True)
        attack = [sys.executable, TOOLS / "targets" / "attack_server.py", "--model=static"]
        address = [f"--http={server.http}", f"--pid={server.process.pid}"]
        options = ["--mib=2", "--half-sent-seconds=20", "--json"]
        run = subprocess.run(
            [*attack, *address, *options], capture_output=True, text=True, check=False
        )
        found = json.loads(run.stdout)
        assert found[-1]["answers"] == "1 x 300 of 300 closed"
        assert [each["health_errors"] for each in found] == [[]] * len(found)
        assert max(each["growth_mib"] for each in found) < 100
        assert server.errors.read_text() == ""


# ---- metrics and sockets


def test_the_kernel_path_is_a_metric(server):
    kernel_path = load(get_bundle("plain").path).kernel_path
    metric = f'rotary_export_kernel_path{{kernel_path="{kernel_path}",model="plain"}}'
    assert server.read_metrics()[metric] == 1


def test_listens_on_loopback_only(server):
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


# ---- starting, stopping


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_in_flight_requests_are_completed_on_sigterm(protocol, python, tmp_path):
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
    with Server(python, tmp_path, bundle, *first.port_options) as second:
        assert second.http == first.http
        (reply,) = ask(python, tmp_path, "grpc", second.grpc, "plain", [good])
        compare(reply, compute_eager("plain", good), 0)
        assert second.stop(signal.SIGINT) == 0
        assert second.errors.read_text() == ""


def test_a_mistake_at_the_start_is_one_line(server, python, tmp_path):
    broken = copy_bundle("plain", tmp_path)
    (broken / "rotate.onnx").write_bytes(b"")
    bundle = get_bundle("plain").path
    cases = [
        (2, "is not a bundle", [tmp_path]),
        (1, "sha256 differs", [broken]),
        (2, "has no graph 'x'; it has tables, rotate", [bundle, "--graph", "x"]),
        (2, "--allow-code", [bundle, "--runtime", "torchscript"]),
        (2, "need torch: pip install torch", [bundle, "--runtime", "torchscript", "--allow-code"]),
        (2, "needs a free port", [bundle, "--http-port", server.http.rpartition(":")[2]]),
        (2, "needs a free port, got 192.0.2.1:", [bundle, "--host", "192.0.2.1"]),
    ]
    for code, message, arguments in cases:
        run = run_serve(python, tmp_path, *arguments)
        assert (run.returncode, run.stdout) == (code, ""), run.stderr
        assert message in run.stderr
        assert run.stderr.count("\n") == 1, run.stderr
