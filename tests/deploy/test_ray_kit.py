"""`deploy ray`: the kit for a cluster; and what `serve --engine ray` refuses to start."""

import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

import pytest
from helpers.bundles import get_bundle
from helpers.processes import wait_for
from helpers.serving_runs import RAY, make_environment, run_serve
from helpers.target_runs import TargetRun, read_version, record

from rotary_export.deploy.deploy import deploy
from rotary_export.serving.ports import find_ports
from rotary_export.serving.ray.reaper import start_reaper


@pytest.fixture(scope="module")
def python():
    return RAY.python


def test_kit(python, tmp_path):
    kit = deploy("ray", get_bundle("float16").path, tmp_path / "kit")
    config = kit / "serve.yaml"
    ports = find_ports("127.0.0.1", 0, 0)
    text = config.read_text()
    for default, port in zip((8080, 8081), ports, strict=True):
        assert f"port: {default}\n" in text
        text = text.replace(f"port: {default}\n", f"port: {port}\n")
    config.write_text(text)
    folder = tempfile.mkdtemp(prefix="ray-")  # short: it holds sockets
    environment = make_environment(tmp_path) | {
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its sockets on the loopback interface
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(kit),  # as the page has it: the kit has the package
    }
    log = tmp_path / "log"
    with start_reaper(folder), log.open("wb") as out:
        process = subprocess.Popen(
            [python.with_name("serve"), "run", "serve.yaml"],
            cwd=kit, env=environment, stdout=out, stderr=out,
        )  # fmt: skip
        try:
            client = [python, "client.py", f"127.0.0.1:{ports[1]}"]
            ask_client = lambda: subprocess.run(  # noqa: E731
                client, cwd=kit, capture_output=True, text=True, check=False
            )
            ready = f"http://127.0.0.1:{ports[0]}/v2/models/float16/ready"
            wait_for(lambda: is_up(ready) or process.poll() is not None)
            run = ask_client()
            assert run.returncode == 0, run.stdout + run.stderr + log.read_text()
            errors = [float(e) for e in re.findall(r"largest error ([^ \n]+)", run.stdout)]
            assert len(errors) == 2
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()
            process.wait()
    record(
        TargetRun(
            "Ray Serve", read_version(python, "ray"), "rotate", "ran", "fused", ("float16",),
            ("2x7",), max(errors), run.stdout.count("equal to the bit") == 2,
            "deploy ray, serve run serve.yaml; gRPC",
        )
    )  # fmt: skip


def is_up(url):
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_without_ray_the_command_names_what_to_install(tmp_path):
    bundle = str(get_bundle("plain").path)
    cases = [
        (": pip install '.[ray]' in the checkout", [bundle, "--engine", "ray"]),
        ("--replicas must be 1 for the engine mlserver, got 2", [bundle, "--replicas", "2"]),
    ]
    for message, arguments in cases:
        run = run_serve(Path(sys.executable), tmp_path, *arguments)
        assert (run.returncode, run.stdout) == (2, ""), run.stderr
        assert message in run.stderr


def test_a_mistake_at_the_start_is_one_line(python, tmp_path):
    bundle = str(get_bundle("plain").path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            ("is not a bundle", [str(tmp_path)]),
            ("--allow-code", [bundle, "--runtime", "torchscript"]),
            ("needs a free port", [bundle, "--grpc-port", port]),
        ]
        for message, arguments in cases:
            run = run_serve(python, tmp_path, "--engine", "ray", *arguments)
            assert (run.returncode, run.stdout) == (2, ""), run.stderr
            assert message in run.stderr
            assert run.stderr.count("\n") == 1, run.stderr
