"""`export`: the folder that it writes and what the graphs in it hold."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.bundles import (
    ROWS,
    SPECS,
    get_bundle,
    make_rope,
    make_tensors,
    read_tree,
)
from helpers.oracles import assert_same_bits

import rotary_export
from rotary_export import RotaryEmbedding, RotaryQueryKey, export, load
from rotary_export.bundle.manifest import TensorInfo, read_manifest
from rotary_export.exporters import export as exporter
from rotary_export.graphs.plain import find_longest_xpos

ONNX_ONLY = {"formats": ("onnx",)}


# ---- what is in it


@pytest.mark.parametrize("name", SPECS)
def test_the_manifest_describes_the_folder(name):
    bundle = get_bundle(name)
    arguments = SPECS[name][1]
    formats = arguments.get("formats", ("onnx", "torchscript", "program"))
    suffixes = {"onnx": ".onnx", "torchscript": ".pt", "program": ".pt2"}
    files = {f"{graph}{suffixes[kind]}" for graph in ("tables", "rotate") for kind in formats}
    assert {path.name for path in bundle.path.iterdir()} == files | {"manifest.json"}

    manifest = read_manifest(bundle.path)
    assert manifest.to_json() == bundle.manifest.to_json()
    assert manifest.name == name
    assert manifest.dtype == str(arguments.get("dtype", torch.float32)).removeprefix("torch.")
    assert manifest.opset == arguments.get("opset", 23)
    assert manifest.config["embedding"] == {
        "dim": 16,
        "use_xpos": False,
        "scale_base": 512.0,
        "interpolation_factor": 1.0,
        "base": 10000.0,
        "base_rescale_factor": 1.0,
    } | dict(SPECS[name][0])
    assert manifest.config["max_seq_len"] == ROWS
    assert manifest.producers["rotary_export"] == rotary_export.__version__
    assert manifest.producers["torch"] == torch.__version__
    assert manifest.files == {
        file: hashlib.sha256((bundle.path / file).read_bytes()).hexdigest() for file in files
    }
    assert manifest.parity == json.loads(json.dumps(bundle.report.to_dict()))
    assert manifest.parity["passed"] is True


@pytest.mark.parametrize("name", ["plain", "static"])
def test_graphs_are_described(name):
    graphs = get_bundle(name).manifest.graphs
    seq_len = TensorInfo("seq_len", "int64", (), (0, ROWS))
    assert graphs["tables"].inputs == (seq_len,)
    xpos = SPECS[name][0].get("use_xpos", False)
    assert graphs["tables"].outputs == (
        TensorInfo("freqs", "float32", (ROWS, 16)),
        TensorInfo("scale", "float32", (ROWS, 16) if xpos else ()),
    )
    shapes = (2, 4, ROWS, 16), (2, 2, ROWS, 16)
    third = seq_len
    if name == "plain":
        shapes = tuple(("batch_size", n, "seq_len", 24) for n in ("num_heads", "num_kv_heads"))
        third = TensorInfo("position_ids", "int64", ("batch_size", "seq_len"), (0, ROWS - 1))
    assert graphs["rotate"].inputs == (
        TensorInfo("query", "float32", shapes[0]),
        TensorInfo("key", "float32", shapes[1]),
        third,
    )
    assert graphs["rotate"].outputs == (
        TensorInfo("query_out", "float32", shapes[0]),
        TensorInfo("key_out", "float32", shapes[1]),
    )


@pytest.mark.parametrize("name", ["plain", "static"])
@pytest.mark.parametrize("graph", ["tables", "rotate"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_names_are_equal_in_every_format(name, graph):
    bundle = get_bundle(name)
    info = bundle.manifest.graphs[graph]
    inputs = [tensor.name for tensor in info.inputs]
    model = onnx.load(bundle.path / f"{graph}.onnx")
    assert [value.name for value in model.graph.input] == inputs
    assert [value.name for value in model.graph.output] == [t.name for t in info.outputs]
    script = torch.jit.load(bundle.path / f"{graph}.pt")
    assert [argument.name for argument in script.forward.schema.arguments][1:] == inputs
    program = torch.export.load(bundle.path / f"{graph}.pt2")
    assert list(program.graph_signature.user_inputs) == inputs


@pytest.mark.parametrize("name", SPECS)
def test_no_file_names_a_place_on_this_machine(name):
    bundle = get_bundle(name)
    places = {str(bundle.path.parent), str(Path(rotary_export.__file__).parent), "site-packages"}
    for path in bundle.path.iterdir():
        unpacked = path.read_bytes()
        if path.suffix in (".pt", ".pt2"):
            shutil.unpack_archive(path, bundle.path.parent / "unpacked", "zip")
            members = read_tree(bundle.path.parent / "unpacked")
            shutil.rmtree(bundle.path.parent / "unpacked")
            assert not [member for member in members if member.endswith(".debug_pkl")]
            unpacked = b"".join(data or b"" for data in members.values())
        assert [place for place in places if place.encode() in unpacked] == [], path.name


@pytest.mark.parametrize("name", SPECS)
def test_rotate_is_one_node(name):
    bundle = get_bundle(name)
    graph = onnx.load(bundle.path / "rotate.onnx").graph
    rotary = [node for node in graph.node if node.domain == "rotary_export"]
    assert [node.op_type for node in rotary] == ["RotaryEmbedding"]
    assert bundle.manifest.graphs["rotate"].rotary_nodes == len(rotary)
    assert bundle.manifest.graphs["tables"].rotary_nodes == 0
    if name != "static":  # which also selects the rows of the tables
        assert {node.op_type for node in graph.node} <= {"RotaryEmbedding", "Constant"}


def read_optimised_ops(file: Path, folder: Path) -> list[str]:
    """Return the ops that ONNX Runtime runs without our library."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimised.onnx").graph.node
    return [f"{node.domain}::{node.op_type}" for node in nodes]


@pytest.mark.parametrize("name", SPECS)
def test_the_function_body_matches_the_manifest(name, tmp_path):
    bundle = get_bundle(name)
    ops = read_optimised_ops(bundle.path / "rotate.onnx", tmp_path)
    assert not [op for op in ops if op.startswith("rotary_export")]
    native = ops.count("::RotaryEmbedding")
    kind = bundle.manifest.graphs["rotate"].function_body
    assert (native, kind) == ((2, "native") if native else (0, "primitive"))
    if name in ("plain", "xpos"):
        assert ops == ["::RotaryEmbedding"] * 2


# ---- what it holds


def test_the_module_is_exported_as_it_is_and_left_so(tmp_path):
    rope = make_rope("xpos").train()
    state = {name: value * 0.75 for name, value in rope.state_dict().items()}
    rope.load_state_dict(state)
    rope._apply = None  # neither .cpu() nor .to() is called on the user's module
    bundle = rotary_export.export(rope, tmp_path / "b", formats=("onnx", "torchscript"))
    assert [*bundle.report.unverified] == ["inv_freq by its formula", "scale by its formula"]
    assert rope.training
    assert rope.max_seq_len == ROWS
    assert list(rope.state_dict()) == list(state)
    for name, value in rope.state_dict().items():
        assert_same_bits(value, state[name], name)

    length = torch.tensor(9)
    for runtime in ("onnxruntime", "torchscript"):
        got = load(bundle, "tables", runtime, allow_code=True)(seq_len=length)
        assert_same_bits(got["freqs"], rope(length)[0], runtime)
        torch.testing.assert_close(got["scale"], rope(length)[1], rtol=3e-7, atol=0)
        inputs = make_tensors("float64") | {"query": torch.randn(3, 4, 7, 16)}
        inputs["key"] = torch.randn(3, 2, 7, 16)
        want = RotaryQueryKey(rope)(**inputs)
        for value, expected in zip(
            load(bundle, "rotate", runtime, allow_code=True)(**inputs).values(), want, strict=True
        ):
            assert_same_bits(value, expected, runtime)


def test_a_bundle_can_be_moved(tmp_path, monkeypatch):
    moved = tmp_path / "a b" / "ünïcode"
    shutil.copytree(get_bundle("plain"), moved)
    monkeypatch.chdir(moved.parent)
    for runtime in ("onnxruntime", "torchscript", "program"):
        assert load(moved.name, "tables", runtime, allow_code=True)(seq_len=3)["freqs"].shape == (
            ROWS,
            16,
        )
    assert rotary_export.verify(moved, allow_code=True).passed


@pytest.mark.parametrize("formats", [("torchscript",), ["program", "onnx"]], ids="+".join)
def test_some_formats(formats, tmp_path):
    bundle = rotary_export.export(make_rope("plain"), tmp_path / "b", formats=formats)
    assert list(bundle.manifest.graphs["rotate"].files) == list(formats)
    assert len(list(bundle.path.iterdir())) == 2 * len(formats) + 1
    ran = {row.runtime for row in bundle.report.rows}
    assert ("TorchScript" in ran) == ("torchscript" in formats)
    assert ("torch.export" in ran) == ("program" in formats)
    assert ("onnx.reference" in ran) == ("onnx" in formats)


@pytest.mark.parametrize("use_xpos", [False, True])
def test_one_row(use_xpos, tmp_path):
    rope = RotaryEmbedding(4, use_xpos, max_seq_len=1)
    assert rotary_export.export(rope, tmp_path / "b", **ONNX_ONLY).report.passed


def test_progress_names_each_file_and_run(tmp_path):
    said = []
    rotary_export.export(make_rope("plain"), tmp_path / "b", progress=said.append, **ONNX_ONLY)
    assert said[:2] == ["export tables.onnx", "export rotate.onnx"]
    assert "verify rotate: ONNX Runtime, op library" in said


def test_the_config_reads_back():
    for name in ("plain", "static"):
        bundle = get_bundle(name)
        config = exporter.check_config(
            make_rope(name),
            **{k: v for k, v in SPECS[name][1].items() if k not in ("formats", "opset")},
        )
        assert bundle.manifest.config == config.to_dict()
    assert np.isfinite(bundle.manifest.parity["rows"][0]["oracle"]["max_ulp"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_longest_xpos_export_passes_its_proof(dtype, tmp_path):
    rope = RotaryEmbedding(4, use_xpos=True, scale_base=16)
    longest = find_longest_xpos(rope, dtype)
    bundle = export(
        rope, tmp_path / "b", max_seq_len=longest, num_heads=1, dtype=dtype, formats=("onnx",)
    )
    assert bundle.report.passed
