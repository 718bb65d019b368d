"""A real tritonserver, with the Python backend that nvidia-pytriton ships."""

import os
import re
import socket
import subprocess
import sysconfig
import time
from contextlib import closing

from rotary_export.serving.ports import find_ports

READY_S = 60


class Server:
    """A tritonserver on loopback, ready; a context, at whose end it is gone."""

    def __init__(self, folder, packages, repository, model, *options) -> None:
        (server,) = folder.glob("venv/lib/python3*/site-packages/pytriton/tritonserver")
        ports = dict(
            zip(("http", "grpc", "metrics"), find_ports("127.0.0.1", 0, 0, 0), strict=True)
        )
        self.model = model
        self.log = repository.parent / "log"
        self.http, self.grpc = (f"127.0.0.1:{ports[name]}" for name in ("http", "grpc"))
        self._command = [
            server / "bin" / "tritonserver",
            f"--backend-directory={server / 'backends'}",
            f"--model-repository={repository}",
            "--model-control-mode=explicit",
            f"--load-model={model}",
            "--allow-gpu-metrics=false",
            *options,
            *(f"--{name}-address=127.0.0.1" for name in ports),
            *(f"--{name}-port={port}" for name, port in ports.items()),
        ]
        # The backend's Python ignores PYTHONPATH, and looks in the working folder first.
        self._where = {
            "cwd": packages,
            "env": os.environ | {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR")},
        }
        self.start()

    def start(self):
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, **self._where)
        deadline = time.monotonic() + READY_S
        while b"200 OK" not in self.send(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(self.log.read_text())
            time.sleep(0.2)

    def send(self, request, patience=5):
        """Send bytes over HTTP; return the beginning of the answer, empty if there is none."""
        host, port = self.http.split(":")
        try:
            with closing(socket.create_connection((host, int(port)), patience)) as connection:
                connection.sendall(request)
                return connection.recv(4096)
        except OSError:
            return b""

    def read_statistics(self):
        """Return how many requests were answered, and in how many runs."""
        path = f"/v2/models/{self.model}/stats".encode()
        answer = self.send(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n").decode()
        counts = (
            re.search(f'"{kind}_count":(\\d+)', answer) for kind in ("inference", "execution")
        )
        return [int(found[1]) for found in counts]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        self.process.kill()
        self.process.wait()
