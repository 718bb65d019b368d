"""What deploy writes for servers and programs, read without them."""

import ast
import importlib.util
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.bundles import get_bundle, make_arrays
from helpers.paths import KITS, ROOT

import rotary_export
from rotary_export.bundle.manifest import TensorInfo
from rotary_export.deploy.mlserver import prepare_mlserver
from rotary_export.deploy.signature import write_signature
from rotary_export.deploy.triton import write_repository
from rotary_export.errors import RotaryExportError
from rotary_export.runtime.session import check_session_inputs
from rotary_export.serving.options import ENGINES, ModelOptions

PACKAGE = Path(rotary_export.__file__).parent


def find_definitions(module):
    """Return the top-level names of a module of this package, which is not imported."""
    file = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return {node.name for node in ast.parse(file.read_text()).body if hasattr(node, "name")}


def test_mlserver_settings_name_a_class_and_known_options(tmp_path):
    manifest = get_bundle("plain").manifest
    prepare_mlserver(tmp_path, manifest, "rotate")
    assert (tmp_path / "rotary_export" / "serving" / "mlserver" / "model.py").is_file()
    settings = json.loads((tmp_path / "model-settings.json").read_text())
    module, _, name = settings["implementation"].rpartition(".")
    assert name in find_definitions(module)
    assert settings["name"] == manifest.name
    assert settings["parameters"]["uri"] == "./bundle"
    options = ModelOptions(**settings["parameters"]["extra"])
    assert options == ModelOptions(graph="rotate", max_batch_size=64)


def test_every_engine_has_a_serve_function():
    for module in ENGINES.values():
        assert "serve" in find_definitions(module)


def test_ray_files_name_functions_of_the_package():
    kit = KITS / "ray"
    module, _, name = re.search(r"- (rotary_export\S+)", (kit / "serve.yaml").read_text())[
        1
    ].rpartition(".")
    assert name in find_definitions(module)
    (imported,) = [
        node for node in ast.parse((kit / "app.py").read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module.startswith("rotary_export")
    ]  # fmt: skip
    assert {alias.name for alias in imported.names} <= find_definitions(imported.module)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The model repository for Triton of `plain`, without the copies of files."""
    staging = tmp_path_factory.mktemp("triton")
    (staging / "bundle").symlink_to(get_bundle("plain").path)
    for name in ("model.py", "README.md"):
        (staging / name).write_bytes((KITS / "triton" / name).read_bytes())
    write_repository(staging, get_bundle("plain").manifest, "rotate")
    return staging / "model_repository"


def test_triton_registers_the_op_library_on_the_cpu_only(repository):
    model = repository / "rotate_onnxruntime"
    cpu = (model / "config.pbtxt").read_text()
    (library,) = re.findall(r'op_library_filename: "(.*?)"', cpu)
    assert library == "/models/rotate_onnxruntime/1/librotary_export.so"
    assert (model / "1" / "librotary_export.so").is_file()
    gpu = (model / "configs" / "gpu.pbtxt").read_text()
    assert "op_library" not in gpu
    assert (re.findall("KIND_.PU", cpu), re.findall("KIND_.PU", gpu)) == (
        ["KIND_CPU"],
        ["KIND_GPU"],
    )


def test_triton_batches_up_to_the_limit_and_omits_the_batch(repository):
    for config in repository.rglob("*.pbtxt"):
        text = config.read_text()
        assert "max_batch_size: 64\n" in text
        assert "dynamic_batching { max_queue_delay_microseconds: 500 }" in text
        assert text.count("dims: [ -1, -1, 24 ]") == 4  # query, key and the outputs
        assert text.count("dims: [ -1 ]") == 1  # position_ids
        assert ("allow_ragged_batch" in text) == ("python" in config.parts[-2])


@pytest.mark.parametrize(("kit", "extra"), [("mlserver", "serve"), ("ray", "ray")])
def test_requirements_of_servers_are_those_of_the_extras(kit, extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["cpu"], *extras["cli"], *extras[extra]}
    wanted -= {"rotary_export[cli]"}
    assert set((KITS / kit / "requirements.txt").read_text().split()) == wanted


def test_the_signature_contains_inputs_outputs_and_limits(tmp_path):
    manifest = get_bundle("plain").manifest
    rotate = replace(
        manifest.graphs["rotate"],
        inputs=(
            TensorInfo("mask", "bool", ("batch_size", "past_len + seq_len")),
            TensorInfo("ids", "int64", (2, "seq_len"), (0, 9)),
            TensorInfo("image", "float32", ("8 * height",)),
        ),
        max_size={"seq_len": 64},
        min_size={"height": 2},
    )
    write_signature(tmp_path, replace(manifest, graphs={"rotate": rotate}), "rotate")
    assert (tmp_path / "signature.txt").read_text().splitlines() == [
        "input mask bool batch_size past_len+seq_len",
        "input ids int64 2 seq_len in 0 9",
        "input image float32 8*height",
        "output query_out",
        "output key_out",
        "max_size seq_len 64",
        "min_size height 2",
    ]


# ---- the shared sources of kits in Python


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("arrays", KITS / "shared/python/arrays.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.HERE = tmp_path_factory.mktemp("kit")
    (module.HERE / "kit.json").write_text('{"expected_by": "onnxruntime"}')
    return module


@pytest.mark.parametrize(
    "change",
    [
        {"position_ids": np.array([[0, 31, 32]])},
        {"position_ids": np.array([[0, 1, -1]])},
        {"position_ids": np.array([[0, 1, 2]], np.int32)},
        {"position_ids": np.array([[0, 1]])},
        {"key": np.zeros((1, 2, 24), np.float32)},
        {"query": np.zeros((2, 4, 3, 24), np.float32)},
        {"query": np.zeros((1, 4, 3, 23), np.float32)},
    ],
)
def test_python_kits_refuse_what_the_runtime_refuses(change, arrays):
    """In the same words, but for the sizes that are known at the time."""
    graph = get_bundle("plain").manifest.graphs["rotate"]
    infos = json.loads(get_bundle("plain").manifest.to_json())["graphs"]["rotate"]["inputs"]
    inputs = make_arrays("plain", batch=1, seq_len=3)
    arrays.check_inputs(infos, inputs)
    with pytest.raises(RotaryExportError) as wanted:
        check_session_inputs("rotate", graph, inputs | change)
    with pytest.raises(SystemExit) as refused:
        arrays.check_inputs(infos, inputs | change)
    known = r"(, \w+=\d+)*"
    assert re.sub(known, "", str(refused.value)) == re.sub(known, "", str(wanted.value))


@pytest.mark.parametrize(("error", "fits"), [(1e-5, True), (1e-4, False), (np.nan, False)])
def test_python_kits_compare_with_what_is_expected(error, fits, arrays):
    infos = [{"name": "query_out", "dtype": "float32"}]
    want = np.ones((2, 3), np.float32)
    got = want.copy()
    got[1, 2] += error
    if fits:
        arrays.compare(infos, {"query_out": got}, {"query_out": want})
        return
    with pytest.raises(SystemExit, match="query_out differs from what ONNX Runtime computed"):
        arrays.compare(infos, {"query_out": got}, {"query_out": want})
