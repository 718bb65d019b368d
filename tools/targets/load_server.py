"""Load a server of the Open Inference Protocol: many clients, mixed lengths, every reply checked.

  python tools/targets/load_server.py prepare BUNDLE FOLDER
  python tools/targets/load_server.py run FOLDER --model NAME --http HOST:PORT --grpc HOST:PORT

`prepare` writes requests and eager PyTorch's outputs (it requires torch); `run` requires numpy and
tritonclient alone. Half of the clients use HTTP and half gRPC where both are given.

Exit codes: 0 fine, 1 an error or a wrong answer, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = ((1, 1), (1, 7), (2, 1), (1, 33), (3, 12), (1, 100), (4, 1), (2, 64))  # batch, length
DATATYPES = {"float16": "FP16", "float32": "FP32", "float64": "FP64", "int64": "INT64"}
DTYPES = {wire: np.dtype(name) for name, wire in DATATYPES.items()}
HEADER_LENGTH = "Inference-Header-Content-Length"
MODEL_ALLOWED = 1e-5  # of a whole model, relative to the largest magnitude of an output

Arrays = dict[str, np.ndarray]
Pairs = list[tuple[Arrays, Arrays]]  # inputs, outputs


def prepare(arguments: argparse.Namespace) -> None:
    """Write requests, and eager's answers: those of the bundle's TorchScript, proven equal."""
    import rotary_export
    from rotary_export.bundle.manifest import find_main_graph, read_manifest
    from rotary_export.proof.sample_inputs import fit_shapes, make_inputs

    manifest = read_manifest(arguments.bundle)
    graph = find_main_graph(arguments.bundle, manifest)
    session = rotary_export.load(arguments.bundle, graph, runtime="torchscript", allow_code=True)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for index, (batch, length) in enumerate(fit_shapes(manifest, graph, SHAPES)):
        inputs = make_inputs(manifest, graph, batch, length)
        outputs = session(**inputs)
        arrays = {f"in.{name}": np.asarray(value) for name, value in inputs.items()}
        arrays |= {f"out.{name}": np.asarray(value) for name, value in outputs.items()}
        np.savez(arguments.folder / f"{index:02}.npz", **arrays)
    allowed = 0.0 if graph == "rotate" else MODEL_ALLOWED
    (arguments.folder / "load.json").write_text(json.dumps({"allowed": allowed}))
    print(f"{arguments.folder}: {index + 1} requests")


def read_requests(folder: Path) -> tuple[Pairs, float]:
    """Return (inputs, outputs) of every request, and the allowed relative error."""
    pairs = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            pairs.append(
                tuple(
                    {n.partition(".")[2]: arrays[n] for n in arrays.files if n.startswith(kind)}
                    for kind in ("in.", "out.")
                )
            )
    return pairs, json.loads((folder / "load.json").read_text())["allowed"]


def find_mistake(got: Arrays, want: Arrays, allowed: float) -> str:
    """Return the mistake in an answer; empty: none."""
    for name, right in want.items():
        left = got.get(name)
        if left is None or left.shape != right.shape or left.dtype != right.dtype:
            return f"{name} has another shape or type"
        if allowed == 0:
            if left.tobytes() != right.tobytes():
                return f"{name} has other bits"
        elif not np.abs(left - right).max() <= allowed * np.abs(right).max():
            return f"{name} has an error of {np.abs(left - right).max()}"
    return ""


class HttpClient:
    """A connection over HTTP.

    Args:
        address: HOST:PORT.
        model: The name of the model.
        requests: As `write` returns them; each is written once for all clients.
    """

    def __init__(self, address: str, model: str, requests: list[Any]) -> None:
        import tritonclient.http as triton

        self._parse = triton.InferenceServerClient.parse_response_body
        self._connection = HTTPConnection(address, timeout=60)
        self._path = f"/v2/models/{model}/infer"
        self._requests = requests

    @staticmethod
    def write(model: str, pairs: Pairs, binary: bool) -> list[Any]:
        """Return the body and the headers of each request."""
        import tritonclient.http as triton

        requests = []
        for inputs, outputs in pairs:
            tensors = []
            for name, value in inputs.items():
                tensor = triton.InferInput(name, value.shape, DATATYPES[value.dtype.name])
                tensor.set_data_from_numpy(value, binary_data=binary)
                tensors.append(tensor)
            wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in outputs]
            body, length = triton.InferenceServerClient.generate_request_body(
                tensors, outputs=wanted, request_id="1"
            )
            headers = {} if length is None else {HEADER_LENGTH: str(length)}
            headers["Content-Type"] = "application/octet-stream" if headers else "application/json"
            requests.append((body, headers))
        return requests

    def send(self, index: int) -> tuple[bytes, str | None]:
        """Send a request; return the answer, and the length of its JSON if tensors follow."""
        body, headers = self._requests[index]
        try:
            self._connection.request("POST", self._path, body, headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except BaseException:
            self._connection.close()
            raise
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {content[:200].decode(errors='replace')}")
        return content, answer.headers[HEADER_LENGTH]

    def read(self, answer: tuple[bytes, str | None], names: list[str]) -> Arrays:
        """Return the outputs in an answer."""
        content, length = answer
        result = self._parse(content, header_length=None if length is None else int(length))
        return {name: result.as_numpy(name) for name in names}


class GrpcClient:
    """A channel of gRPC; as `HttpClient`."""

    def __init__(self, address: str, model: str, requests: list[Any]) -> None:
        import grpc
        from tritonclient.grpc import service_pb2_grpc

        sizes = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
        channel = grpc.insecure_channel(address, [*sizes, ("grpc.use_local_subchannel_pool", 1)])
        self._infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        self._requests = requests

    @staticmethod
    def write(model: str, pairs: Pairs, binary: bool) -> list[Any]:
        """Return the message of each request; its tensors are raw."""
        from tritonclient.grpc import service_pb2

        requests = []
        for inputs, outputs in pairs:
            request = service_pb2.ModelInferRequest(model_name=model, id="1")
            for name, value in inputs.items():
                datatype = DATATYPES[value.dtype.name]
                request.inputs.add(name=name, datatype=datatype, shape=value.shape)
                request.raw_input_contents.append(value.tobytes())
            for name in outputs:
                request.outputs.add(name=name)
            requests.append(request)
        return requests

    def send(self, index: int) -> Any:
        """Send a request; return the answer."""
        return self._infer(self._requests[index], timeout=60)

    def read(self, answer: Any, names: list[str]) -> Arrays:
        """Return the outputs in an answer."""
        return {
            output.name: np.frombuffer(raw, DTYPES[output.datatype]).reshape(output.shape)
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
            if output.name in names
        }


CLIENTS: dict[str, Any] = {"http": HttpClient, "grpc": GrpcClient}


def load(
    clients: list[Any],
    pairs: Pairs,
    allowed: float,
    seconds: float,
) -> dict[str, Any]:
    """Send requests from one thread per client for some seconds; return counts and latencies.

    A latency ends with the last byte of an answer. An answer that is equal to one that was right,
    to the byte, is not read again: the clients are on the server's machine.
    """
    latencies: list[float] = []
    problems: list[str] = []
    right: dict[Any, Any] = {}  # an answer, by protocol and request
    end = time.perf_counter() + seconds

    def work(index: int) -> None:
        draw = np.random.default_rng(index)
        client = clients[index]
        while time.perf_counter() < end:
            number = int(draw.integers(len(pairs)))
            start = time.perf_counter()
            try:
                answer = client.send(number)
            except Exception as error:
                problems.append(f"error: {error}")
                time.sleep(0.1)  # a server that is gone refuses at once
                continue
            latencies.append(time.perf_counter() - start)
            key = (type(client), number)
            if answer == right.get(key):
                continue
            want = pairs[number][1]
            if mistake := find_mistake(client.read(answer, list(want)), want, allowed):
                problems.append(f"wrong: {mistake}")
            else:
                right[key] = answer

    start = time.perf_counter()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    p50, p99 = np.percentile(latencies, [50, 99]) if latencies else (float("nan"),) * 2
    return {
        "clients": len(clients),
        "seconds": round(took, 1),
        "requests": len(latencies),
        "errors": sum(p.startswith("error") for p in problems),
        "wrong": sum(p.startswith("wrong") for p in problems),
        "p50_ms": round(1e3 * p50, 2),
        "p99_ms": round(1e3 * p99, 2),
        "per_second": round(len(latencies) / took, 1),
        "problems": sorted(set(problems))[:5],
    }


def run(arguments: argparse.Namespace) -> int:
    """Load the server and print what was seen."""
    pairs, allowed = read_requests(arguments.folder)
    addresses = {"http": arguments.http, "grpc": arguments.grpc}
    protocols = {name: address for name, address in addresses.items() if address}
    requests = {
        name: CLIENTS[name].write(arguments.model, pairs, arguments.binary) for name in protocols
    }
    clients = [
        CLIENTS[name](protocols[name], arguments.model, requests[name])
        for name in itertools.islice(itertools.cycle(protocols), arguments.clients)
    ]
    allowed = arguments.allowed if arguments.allowed is not None else allowed
    names = {"http": f"HTTP ({'binary' if arguments.binary else 'JSON'})", "grpc": "gRPC"}
    found: dict[str, Any] = {"protocols": ", ".join(names[name] for name in protocols)}
    found |= load(clients, pairs, allowed, arguments.seconds)
    if arguments.save:
        name, file = arguments.save
        saved = json.loads(Path(file).read_text(encoding="utf-8")) | {name: found}
        Path(file).write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(found))
    else:
        shown = {name: str(value) for name, value in found.items() if name != "problems"}
        width = {name: max(len(name), len(value)) for name, value in shown.items()}
        print("  ".join(name.ljust(width[name]) for name in shown))
        print("  ".join(value.ljust(width[name]) for name, value in shown.items()))
        for problem in found["problems"]:
            print(problem)
    return int(found["errors"] + found["wrong"] > 0 or not found["requests"])


def main() -> int:
    """Read the command line, prepare or run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="write requests and their answers")
    command.add_argument("bundle", type=Path)
    command.add_argument("folder", type=Path)
    command = commands.add_parser("run", help="load a server")
    command.add_argument("folder", type=Path, help="that prepare wrote")
    command.add_argument("--model", required=True)
    command.add_argument("--http", metavar="HOST:PORT")
    command.add_argument("--grpc", metavar="HOST:PORT")
    command.add_argument("--clients", type=int, default=16)
    command.add_argument("--seconds", type=float, default=60.0)
    command.add_argument("--binary", action="store_true", help="binary tensors over HTTP")
    command.add_argument("--allowed", type=float, help="relative error; 0: equal to the bit")
    command.add_argument("--json", action="store_true")
    command.add_argument(
        "--save",
        nargs=2,
        metavar=("NAME", "FILE"),
        help="under a name, in an existing JSON file",
    )
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments)
        return 0
    if not arguments.http and not arguments.grpc:
        parser.error("run needs --http or --grpc")
    if not (arguments.folder / "load.json").is_file():
        parser.error(f"{arguments.folder} is not a folder that prepare wrote")
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
