"""The proof: complete on a good bundle, and a wrong bundle does not pass it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from helpers.bundles import (
    SPECS,
    copy_bundle,
    edit_manifest,
    get_bundle,
    make_rope,
    update_hash,
)
from onnx import helper, numpy_helper

from rotary_export import RotaryExportError, export, package, verify
from rotary_export.errors import CheckFailedError
from rotary_export.graphs.config import read_config
from rotary_export.graphs.graph import make_graphs
from rotary_export.op import library as op_library
from rotary_export.proof.comparison import Error
from rotary_export.proof.plain import make_cases
from rotary_export.proof.tolerances import TOLERANCES
from rotary_export.rope import ScaledRotaryEmbedding
from rotary_export.rope.types.dynamic import Dynamic

RUNTIMES = {
    "eager": "eager",
    "TorchScript": "torchscript",
    "torch.export": "program",
    "ONNX Runtime, op library": "onnx",
    "ONNX Runtime, function body": "onnx",
    "onnx.reference": "onnx",
}


# ---- a good bundle


@pytest.mark.parametrize("name", SPECS)
def test_every_runtime_runs_every_output_of_every_graph(name):
    bundle = get_bundle(name)
    ran = {(row.graph, row.output, row.runtime) for row in bundle.report.rows}
    for graph, info in bundle.manifest.graphs.items():
        for output in info.outputs:
            for runtime, kind in RUNTIMES.items():
                # `tables` has no rotary node, so the op library has no part in it.
                present = kind in info.files or runtime == "eager"
                if "library" in runtime:
                    present = present and graph == "rotate"
                assert ((graph, output.name, runtime) in ran) == present, (graph, runtime)
    assert bundle.report.passed
    assert bundle.report.skipped == {}


@pytest.mark.parametrize("name", SPECS)
def test_what_must_be_exact_is_held_to_be_exact(name):
    rows = {(row.graph, row.output, row.runtime): row for row in get_bundle(name).report.rows}
    for (graph, output, runtime), row in rows.items():
        native = row.kernel_path == "native"
        ort_scale = output == "scale" and runtime.startswith(("ONNX Runtime", "onnx"))
        assert (row.eager_tolerance == "exact") == (not native and not ort_scale)
        if row.eager_tolerance == "exact":
            assert row.eager == Error(), (graph, output, runtime)
        if ort_scale:
            assert row.eager.max_ulp <= 2
    assert ("rotate", "key_out", "ONNX Runtime, function body") in rows


def test_shapes_are_others_than_the_traced_and_the_edges():
    shapes = get_bundle("plain").report.shapes
    assert shapes["tables"] == [f"seq_len {n}" for n in (0, 1, 2, 17, 31, 32)]
    assert shapes["rotate"] == [
        f"query {s}" for s in ("1x1x1x24", "3x7x7x24", "2x3x17x24", "1x2x32x24")
    ]
    assert get_bundle("static").report.shapes["rotate"] == shapes["tables"]


def test_the_last_rows_of_a_long_table_are_tried():
    config = read_config(get_bundle("plain").manifest.config)
    config = replace(config, max_seq_len=2**20)
    _, graph = make_graphs(config, make_rope("plain").state_dict())
    for case in make_cases(graph, 2**20):
        assert case[0].numel() <= 2**24
    assert int(case[2].max()) == 2**20 - 1


def test_every_tolerance_is_used_and_has_a_reason(tmp_path):
    rows = [row for name in SPECS for row in get_bundle(name).report.rows]
    dynamic = ScaledRotaryEmbedding(
        Dynamic(base=100.0, head_dim=8, dim=8, max_position_embeddings=4, factor=3.0)
    )
    rows += export(dynamic, tmp_path / "b", formats=("onnx",)).report.rows
    used = {key for row in rows for key in (row.eager_tolerance, row.oracle_tolerance)}
    of_models = {"model", "model-half", "far-tables"}  # tests/models/exports/test_export_model.py
    of_targets = {"bf16-truncated"}  # tests/helpers/inline_runs.py
    of_fused = {"fused", "fused-half"}  # tests/fusion/test_check.py
    assert used | of_models | of_targets | of_fused == set(TOLERANCES)
    for name, tolerance in TOLERANCES.items():
        assert tolerance.reason
        largest = 256 if name in of_fused else 16 if name in of_models else 10
        assert tolerance.max_ulp <= largest


# ---- a wrong bundle


def edit_onnx(bundle, file, change):
    """Change a graph, and the hash in the manifest with it."""
    model = onnx.load(bundle / file)
    change(model)
    onnx.save(model, bundle / file)
    update_hash(bundle, file)


def edit_table(name, change):
    def edit(model):
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        table = numpy_helper.to_array(tensor).copy()
        change(table)
        tensor.CopyFrom(numpy_helper.from_array(table, name))

    return edit


def find_node(nodes, op_type):
    return next(node for node in nodes if node.op_type == op_type)


def add_one_ulp(table):
    table[20, 3] = np.nextafter(table[20, 3], np.float32(9))


def swap_two_rows(table):
    table[[4, 5]] = table[[5, 4]]


def shift_rows(table):
    table[1:] = table[:-1].copy()


def enlarge(table):
    table *= np.float32(1.01)


def move_centre(model):
    """positions - center becomes positions - (center + 1)."""
    sub = find_node(model.graph.node, "Sub")
    index = list(model.graph.node).index(sub)
    one = next(t.name for t in model.graph.initializer if t.data_type == 7 and to_int(t) == 1)
    model.graph.node.insert(index, helper.make_node("Add", [sub.input[1], one], ["moved"]))
    find_node(model.graph.node, "Sub").input[1] = "moved"


def to_int(tensor):
    array = numpy_helper.to_array(tensor)
    return int(array) if array.ndim == 0 else None


def bake_length(model):
    """The graph computes what it was traced at, whatever seq_len is."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(5), "baked"))
    find_node(model.graph.node, "Less").input[1] = "baked"


def swap_tables(model):
    """freqs and scale, which have one shape."""
    names = {"freqs": "scale", "scale": "freqs"}
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]


def change_layout(model):
    node = find_node(model.graph.node, "RotaryEmbedding")
    node.attribute.append(helper.make_attribute("interleaved", 1))


def break_body(model):
    """The kernel stays right: only what runs without it is wrong."""
    node = find_node(model.functions[0].node, "RotaryEmbedding")
    node.input[1], node.input[2] = node.input[2], node.input[1]


ONNX = ("ONNX Runtime, op library", "ONNX Runtime, function body", "onnx.reference")
# bundle, file, change, the rows that fail: output and runtimes
WRONG = {
    "one ulp": (
        "plain", "rotate.onnx", edit_table("sin_cache", add_one_ulp), "sin_cache",
        ("stored (torchscript)", "stored (program)"),
    ),
    "two rows": (
        "opset18", "rotate.onnx", edit_table("cos_cache", swap_two_rows), "cos_cache",
        ("stored (onnx)",),
    ),
    "stored centre": (
        "opset18", "rotate.onnx", edit_table("scale_cache", shift_rows), "scale_cache",
        ("stored (onnx)",),
    ),
    "stored angles": (
        "plain", "tables.onnx", edit_table("inv_freq", enlarge), "freqs",
        ("TorchScript", "torch.export"),
    ),
    "centre": ("xpos", "tables.onnx", move_centre, "scale", ONNX[1:]),
    "length": ("plain", "tables.onnx", bake_length, "freqs", ONNX[1:]),
    "outputs": ("xpos", "tables.onnx", swap_tables, "freqs", ONNX[1:]),
    "layout": ("plain", "rotate.onnx", change_layout, "key_out", ONNX[::2]),
    "body": ("plain", "rotate.onnx", break_body, "query_out", ONNX[1:2]),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_bundle_is_caught(tmp_path, wrong):
    name, file, change, output, runtimes = WRONG[wrong]
    bundle = copy_bundle(name, tmp_path)
    edit_onnx(bundle, file, change)
    report = verify(bundle, allow_code=True)
    failed = [row.runtime for row in report.rows if not row.passed and row.output == output]
    assert set(runtimes) <= set(failed)
    if wrong == "body":
        assert len([row for row in report.rows if not row.passed]) == 1
    assert not report.passed
    assert report.to_dict()["passed"] is False


def test_swapped_query_and_key_do_not_even_run(tmp_path):
    bundle = copy_bundle("plain", tmp_path)

    def swap(model):
        model.graph.node[-1].output.reverse()

    edit_onnx(bundle, "rotate.onnx", swap)
    with pytest.raises(RotaryExportError, match="rotate"):
        verify(bundle)


def test_a_changed_file_is_not_run(tmp_path):
    bundle = copy_bundle("plain", tmp_path)
    (bundle / "tables.pt2").write_bytes(b"no")
    with pytest.raises(CheckFailedError, match=r"^tables\.pt2 in .* its sha256 differs"):
        verify(bundle)


def test_graphs_that_are_not_of_the_config_are_refused(tmp_path):
    bundle = copy_bundle("plain", tmp_path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    tables = {"tables": manifest["graphs"]["tables"]}
    edit_manifest(bundle, graphs=tables)
    with pytest.raises(RotaryExportError, match=r"^the manifest has no graph rotate$"):
        verify(bundle)
    edit_manifest(bundle, graphs={"rotate": tables["tables"]} | tables)
    with pytest.raises(RotaryExportError, match=r"graph 'rotate' is not of its config$"):
        verify(bundle)
    edit_manifest(bundle, graphs=manifest["graphs"], config=manifest["config"] | {"x": 1})
    with pytest.raises(RotaryExportError, match=r"config is damaged: .*'x'"):
        verify(bundle)


@pytest.mark.parametrize(("name", "value"), [("rotary_nodes", 2), ("function_body", "primitive")])
def test_rotary_nodes_are_those_of_the_file(tmp_path, name, value):
    bundle = copy_bundle("plain", tmp_path)
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]
    graphs["rotate"][name] = value
    edit_manifest(bundle, graphs=graphs)
    message = r"^rotate.onnx has 1 rotary nodes of native bodies, the manifest names "
    with pytest.raises(CheckFailedError, match=message):
        verify(bundle)


# ---- what is not here


def test_what_is_not_here_is_skipped_with_its_reason(monkeypatch):
    def refuse():
        raise RotaryExportError("no library")

    monkeypatch.setattr(op_library, "op_library_path", refuse)
    report = verify(get_bundle("opset18"))
    assert report.skipped == {"ONNX Runtime, op library": "no library"}
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = verify(get_bundle("opset18"))
    assert list(report.skipped) == ["ONNX Runtime, function body", "ONNX Runtime, op library"]
    assert all("ONNX Runtime is not installed" in why for why in report.skipped.values())
    ran = {row.runtime for row in report.rows}
    assert ran == {"formula", "stored (onnx)", "eager", "onnx.reference"}
    assert report.passed


def test_a_bundle_contains_why_a_way_was_skipped_without_a_folder_of_the_machine(
    monkeypatch, tmp_path
):
    folder = tmp_path / "of mine" / "rotary_export"
    monkeypatch.setattr(op_library, "package_folders", lambda: [folder])
    monkeypatch.setattr(package, "package_folders", lambda: [folder])
    export(make_rope("opset18"), tmp_path / "b", formats=("onnx",))
    text = (tmp_path / "b" / "manifest.json").read_text()
    (reason,) = json.loads(text)["parity"]["skipped"].values()
    assert reason.startswith("librotary_export.so must be beside the package's files, found none ")
    assert "in rotary_export; `pip install .`" in reason
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/usr/lib/libx.so: undefined symbol", "libx.so: undefined symbol"),
        ("found none in /a/b, /c/d; see (/e/f)", "found none in b, d; see (f)"),
        ("'/a b'", "'a b'"),
        ("float32/float64, 1/2, https://x.org/a/b", "float32/float64, 1/2, https://x.org/a/b"),
    ],
)
def test_folders_are_hidden(text, wanted):
    assert package.hide_folders(text) == wanted
