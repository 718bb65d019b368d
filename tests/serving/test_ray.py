"""What is particular to Ray Serve: binary tensors, replicas, tokens, start and stop."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from helpers.bundles import get_bundle, make_arrays
from helpers.http_calls import make_binary_body, make_body, send
from helpers.processes import find_alive, find_family, wait_for
from helpers.serving_runs import RAY, SHAPES, Server, ask, compare_replies, compute_eager, run_load
from helpers.target_runs import (
    compare,
    get_model_allowed,
    get_model_bundle,
    make_model_arrays,
    run_model_eager,
)

from rotary_export import load

REPLICA = "ray::ServeReplica"
LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def python():
    return RAY.python


@pytest.fixture(scope="module")
def server(python, tmp_path_factory):
    """A server of `plain`."""
    folder = tmp_path_factory.mktemp("ray")
    with Server(python, folder, get_bundle("plain").path, *RAY.options) as running:
        yield running


# ---- right answers


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
        ("has 1 bytes after its inputs", header + tensors + b"x", len(header)),
    ]
    for message, body, length in wrong:
        status, answer = send(server.http, body, {LENGTH: length})
        assert (status, message in answer["error"]) == (400, True), answer


def test_under_load_every_answer_is_right(server, python, tmp_path):
    found = run_load(server, python, tmp_path, get_bundle("plain").path, "--binary")
    assert (found["clients"], found["errors"], found["wrong"]) == (16, 0, 0)
    assert found["requests"] > 50


# ---- metadata, metrics and sockets


def test_unknown_models_and_paths(server):
    with urlopen(f"http://{server.http}/v2/models/plain/ready", timeout=20) as answer:
        assert answer.status == 200
    for path in ("/v2/models/other", "/v2/models/plain/versions/2", "/v2/models/x/ready", "/x"):
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"http://{server.http}{path}", timeout=20)


def test_every_replica_has_metrics(server):
    kernel_path = load(get_bundle("plain").path).kernel_path
    assert f"({kernel_path}, 2 replicas)" in server.line
    server_is_used = make_body(make_arrays("plain", batch=1))

    def count_replicas():
        send(server.http, server_is_used)  # a replica reports a batch only after its first
        metrics = server.read_metrics()
        found = [m for m in metrics if m.startswith("ray_rotary_export_kernel_path{")]
        assert all(f'kernel_path="{kernel_path}",model="plain"' in m for m in found)
        together = [m for m in metrics if m.startswith("ray_rotary_export_requests_together_count")]
        return len(found) == 2 and len(together) == 2

    wait_for(count_replicas)  # Ray collects them every few seconds


def test_ports_that_others_can_reach_require_a_token(server, python, tmp_path):
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


def test_a_malformed_grpc_message_gets_an_error(server, python):
    script = (
        "import sys, grpc\n"
        "channel = grpc.insecure_channel(sys.argv[1])\n"
        "for method in ('ModelInfer', 'ModelMetadata', 'ModelConfig'):\n"
        "    call = channel.unary_unary('/inference.GRPCInferenceService/' + method)\n"
        "    try: call(bytes.fromhex(sys.argv[2]), timeout=10); print('answered')\n"
        "    except grpc.RpcError as error: print(error.code().name)\n"
    )
    # A field that claims 1 GB: tag 1, length 2**30, and no data.
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

    allowed = get_model_allowed()
    requests = [make_model_arrays(*shape) for shape in SHAPES]
    wants = [run_model_eager(request) for request in requests]
    arguments = ("--engine", "ray", "--replicas", 2, "--max-batch-delay-ms", 1500)
    bundle = get_model_bundle().path
    with Server(python, tmp_path, bundle, *arguments, *server.port_options) as again:
        assert again.port_options == server.port_options
        worst, exact = compare_replies(again, python, tmp_path, requests, wants, allowed)
        family = find_family(again.process.pid)
        check_that_sigterm_completes_a_request(again, requests[0], allowed)
        assert find_alive(family) == {}
    RAY.record("model", "float32", worst, exact)


def check_that_sigterm_completes_a_request(server, request, allowed):
    answers = []
    body = make_body(request)
    call = lambda: answers.append(send(server.http, body, path="/v2/models/llama/infer"))  # noqa: E731
    asking = threading.Thread(target=call)
    asking.start()
    time.sleep(0.5)  # of the 1.5 s that it waits to be batched
    assert server.stop() == 0
    asking.join()
    ((status, answer),) = answers
    assert status == 200, answer
    (output,) = answer["outputs"]
    logits = np.array(output["data"], np.float32).reshape(output["shape"])
    compare({"logits": logits}, run_model_eager(request), allowed)
