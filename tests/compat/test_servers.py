"""Private names of the servers, tried in their environments."""

import subprocess

import pytest
from helpers.serving_runs import MLSERVER, RAY, make_environment

SCRIPTS = {
    MLSERVER: """
import mlserver
from rotary_export.compat.mlserver import get_http_app
settings = mlserver.Settings(parallel_workers=0, load_models_at_startup=False)
app = get_http_app(mlserver.MLServer(settings))
print(any(route.path == "/v2/health/ready" for route in app.routes))
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
