"""A server in a process of its own, in the environment of its target, and who asks it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import numpy as np

import rotary_export

READY_S = 180  # to tell one that hangs from one on a busy machine
STOP_S = 60


def make_environment(folder: Path) -> dict[str, str]:
    """Return an environment in which this package, and none beside it, can be imported."""
    home = folder / "package"
    home.mkdir(exist_ok=True)
    link = home / "rotary_export"
    if not link.exists():
        link.symlink_to(Path(rotary_export.__file__).parent)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLSERVER"))}
    return kept | {"PYTHONPATH": str(home)}


class Server:
    """`rotary-export serve`, ready; a context, at whose end it is gone.

    Args:
        python: Of the environment that has the server.
        folder: To work in.
        arguments: Of serve. Ports are free ones, unless they say otherwise.
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


def ask(
    python: Path,
    folder: Path,
    protocol: str,
    address: str,
    model: str,
    requests: Sequence[dict[str, np.ndarray]],
) -> list[dict[str, np.ndarray] | str]:
    """Send requests at once, with tritonclient; return outputs, or why it was refused, of each."""
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
