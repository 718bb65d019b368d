"""A fused file as a bundle: what is in it, and what opens it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from helpers.fuse_graphs import (
    Graph,
    H,
    add_query_key,
    half,
    make_feeds,
    put_in_branches,
    run,
    write_genai,
    write_half,
)
from onnx import TensorProto, numpy_helper

import rotary_export
from rotary_export.bundle.dims import BATCH, PAST, SEQ, TOTAL
from rotary_export.bundle.manifest import (
    FILE_NAME,
    TensorInfo,
    check_files,
    hash_file,
    read_manifest,
)
from rotary_export.cli.inspection import inspect_path
from rotary_export.deploy.deploy import deploy
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.fusion.read import read_model
from rotary_export.measure.benchmark import bench_bundle
from rotary_export.models.fused.bundle import write_fused_bundle
from rotary_export.models.fused.describe import describe_file, find_max_positions
from rotary_export.proof.models.input_values import read_input_values
from rotary_export.runtime.onnx_file import load_onnx_file, name_dims, read_onnx_file
from rotary_export.serving.core import ServedModel


def make_model(weights: int = 0) -> onnx.ModelProto:
    g = Graph()
    half(g)
    for node, name in zip([n for n in g.nodes if n.op_type == "Identity"][-2:], "qk", strict=True):
        node.output[0] = g.outputs["qk".index(name)].name = f"{name}_out"
    if weights:
        big = g.const(np.random.default_rng(0).normal(size=(H, weights)).astype("f"))
        g.output(g.op("MatMul", g.op("Identity", "query"), big), "wide")
    return g.model()


@pytest.fixture
def bundle(tmp_path):
    return write_fused_bundle(rotary_export.fuse(make_model()), tmp_path / "b")


def test_a_bundle_contains_the_graph_its_proof_and_hashes(bundle):
    assert {path.name for path in bundle.path.iterdir()} == {FILE_NAME, "model.onnx"}
    manifest = read_manifest(bundle.path)
    check_files(bundle.path, manifest)
    assert (manifest.name, manifest.dtype, manifest.opset) == ("b", "float32", 18)
    graph = manifest.graphs["model"]
    assert [(i.name, i.shape) for i in graph.inputs] == [
        ("position_ids", (BATCH, SEQ)), ("query", (BATCH, 4, SEQ, H)), ("key", (BATCH, 2, SEQ, H)),
    ]  # fmt: skip
    assert (graph.rotary_nodes, graph.function_body) == (1, "primitive")
    parity = manifest.parity
    assert (parity["passed"], parity["reference"]) == (True, "the model before fuse")
    assert [(row["runtime"], row["case"].split(",")[0]) for row in parity["rows"]] == [
        (f"ONNX Runtime, {how}", f"batch_size {size}")
        for how in ("function body", "op library")
        for size in (1, 3, 2)
    ]
    assert {row["eager_allowed"] for row in parity["rows"]} == {256.0}


def test_what_opens_a_bundle_opens_it(bundle, tmp_path):
    feeds = make_feeds(3, 7)
    want = run(make_model(), feeds)
    for library in (True, False):
        session = rotary_export.load(bundle, "model", use_op_library=library)
        for got, value in zip(session(**feeds).values(), want, strict=True):
            np.testing.assert_allclose(got, value, rtol=0, atol=2e-6)
    report = rotary_export.verify(bundle)
    assert (report.passed, report.reference) == (True, "ONNX Runtime, function body")
    assert report.shapes["model"][1] == "batch_size 3, seq_len 13"
    rows = bench_bundle(bundle.path, [(2, 3)], seconds=0.01).rows
    assert {row.run for row in rows} == {
        f"ONNX Runtime, {h}" for h in ("function body", "op library")
    }
    for target in ("mlserver", "openvino", "cpp-onnxruntime"):
        kit = deploy(target, bundle, tmp_path / target)
        assert json.loads((kit / "kit.json").read_text())["graph"] == "model"
    served = ServedModel(bundle.path)
    assert served.batches
    assert served.metadata["inputs"][0]["shape"] == [-1, -1]


def test_verify_refuses_a_bundle_whose_body_is_another(bundle):
    file, manifest = bundle.path / "model.onnx", bundle.path / FILE_NAME
    model = onnx.load(file)
    (body,) = model.functions
    node = next(node for node in body.node if node.op_type == "Sub")
    node.op_type = "Add"
    onnx.save(model, file)
    with pytest.raises(CheckFailedError, match="is not the file that was exported"):
        rotary_export.verify(bundle)
    facts = json.loads(manifest.read_text())
    facts["files"]["model.onnx"] = hash_file(file)
    manifest.write_text(json.dumps(facts))
    report = rotary_export.verify(bundle)
    assert not report.passed
    assert report.find_failure().runtime == "ONNX Runtime, op library"


def test_external_data_is_of_the_bundle(tmp_path):
    onnx.save(
        make_model(4096), tmp_path / "in.onnx", save_as_external_data=True, location="weights.bin",
        size_threshold=1024,
    )  # fmt: skip
    path = write_fused_bundle(rotary_export.fuse(tmp_path / "in.onnx"), tmp_path / "b").path
    assert {file.name for file in path.iterdir()} == {FILE_NAME, "model.onnx", "model.onnx_data"}
    assert rotary_export.verify(path).passed
    with (path / "model.onnx_data").open("r+b") as file:
        file.write(b"other")
    with pytest.raises(CheckFailedError, match=r"model\.onnx_data in .* is not the file"):
        rotary_export.load(path, "model")


def test_a_folder_is_replaced_only_if_it_is_a_bundle_and_asked_for(bundle, tmp_path):
    result = rotary_export.fuse(make_model())
    with pytest.raises(RotaryExportError, match="exists; force=True"):
        write_fused_bundle(result, bundle.path)
    write_fused_bundle(result, bundle.path, force=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(RotaryExportError, match="is not a bundle; it is left as it is"):
        write_fused_bundle(result, other, force=True)
    assert [file.name for file in other.iterdir()] == ["mine.txt"]


def test_the_input_is_never_replaced(tmp_path):
    folder = tmp_path / "b"
    folder.mkdir()
    onnx.save(make_model(), folder / "model.onnx")
    result = rotary_export.fuse(folder / "model.onnx")
    with pytest.raises(RotaryExportError, match=r"model\.onnx is read from: the input is never"):
        write_fused_bundle(result, folder, force=True)
    with pytest.raises(RotaryExportError, match="a dry run can't be written"):
        write_fused_bundle(rotary_export.fuse(make_model(), dry_run=True), tmp_path / "c")
    assert [file.name for file in folder.iterdir()] == ["model.onnx"]


def test_a_float32_output_of_float16_arithmetic_is_judged_as_float16(tmp_path):
    g = Graph()
    write_half(g)
    bundle = write_fused_bundle(rotary_export.fuse(g.model()), tmp_path / "b")
    assert bundle.manifest.dtype == "float16"
    assert set(bundle.manifest.config["fused"]["narrowest"].values()) == {"float16"}
    rows = rotary_export.verify(bundle).rows
    assert {(row.output == "apart", row.eager_allowed) for row in rows} == {(0, 32), (1, 256)}
    deploy("openvino", bundle, tmp_path / "kit")


def test_a_batch_that_does_not_run_is_verified_by_the_row(tmp_path):
    bundle = write_fused_bundle(rotary_export.fuse(write_genai()), tmp_path / "b")
    names = [case["name"].split(", kv")[0] for case in bundle.manifest.config["cases"]]
    assert names == [
        "batch_size 1, seq_len 7, past_seq_len 0",
        "batch_size 1, seq_len 13, past_seq_len 5",
        "batch_size 2, seq_len 1, past_seq_len 19",
    ]
    assert "row by row" in bundle.manifest.parity["rows"][1]["case"]
    assert rotary_export.verify(bundle).passed


def test_nodes_in_branches_alone_are_counted(tmp_path):
    """They decide whether the op library is registered, and whether it is verified."""
    g = Graph()
    half(g)
    model = put_in_branches(g)
    bundle = write_fused_bundle(rotary_export.fuse(model), tmp_path / "b")
    assert bundle.manifest.graphs["model"].rotary_nodes == 2
    runtimes = {row.runtime for row in rotary_export.verify(bundle).rows}
    assert "ONNX Runtime, op library" in runtimes
    session = rotary_export.load(bundle, require_fused=True)
    assert session.kernel_path.startswith("fused")
    assert load_onnx_file(bundle.path / "model.onnx").kernel_path.startswith("fused")
    for flag in (True, False):
        feeds = make_feeds(3, 7) | {"flag": np.array(flag)}
        want = run(model, feeds)
        for got, value in zip(session(**feeds).values(), want, strict=True):
            np.testing.assert_allclose(got, value, rtol=0, atol=2e-6)
    facts = inspect_path(bundle.path / "model.onnx")
    assert (facts["rotary nodes"], len(facts["rotary"])) == (2, 2)
    assert "fuse would replace" not in facts


# ---- what is read from a file


@pytest.mark.parametrize("where", ["ids", "gather"])
def test_positions_end_where_a_stored_table_does(tmp_path, where):
    g = Graph(23)
    ids = g.input("position_ids", ["batch", "seq"], TensorProto.INT64)
    angles = np.outer(np.arange(40), 10000.0 ** -np.linspace(0, 0.9, H // 2))
    cos, sin = (g.const(f(angles).astype("f")) for f in (np.cos, np.sin))
    tables = [cos, sin, ids]
    if where == "gather":
        tables = [g.op("Gather", table, ids) for table in tables[:2]]
    for x in add_query_key(g):
        g.output(g.op("RotaryEmbedding", x, *tables), f"{x}_out")
    result = rotary_export.fuse(g.model())
    onnx.save(result.model, tmp_path / "model.onnx")
    assert find_max_positions(read_model(tmp_path / "model.onnx")) == 40
    bundle = write_fused_bundle(result, tmp_path / "b")
    rows = bench_bundle(bundle.path, [(1, 4096)], seconds=0.01).rows
    assert {row.seq_len for row in rows} == {40}


def describe(*shapes: tuple[str, tuple[int | str, ...]]) -> list[TensorInfo]:
    return [TensorInfo(name, "int64", shape) for name, shape in shapes]


NAMED = {
    "optimum": (
        describe(
            ("input_ids", ("batch_size", "sequence_length")),
            ("attention_mask", ("batch_size", "past_sequence_length + sequence_length")),
            ("past_key_values.0.key", ("batch_size", 2, "past_sequence_length", 16)),
        ),
        {
            "batch_size": BATCH, "sequence_length": SEQ, "past_sequence_length": PAST,
            "past_sequence_length + sequence_length": TOTAL,
        },
    ),
    "genai": (
        describe(
            ("input_ids", ("batch_size", "sequence_length")),
            ("attention_mask", ("batch_size", "total_sequence_length")),
            ("past_key_values.0.key", ("batch_size", 2, "past_sequence_length", "kv_cache_dim")),
        ),
        {
            "batch_size": BATCH, "sequence_length": SEQ, "past_sequence_length": PAST,
            "total_sequence_length": TOTAL,
        },
    ),
    "generated": (
        describe(("input_ids", ("s0", "s1")), ("attention_mask", ("s0", "s64"))),
        {"s0": BATCH, "s1": SEQ, "s64": SEQ},
    ),
    "two-lengths": (
        describe(("encoder_ids", ("b", "encoder_seq")), ("decoder_ids", ("b", "decoder_seq"))),
        {"b": BATCH, "encoder_seq": SEQ},
    ),
    "fixed": (describe(("ids", (1, 8))), {}),
}  # fmt: skip


@pytest.mark.parametrize(("infos", "names"), NAMED.values(), ids=NAMED)
def test_sizes_have_the_names_of_a_manifest(infos, names):
    assert name_dims(infos) == names


def test_an_output_of_unknown_rank_is_found_out_by_the_runtime(tmp_path):
    g = Graph()
    half(g)
    g.output(g.op("Gelu", "query", domain="com.microsoft"), "gelu")
    result = rotary_export.fuse(g.model())
    bundle = write_fused_bundle(result, tmp_path / "b")
    feeds = make_feeds(2, 5)
    outputs = rotary_export.load(bundle, "model")(**feeds)
    assert outputs["gelu"].shape == (2, 4, 5, H)


def change_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def change_text(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING


def change_nodes(model: onnx.ModelProto) -> None:
    del model.graph.node[:]


BAD = {
    "rank": (change_input, "the input position_ids must be a tensor of known rank"),
    "text": (change_text, "position_ids must be a tensor of numbers"),
    "nodes": (change_nodes, "is not an ONNX model: it has no ai.onnx opset or no nodes"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_file_that_can_t_be_described_is_one_clear_error(tmp_path, change, message):
    model = make_model()
    change(model)
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(RotaryExportError, match=message):
        read_onnx_file(tmp_path / "in.onnx")


def test_weights_that_are_inputs_are_not_asked_for(tmp_path):
    model = make_model()
    stored = model.graph.initializer[0]
    dims = list(numpy_helper.to_array(stored).shape)
    model.graph.input.append(
        onnx.helper.make_tensor_value_info(stored.name, stored.data_type, dims)
    )
    onnx.save(model, tmp_path / "in.onnx")
    inputs = read_onnx_file(tmp_path / "in.onnx").graphs["model"].inputs
    assert [info.name for info in inputs] == ["position_ids", "query", "key"]


def test_tables_that_are_inputs_stay_as_they_are(tmp_path):
    text = """<ir_version: 8, opset_import: ["": 18]>
    turn (float[batch, seq, 8] x, float[batch, seq, 8] cos) => (float[batch, seq, 8] y) {
        y = Mul(x, cos)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    values = read_input_values(describe_file(tmp_path / "m.onnx").config["input_values"])
    assert (values["x"].role, values["cos"].role) == ("values", "rows")
