"""A server in a process of its own, in the environment of its target, and its clients."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from helpers.bundles import run_eager
from helpers.paths import ROOT, TOOLS
from helpers.target_runs import TargetRun, compare, read_version, record, require

import rotary_export

PROTOCOLS = ("http", "grpc")
SHAPES = ((1, 1), (3, 7), (2, 32))  # batch_size, seq_len of requests
READY_S = 180  # long enough for a busy machine
STOP_S = 60


@dataclass(frozen=True)
class Engine:
    """An engine of `rotary-export serve`.

    Attributes:
        name: Of `--engine`, of the environment and of the package.
        target: In the table of targets.
        options: Of a server whose requests wait, so that those sent at once run together.
        note: In the table of targets.
    """

    name: str
    target: str
    options: tuple[object, ...]
    note: str

    @property
    def python(self) -> Path:
        """The interpreter of its environment; skips where it is not installed."""
        return require(self.name) / "venv" / "bin" / "python"

    def record(self, graph: str, dtype: str, worst: float, exact: bool, note: str = "") -> None:
        """Keep a row for the table of targets."""
        shapes = [f"{batch}x{length}" for batch, length in SHAPES]
        version = read_version(self.python, self.name)
        path, note = "fused", self.note + note
        record(
            TargetRun(
                self.target, version, graph, "ran", path, (dtype,), shapes, worst, exact, note
            )
        )


MLSERVER = Engine(
    "mlserver",
    "MLServer",
    ("--max-batch-delay-ms", 200),
    "rotary-export serve; HTTP (JSON) and gRPC",
)
RAY = Engine(
    "ray",
    "Ray Serve",
    ("--engine", "ray", "--replicas", 2, "--max-batch-delay-ms", 20),
    "rotary-export serve --engine ray --replicas 2; HTTP and gRPC",
)


def make_environment(folder: Path) -> dict[str, str]:
    """Return an environment in which only this package, beside those installed, is imported."""
    home = folder / "package"
    home.mkdir(exist_ok=True)
    link = home / "rotary_export"
    if not link.exists():
        link.symlink_to(Path(rotary_export.__file__).parent)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLSERVER"))}
    return kept | {"PYTHONPATH": str(home)}


class Server:
    """`rotary-export serve`, ready; a context that ends it.

    Args:
        python: Of the environment that has the server.
        folder: To work in.
        arguments: Of serve. Ports are free ones by default.
    """

    def __init__(self, python: Path, folder: Path, *arguments: object) -> None:
        ports = [part for name in ("http", "grpc", "metrics") for part in (f"--{name}-port", "0")]
        command = [python, "-m", "rotary_export", "serve", *ports, *map(str, arguments)]
        self.errors = folder / "stderr"
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=folder,
                env=make_environment(folder),
            )
        assert self.process.stdout is not None
        timer = threading.Timer(READY_S, self.process.kill)
        timer.start()
        try:
            self.line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not self.line.startswith("serving "):
            self.kill()
            raise AssertionError(f"{self.line}{self.errors.read_text()}")
        self.model = self.line.split()[1]
        self.http, self.grpc, self.metrics = re.findall(r"//([\d.]+:\d+)", self.line)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.communicate()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)

    @property
    def port_options(self) -> list[str]:
        """The options of `serve` for a server on the same ports."""
        addresses = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}
        return [p for n, a in addresses.items() for p in (f"--{n}-port", a.rpartition(":")[2])]

    def is_ready(self) -> bool:
        """Ask for its health."""
        with suppress(OSError), urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as got:
            return bool(got.status == 200)
        return False

    def read_metrics(self) -> dict[str, float]:
        """Return the metrics, by name and labels."""
        with urlopen(f"http://{self.metrics}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        split = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in split}


def run_serve(python: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `rotary-export serve` where it is expected to fail at once."""
    return subprocess.run(
        [python, "-m", "rotary_export", "serve", *map(str, arguments)],
        env=make_environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def ask(
    python: Path,
    folder: Path,
    protocol: str,
    address: str,
    model: str,
    requests: Sequence[dict[str, np.ndarray]],
) -> list[dict[str, np.ndarray] | str]:
    """Send requests at once, with tritonclient; return the outputs or the error of each."""
    asked, replied = folder / f"{protocol}-requests.npz", folder / f"{protocol}-replies.npz"
    arrays = {f"{i} {name}": value for i, r in enumerate(requests) for name, value in r.items()}
    np.savez(asked, **arrays)
    script = Path(__file__).with_name("ask_server.py")
    run = subprocess.run(
        [python, "-I", script, protocol, address, model, asked, replied],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    refused = json.loads(run.stdout)
    results: list[dict[str, np.ndarray] | str] = [
        refused.get(str(index), {}) for index in range(len(requests))
    ]
    with np.load(replied) as replies:
        for key in replies.files:
            index, name = key.split()
            results[int(index)][name] = replies[key]
    return results


def compute_eager(name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return eager's outputs of a bundle in the protocol's types: bfloat16 as float32."""
    outputs = run_eager(name, inputs).items()
    return {k: np.asarray(v.float() if str(v.dtype) == "torch.bfloat16" else v) for k, v in outputs}


def compare_replies(
    server: Server,
    python: Path,
    folder: Path,
    requests: Sequence[Mapping[str, np.ndarray]],
    wants: Sequence[Mapping[str, np.ndarray]],
    allowed: float,
) -> tuple[float, bool]:
    """Send requests over each protocol; return the largest error, and whether all were exact."""
    results = []
    for protocol in PROTOCOLS:
        replies = ask(python, folder, protocol, getattr(server, protocol), server.model, requests)
        for want, reply in zip(wants, replies, strict=True):
            results.append(compare(reply, want, allowed))
    return max(error for error, _ in results), all(exact for _, exact in results)


def run_load(
    server: Server, python: Path, folder: Path, bundle: Path, *options: object
) -> dict[str, Any]:
    """Load a server with 16 clients, mixed lengths, half of them over HTTP; return the counts."""
    tool = TOOLS / "targets" / "load_server.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    prepare = [sys.executable, tool, "prepare", bundle, folder / "requests"]
    subprocess.run(prepare, env=environment, check=True, capture_output=True)
    command = [python, tool, "run", folder / "requests", "--model", server.model, "--json"]
    addresses = ["--http", server.http, "--grpc", server.grpc]
    run = subprocess.run(
        [*map(str, (*command, *addresses, "--seconds", 3, *options))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found
