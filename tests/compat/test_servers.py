"""Private names of the servers, tried in their environments."""

import subprocess

import pytest
from helpers.serving_runs import MLSERVER, RAY, make_environment

SCRIPTS = {
    MLSERVER: """
import asyncio
import inspect
import mlserver
from mlserver.errors import ModelNotFound
from mlserver.grpc.server import GRPCServer
from rotary_export.compat.mlserver import (
    configure_grpc, configure_http, get_http_app, open_call
)
from rotary_export.compat.uvicorn import make_limited_protocol

async def main():
    settings = mlserver.Settings(parallel_workers=0, load_models_at_startup=False)
    server = mlserver.MLServer(settings)
    assert any(route.path == "/v2/health/ready" for route in get_http_app(server).routes)
    configure_http(server, lambda: make_limited_protocol(4, 15), 15)
    for each in (server._rest_server, server._metrics_server):
        config = each._get_config()
        config.load()
        assert config.http_protocol_class.__name__ == "LimitedProtocol"
        assert config.timeout_keep_alive == 15
    class Service: pass
    configure_grpc(server, Service, 1000, 256, 15)
    assert ("grpc.max_receive_message_length", 1000) in server._grpc_server._get_options()
    assert "InferenceServicer(" in inspect.getsource(GRPCServer._create_server)
    assert "self._get_options()" in inspect.getsource(GRPCServer._create_server)
    try:
        async with open_call(server, "x", None):
            pass
    except ModelNotFound:
        print(True)

asyncio.run(main())
""",
    RAY: """
import inspect
import ray
from rotary_export.compat.ray import make_settings
source = inspect.getsource(inspect.unwrap(ray.init))  # it pops them from **kwargs
print(all(f'kwargs.pop("{name}"' in source for name in make_settings("folder", 1)))
""",
}


@pytest.mark.parametrize("engine", SCRIPTS, ids=lambda engine: engine.name)
def test_private_names_exist(engine, tmp_path):
    run = subprocess.run(
        [engine.python, "-c", SCRIPTS[engine]],
        env=make_environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr


PROTOCOL = """
import asyncio
import time
import uvicorn
from rotary_export.compat.uvicorn import make_limited_protocol

async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(int(scope["path"][1:]))})

async def open_one(request=b""):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    await asyncio.sleep(0.05)
    return reader, writer

async def main():
    global port
    protocol = make_limited_protocol(3, 1)
    config = uvicorn.Config(app, port=0, http=protocol, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    head = b"POST /1 HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 9\\r\\n\\r\\n"
    halves = [b"", head[:20], head + b"1"]
    start = time.perf_counter()
    opened = [await open_one(half) for half in halves]
    reader, writer = await open_one(b"GET /3 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")  # the fourth
    assert (await reader.readuntil(b"\\r\\n")).endswith(b"200 OK\\r\\n")
    ended = []
    for each, _ in opened:
        try:
            assert await each.read() == b""
        except ConnectionError:
            pass
        ended.append(time.perf_counter() - start)
    assert ended[0] < 0.9 < ended[1] < 5, ended  # the oldest was closed for the fourth
    reader, writer = await open_one(b"GET /100000000 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    await asyncio.sleep(3)  # reads nothing: the server ends it
    try:
        assert len(await reader.read()) < 10**8
    except ConnectionError:
        pass
    server.should_exit = True
    await task
    print(True)

asyncio.run(main())
"""


def test_connections_have_limits(tmp_path):
    run = subprocess.run(
        [MLSERVER.python, "-c", PROTOCOL],
        env=make_environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr
