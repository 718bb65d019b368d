"""Triton: what deploy writes; the real server with its Python backend; the load tool.

The other two backends are in NVIDIA's container only: their configurations are parsed.
"""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.bundles import get_bundle, make_arrays, run_eager
from helpers.fuse_graphs import make_feeds
from helpers.paths import TOOLS
from helpers.serving_runs import ask
from helpers.target_runs import (
    TargetRun,
    compare,
    get_fused_bundle,
    get_model_allowed,
    get_model_bundle,
    make_model_arrays,
    record,
    require,
    run_model_eager,
)
from helpers.triton_server import Server

from rotary_export import load
from rotary_export.compat.quiet import quiet_torch
from rotary_export.deploy.deploy import deploy

TARGET = "Triton, {} backend"
PROTOCOLS = ("http", "http-binary", "grpc")
SHAPES = ((1, 1), (3, 7), (2, 32))
# As FP32 on the wire. Eager rounds three times where the kernel rounds once.
ALLOWED = {"float32": 0.0, "float16": 2**-10, "bfloat16": 2**-7}


@pytest.fixture(scope="module")
def folder():
    return require("triton")


@pytest.fixture(scope="module")
def python(folder):
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def packages(folder, tmp_path_factory):
    """Return where the backend's Python looks first; its rotary_export must not be taken."""
    packages = tmp_path_factory.mktemp("packages")
    for package in (folder / "python").iterdir():
        (packages / package.name).symlink_to(package)
    (packages / "rotary_export.py").write_text("raise ImportError('an installed one')\n")
    return packages


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Return what deploy wrote for some bundles, by name."""
    out = tmp_path_factory.mktemp("triton")
    bundles = {name: get_bundle(name).path for name in ("plain", "float16", "bfloat16", "static")}
    bundles |= {"model": get_model_bundle().path, "fused": get_fused_bundle().path}
    return {
        name: deploy("triton", bundle, out / name) / "model_repository"
        for name, bundle in bundles.items()
    }


@pytest.fixture(scope="module")
def serve(folder, packages, repositories):
    """Return a function that serves a bundle's graph with the Python backend."""
    return lambda name, graph="rotate", *options: Server(
        folder, packages, repositories[name], f"{graph}_python", *options
    )


@pytest.fixture(scope="module")
def server(serve):
    with serve("plain") as running:
        yield running


@pytest.fixture(scope="module")
def version(server):
    return re.search(r"server_version\s*\|\s*(\S+)", server.log.read_text())[1]


def ask_all(python, tmp_path, server, requests):
    half = any(value.dtype == np.float16 for value in requests[0].values())
    for protocol in PROTOCOLS[half:]:  # Triton's JSON has no FP16
        address = getattr(server, protocol.removesuffix("-binary"))
        yield from zip(
            requests,
            ask(python, tmp_path, protocol, address, server.model, requests),
            strict=True,
        )


# ---- the repository


@pytest.mark.parametrize("name", ["plain", "float16", "bfloat16", "static", "model"])
def test_configurations_are_what_triton_reads(name, repositories, python, tmp_path):
    repository = repositories[name]
    script = (
        "import sys, json\n"
        "from google.protobuf import json_format, text_format\n"
        "from tritonclient.grpc.model_config_pb2 import ModelConfig\n"
        "found = {p: text_format.Parse(open(p).read(), ModelConfig()) for p in sys.argv[1:]}\n"
        "print(json.dumps({p: json_format.MessageToDict(m, preserving_proto_field_name=True)"
        " for p, m in found.items()}))\n"
    )
    files = sorted(repository.rglob("*.pbtxt"))
    run = subprocess.run(
        [python, "-I", "-c", script, *files], capture_output=True, text=True, check=True
    )
    found = {str(p.relative_to(repository)): json.loads(run.stdout)[str(p)] for p in files}
    graph = "model" if name == "model" else "rotate"
    if name == "static":
        assert set(found) == {"rotate_python/config.pbtxt"}  # Triton has no scalars
        (config,) = found.values()
        assert config["input"][-1]["dims"] == ["1"]
        assert not config.keys() & {"dynamic_batching", "max_batch_size"}
        return
    assert set(found) == {
        f"{graph}_{backend}/{file}"
        for backend in ("onnxruntime", "pytorch", "python")
        for file in ("config.pbtxt", "configs/gpu.pbtxt")[: 1 if backend == "python" else 2]
    }
    onnx = found[f"{graph}_onnxruntime/config.pbtxt"]
    assert onnx["backend"] == "onnxruntime"
    (library,) = onnx["model_operations"]["op_library_filename"]
    assert library == f"/models/{graph}_onnxruntime/1/librotary_export.so"
    assert (repository / library.removeprefix("/models/")).is_file()
    assert onnx["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    gpu = found[f"{graph}_onnxruntime/configs/gpu.pbtxt"]
    assert "model_operations" not in gpu  # it would pull the nodes off the GPU
    assert gpu["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    pytorch = found[f"{graph}_pytorch/config.pbtxt"]
    assert [t["name"] for t in pytorch["input"]] == ["INPUT__0", "INPUT__1", "INPUT__2"]
    for path, config in found.items():
        assert (repository / path.split("/")[0] / "1" / config["default_model_filename"]).is_file()
        assert config["max_batch_size"] == 64
        assert "dynamic_batching" in config
    for backend, dtype in (("onnxruntime", name), ("pytorch", name), ("python", "python")):
        types = {"float16": "TYPE_FP16", "bfloat16": "TYPE_BF16"}
        want = types.get(dtype, "TYPE_FP32")
        if name in types and backend == "python":
            want = {"float16": "TYPE_FP16", "bfloat16": "TYPE_FP32"}[name]
        if graph == "rotate":
            config = found[f"rotate_{backend}/config.pbtxt"]
            assert {t["data_type"] for t in config["output"]} == {want}
    if name in ("plain", "model"):
        for backend in ("onnxruntime", "pytorch"):
            path = {"onnxruntime": "fused", "pytorch": "TorchScript"}[backend]
            target, note = TARGET.format(backend), "the configuration; the backend is NVIDIA's"
            record(TargetRun(target, "", graph, "parsed", path, ("float32",), note=note))


@pytest.mark.parametrize("options", [(), ("--model-config-name=gpu",)])
def test_the_server_reads_the_configurations_of_backends_that_it_lacks(options, serve):
    with serve("plain", "rotate", *options) as server:
        for backend in ("onnxruntime", "pytorch"):
            path = f"/v2/repository/models/rotate_{backend}/load".encode()
            answer = server.send(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n").decode()
            # Were a configuration wrong, it would fail "to poll from model repository".
            assert f"unable to find backend library for backend '{backend}'" in answer


def test_the_torchscript_model_accepts_its_inputs_in_order(repositories):
    import torch

    for name, make, eager in (
        ("plain", lambda: make_arrays("plain"), lambda x: run_eager("plain", x)),
        ("model", lambda: make_model_arrays(2, 5), run_model_eager),
    ):
        (file,) = repositories[name].glob("*_pytorch/1/*.pt")
        inputs = make()
        with torch.no_grad(), quiet_torch():
            got = torch.jit.load(file)(*map(torch.from_numpy, inputs.values()))
        got = [got] if isinstance(got, torch.Tensor) else list(got)
        want = eager(inputs)
        compare(dict(zip(want, got, strict=True)), want, 0 if name == "plain" else 1e-5)


# ---- right answers


def record_run(version, graph, dtype, worst, exact, note):
    target, shapes = TARGET.format("Python"), [f"{b}x{s}" for b, s in SHAPES]
    record(TargetRun(target, version, graph, "ran", "fused", (dtype,), shapes, worst, exact, note))


@pytest.mark.parametrize("name", ["plain", "float16", "bfloat16"])
def test_rotate(name, serve, python, version, tmp_path):
    requests = [make_arrays(name, batch=b, seq_len=s, seed=s) for b, s in SHAPES]
    half = name == "bfloat16"
    to_wire = lambda x: x.astype(np.float32) if x.dtype.name == "bfloat16" else x  # noqa: E731
    wire = [{key: to_wire(value) for key, value in request.items()} for request in requests]
    dtype = requests[0]["query"].dtype.name
    worst, exact = 0.0, True
    with serve(name) as server:
        for asked, reply in ask_all(python, tmp_path, server, wire):
            request = next(r for r, w in zip(requests, wire, strict=True) if w is asked)
            want = {
                k: np.asarray(v.float() if half else v) for k, v in run_eager(name, request).items()
            }
            error, same = compare(reply, want, ALLOWED[dtype])
            worst, exact = max(worst, error), exact and same
        kernel = re.search(r'rotate_python: (fused[^"]*)"', server.log.read_text())
        assert kernel
    http = "binary" if dtype == "float16" else "JSON and binary"
    note = f"HTTP ({http}) and gRPC" + (", FP32 on the wire" * half)
    record_run(version, "rotate", dtype, worst, exact, note)


def test_static_shapes_and_a_scalar(serve, python, tmp_path):
    request = make_arrays("static")
    wire = request | {"seq_len": request["seq_len"].reshape(1)}
    with serve("static") as server:
        for _, reply in ask_all(python, tmp_path, server, [wire]):
            compare(reply, run_eager("static", request), 0)


def test_model(serve, python, version, tmp_path):
    allowed = get_model_allowed()
    requests = [make_model_arrays(*shape) for shape in SHAPES]
    worst, exact = 0.0, True
    with serve("model", "model") as server:
        for request, reply in ask_all(python, tmp_path, server, requests):
            error, same = compare(reply, run_model_eager(request), allowed)
            worst, exact = max(worst, error), exact and same
    record_run(version, "model", "float32", worst, exact, "HTTP (JSON and binary) and gRPC")


def test_a_fused_bundle(repositories, serve, python, tmp_path):
    models = {folder.name for folder in repositories["fused"].iterdir()}
    assert models == {"model_onnxruntime", "model_python"}  # it has no TorchScript
    requests = [make_feeds(*shape) for shape in SHAPES]
    session = load(get_fused_bundle(), require_fused=True)
    with serve("fused", "model") as server:
        for request, reply in ask_all(python, tmp_path, server, requests):
            compare(reply, session(**request), 0)


# ---- together


@pytest.fixture(scope="module")
def patient_server(folder, packages, repositories, tmp_path_factory):
    """Return a server whose batcher waits so long that what is sent at once runs together."""
    repository = tmp_path_factory.mktemp("patient") / "model_repository"
    shutil.copytree(repositories["plain"], repository)
    config = repository / "rotate_python" / "config.pbtxt"
    text = config.read_text()
    assert "microseconds: 500 " in text
    config.write_text(text.replace("microseconds: 500 ", "microseconds: 300000 "))
    with Server(folder, packages, repository, "rotate_python") as running:
        yield running


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_bad_id_fails_alone(protocol, patient_server, python, tmp_path):
    server = patient_server
    requests = [make_arrays("plain", batch=1, seq_len=5 + i % 3, seed=i) for i in range(16)]
    requests[5]["position_ids"][0, 3] = -1
    requests_before, runs_before = server.read_statistics()
    address = getattr(server, protocol.removesuffix("-binary"))
    replies = ask(python, tmp_path, protocol, address, server.model, requests)
    assert "position_ids must be in [0, 32), got -1 at batch 0, row 3" in replies.pop(5)
    del requests[5]
    for request, reply in zip(requests, replies, strict=True):
        compare(reply, run_eager("plain", request), 0)
    answered, runs = server.read_statistics()
    assert answered - requests_before == 16
    assert runs - runs_before == 1


# ---- bad requests, the end and a new start


def test_malformed_requests_get_an_error_and_the_server_goes_on(server, python, tmp_path):
    good = make_arrays("plain", batch=1)
    cases = {
        "expected 3 inputs but got 4": good | {"x": good["key"]},
        "expected 3 inputs but got 1": {"query": good["query"]},
        "'query' data-type is 'FP64', but": good | {"query": good["query"].astype(np.float64)},
        "unexpected shape": good | {"query": np.zeros((1, 2), np.float32)},
        "key must have shape": good | {"key": good["key"][:, :, :3]},
    }
    for protocol in PROTOCOLS:
        address = getattr(server, protocol.removesuffix("-binary"))
        replies = ask(python, tmp_path, protocol, address, server.model, list(cases.values()))
        for message, reply in zip(cases, replies, strict=True):
            assert message in reply
    post = f"POST /v2/models/{server.model}/infer HTTP/1.1\r\nHost: x\r\n".encode()
    header = b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n"
    tensor = {"name": "query", "shape": good["query"].shape, "datatype": "FP32"}
    claim = {"inputs": [tensor | {"parameters": {"binary_data_size": 2**30}}]}
    claim = json.dumps(claim).encode()
    for sent in (
        post + b"Content-Length: 20\r\n\r\n" + b'{"inputs": [{"name":',
        post + header % (2**30, 2) + b"{}",
        post + header % (len(claim), len(claim) + 4) + claim + b"abcd",
        post + b"Content-Length: 2\r\n\r\n{}",
    ):
        answer = server.send(sent)
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 500"))  # 500: JSON that is none
        assert b'{"error":' in answer
    server.send(post + b"Content-Length: %d\r\n\r\n{" % 2**30, 0.1)  # and its client has gone
    ((_, reply), *_) = ask_all(python, tmp_path, server, [good])
    compare(reply, run_eager("plain", good), 0)


def test_killed_and_restarted_it_serves_again(serve, python, tmp_path):
    good = make_arrays("plain")
    with serve("plain") as server:
        server.kill()
        assert not server.send(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        server.start()
        for _, reply in ask_all(python, tmp_path, server, [good]):
            compare(reply, run_eager("plain", good), 0)


# ---- the load tool


def test_load(server, python, tmp_path):
    tool = TOOLS / "targets" / "load_server.py"
    bundle = str(get_bundle("plain").path)
    subprocess.run([sys.executable, tool, "prepare", bundle, tmp_path], check=True)
    command = [
        python, "-I", tool, "run", tmp_path, "--model", server.model, "--http", server.http,
        "--grpc", server.grpc, "--binary", "--seconds", "3", "--json",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    assert (found["errors"], found["wrong"], found["clients"]) == (0, 0, 16)
    assert found["requests"] > 16

    request = tmp_path / "00.npz"
    with np.load(request) as arrays:
        changed = dict(arrays)
    changed["out.query_out"] = changed["out.query_out"] + np.float32(1e-6)
    np.savez(request, **changed)
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    found = json.loads(run.stdout)
    assert found["wrong"] > 0
    assert found["problems"] == ["wrong: query_out has other bits"]
