"""Files in and out of `fuse`: safe writing, external data, bad input, the command line."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from helpers.fuse_graphs import Graph, H, add_query_key, find_rotary, half, make_feeds, run
from onnx import TensorProto, numpy_helper

import rotary_export
from rotary_export.cli.main import cli
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.fusion import fuse as fuse_module
from rotary_export.fusion.check import feeds, runs
from rotary_export.runtime.onnx_file import check_locations


def make_model(weights: int = 0) -> onnx.ModelProto:
    g = Graph()
    half(g)
    if weights:
        big = g.const(np.random.default_rng(0).normal(size=(H, weights)).astype("f"))
        g.output(g.op("MatMul", g.op("Identity", "query"), big), "wide")
    return g.model()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "in.onnx"
    onnx.save(make_model(), path)
    return path


def list_names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- writing


def test_the_command_writes_a_file_that_runs_with_and_without_the_library(file, tmp_path):
    before = file.read_bytes()
    result = CliRunner().invoke(cli, ["fuse", str(file), str(tmp_path / "out.onnx")])
    assert result.exit_code == 0, result.output
    assert "2      primitives, half" in result.stdout
    assert "out.onnx: fused 2 rotary calls into 1 nodes; not replaced: 0" in result.stdout
    assert list_names(tmp_path) == {"in.onnx", "out.onnx"}
    assert file.read_bytes() == before
    fused = onnx.load(tmp_path / "out.onnx")
    case = make_feeds(3, 7)
    for got, want in zip(run(fused, case), run(onnx.load(file), case), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_the_command_prints_json(file, tmp_path):
    out = str(tmp_path / "out.onnx")
    options = ["--json", "--shape", "2", "3", "0"]
    result = CliRunner().invoke(cli, ["fuse", str(file), out, *options])
    report = json.loads(result.stdout)
    assert (report["calls_fused"], report["nodes"], report["calls_not_replaced"]) == (2, 1, 0)
    assert {(r["batch"], r["length"], r["past"]) for r in report["compared"]} == {(2, 3, 0)}


def test_a_file_is_replaced_only_if_asked_for(file, tmp_path):
    out = tmp_path / "out.onnx"
    out.write_text("mine")
    result = CliRunner().invoke(cli, ["fuse", str(file), str(out)])
    assert (result.exit_code, out.read_text()) == (2, "mine")
    assert result.stderr.endswith("out.onnx exists; force=True (--force) replaces it\n")
    assert CliRunner().invoke(cli, ["fuse", str(file), str(out), "--force"]).exit_code == 0
    assert len(find_rotary(onnx.load(out))) == 1


def test_the_input_is_never_replaced(tmp_path):
    source, data = tmp_path / "in.onnx", tmp_path / "out.onnx.data"
    save_external(source, data.name)
    (tmp_path / "link.onnx").symlink_to(source)
    before = source.read_bytes(), data.read_bytes()
    (tmp_path / "hard.onnx").hardlink_to(source)
    result = rotary_export.fuse(source)
    for out, message in (
        ("in.onnx", "in.onnx is read from: the input is never replaced"),
        ("hard.onnx", "hard.onnx is read from: the input is never replaced"),
        (data.name, "out.onnx.data is read from: the input is never replaced"),
        ("link.onnx", "link.onnx is a symbolic link to .*in.onnx, which is not replaced"),
    ):
        with pytest.raises(RotaryExportError, match=message):
            result.save(tmp_path / out, force=True)
        command = ["fuse", str(source), str(tmp_path / out), "--force"]
        assert CliRunner().invoke(cli, command).exit_code == 2
    assert (source.read_bytes(), data.read_bytes()) == before
    assert list_names(tmp_path) == {"in.onnx", "link.onnx", "hard.onnx", "out.onnx.data"}


def test_data_that_the_input_reads_too_is_kept(tmp_path):
    """`out.onnx` is a copy of the input: both name `out.onnx.data`."""
    source, out, data = (tmp_path / name for name in ("in.onnx", "out.onnx", "out.onnx.data"))
    save_external(source, data.name)
    out.write_bytes(source.read_bytes())
    before = source.read_bytes(), data.read_bytes()
    rotary_export.fuse(source).save(out, force=True)
    assert (source.read_bytes(), data.read_bytes()) == before
    (new,) = list_names(tmp_path) - {"in.onnx", "out.onnx", "out.onnx.data"}
    rotary_export.fuse(source).save(out, force=True)
    assert list_names(tmp_path) == {"in.onnx", "out.onnx", "out.onnx.data", new}


def test_what_can_t_be_written_leaves_nothing(file, tmp_path):
    result = rotary_export.fuse(file)
    for out, message in (
        (tmp_path / "no" / "out.onnx", "can't be written: No such file or directory"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(RotaryExportError, match=message):
            result.save(out, force=True)
    assert list_names(tmp_path) == {"in.onnx"}


# ---- external data


def save_external(path, location="weights.bin") -> None:
    onnx.save(
        make_model(4096), path, save_as_external_data=True, location=location,
        size_threshold=1024,
    )  # fmt: skip


def test_external_data_is_read_and_written_as_such(tmp_path):
    source, out = tmp_path / "a" / "in.onnx", tmp_path / "b" / "out.onnx"
    source.parent.mkdir()
    out.parent.mkdir()
    save_external(source)
    data = (source.parent / "weights.bin").read_bytes()
    result = rotary_export.fuse(source)
    assert result.folder == source.parent
    assert len(result.model.SerializeToString()) < 30_000
    result.save(out)
    (written,) = list_names(out.parent) - {"out.onnx"}
    digest = hashlib.sha256((out.parent / written).read_bytes()).hexdigest()
    assert written == f"out.onnx.{digest[:16]}.data"
    assert (source.parent / "weights.bin").read_bytes() == data
    case = make_feeds(2, 5)
    for got, want in zip(run(onnx.load(out), case), run(onnx.load(source), case), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_a_file_with_external_data_is_replaced_at_once(tmp_path, monkeypatch):
    """A graph beside another's data would load, and be the values of neither model."""
    sources, out = [tmp_path / f"in{i}.onnx" for i in range(2)], tmp_path / "out.onnx"
    for source, scale in zip(sources, (1, 2), strict=True):
        model = make_model(4096)
        big = model.graph.initializer[-1]
        big.CopyFrom(numpy_helper.from_array(scale * numpy_helper.to_array(big), big.name))
        onnx.save(
            model, source, save_as_external_data=True, location=f"{source.name}.bin",
            size_threshold=1024,
        )  # fmt: skip
    results = [rotary_export.fuse(source) for source in sources]
    results[0].save(out)
    case = make_feeds(2, 5)
    old, new = (run(onnx.load(source), case)[-1] for source in sources)
    moved = []

    def stop_at_the_graph(source, target):
        if Path(target).parent == tmp_path:
            moved.append(Path(target).name)
        if Path(target) == out:
            raise KeyboardInterrupt
        return replaced(source, target)

    replaced = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_graph)
        with pytest.raises(KeyboardInterrupt):
            results[1].save(out, force=True)
    assert len(moved) == 2
    assert moved[1] == "out.onnx"
    assert not (tmp_path / moved[0]).exists()
    np.testing.assert_allclose(run(onnx.load(out), case)[-1], old, rtol=0, atol=2e-5)
    for result, want in ((results[1], new), (results[0], old)):
        result.save(out, force=True)
        np.testing.assert_allclose(run(onnx.load(out), case)[-1], want, rtol=0, atol=4e-5)
        assert len([name for name in list_names(tmp_path) if name.startswith("out.onnx.")]) == 1


@pytest.mark.parametrize("name", ["x" * 250 + ".onnx", "\N{SNOWMAN}" * 83 + ".onnx", "data"])
def test_names_may_be_as_long_as_the_system_allows(tmp_path, name):
    source, out = tmp_path / "in.onnx", tmp_path / name
    save_external(source)
    for _ in range(2):
        rotary_export.fuse(source).save(out, force=True)
        assert len(list_names(tmp_path)) == 4
    run(onnx.load(out), make_feeds(2, 5))


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_external_data_must_be_there(tmp_path, damage):
    save_external(tmp_path / "in.onnx")
    if damage == "missing":
        (tmp_path / "weights.bin").unlink()
    else:
        os.truncate(tmp_path / "weights.bin", 100)
    words = {"missing": "is missing", "short": "is cut off"}[damage]
    result = CliRunner().invoke(cli, ["fuse", str(tmp_path / "in.onnx"), str(tmp_path / "o.onnx")])
    assert result.exit_code == 2
    assert f"the external data of {tmp_path / 'in.onnx'} {words}" in result.stderr
    assert result.stderr.count("\n") == len(result.stderr.splitlines())
    assert not (tmp_path / "o.onnx").exists()


def test_a_proto_without_its_data_is_refused(tmp_path):
    save_external(tmp_path / "in.onnx")
    proto = onnx.load(tmp_path / "in.onnx", load_external_data=False)
    with pytest.raises(RotaryExportError, match="which a ModelProto does not locate: pass its"):
        rotary_export.fuse(proto)


def test_large_weights_are_mapped_while_the_model_is_run(monkeypatch):
    folders = []

    def look(model, folder, library):
        folders.append(folder)
        assert not any(t.raw_data and len(t.raw_data) > 1024 for t in model.graph.initializer)
        return opened(model, folder, library)

    opened = runs._open
    monkeypatch.setattr(runs, "_open", look)
    monkeypatch.setattr(fuse_module, "LARGE", 2**10)
    model = make_model(4096)
    result = rotary_export.fuse(model)
    assert None not in folders
    assert not folders[0].exists()
    assert result.folder is None
    sizes = {len(numpy_helper.to_array(t).tobytes()) for t in result.model.graph.initializer}
    assert H * 4096 * 4 in sizes


@pytest.mark.parametrize("threshold", [0, 64])
def test_small_tensors_of_external_data_are_read(tmp_path, threshold):
    """Sizes and slices among them: a shape that they give is not known otherwise."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(
        make_model(64), source, save_as_external_data=True, location="all.bin",
        size_threshold=threshold,
    )  # fmt: skip
    result = rotary_export.fuse(source)
    assert (len(result.fused), result.why) == (2, ())
    assert {path.name for path in result.sources} == {"in.onnx", "all.bin"}
    result.save(out)
    case = make_feeds(2, 5)
    for got, want in zip(run(onnx.load(out), case), run(onnx.load(source), case), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_data_of_which_all_is_small_is_never_replaced(tmp_path):
    onnx.save(
        make_model(), tmp_path / "in.onnx", save_as_external_data=True, location="out.onnx",
        size_threshold=0,
    )  # fmt: skip
    before = (tmp_path / "out.onnx").read_bytes()
    with pytest.raises(RotaryExportError, match="is read from: the input is never replaced"):
        rotary_export.fuse(tmp_path / "in.onnx").save(tmp_path / "out.onnx", force=True)
    assert (tmp_path / "out.onnx").read_bytes() == before


def test_a_small_tensor_of_a_constant_node_is_read(tmp_path):
    model = make_model()
    (tmp_path / "all.bin").write_bytes(b"")
    for tensor in list(model.graph.initializer):
        node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        model.graph.node.insert(0, node)
    del model.graph.initializer[:]
    onnx.save(
        model, tmp_path / "in.onnx", save_as_external_data=True, location="all.bin",
        size_threshold=0, convert_attribute=True,
    )  # fmt: skip
    assert len(rotary_export.fuse(tmp_path / "in.onnx").fused) == 2


# ---- what ONNX Runtime runs and saves


def reverse_nodes(graph: onnx.GraphProto) -> None:
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(reversed(nodes))


def test_nodes_in_any_order_are_read():
    model, shuffled = make_model(), make_model()
    reverse_nodes(shuffled.graph)
    result = rotary_export.fuse(shuffled)
    assert len(result.fused) == 2
    case = make_feeds(2, 5)
    for got, want in zip(run(result.model, case), run(model, case), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_a_branch_that_reads_what_a_later_node_computes_is_read():
    g = Graph()
    half(g)
    g.output(g.op("Tanh", "query"), "before")
    model = g.model()
    branches = [
        onnx.helper.make_graph(
            [onnx.helper.make_node(op, [model.graph.output[0].name], [f"{name}_out"])],
            name, [], [onnx.helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)],
        )
        for name, op in (("first", "Abs"), ("second", "Exp"))
    ]  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    model.graph.node.insert(
        0,
        onnx.helper.make_node(
            "If", ["flag"], ["chosen"], then_branch=branches[0], else_branch=branches[1]
        ),
    )
    model.graph.output.append(onnx.helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None))
    result = rotary_export.fuse(model)
    case = make_feeds(2, 5)
    got, want = run(result.model, case), run(model, case)
    np.testing.assert_allclose(got[-1], want[-1], rtol=0, atol=2e-6)
    np.testing.assert_allclose(got[-1], np.abs(got[0]), rtol=0, atol=0)


def test_a_file_that_onnx_runtime_saved_with_the_op_library_is_read(tmp_path):
    """ONNX Runtime then writes version 1000 for the domain, although no node is of it."""
    model, saved = make_model(), tmp_path / "saved.onnx"
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(saved)
    options.register_custom_ops_library(str(rotary_export.runtime.op_library_path()))
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    versions = {o.domain: o.version for o in onnx.load(saved).opset_import}
    assert versions["rotary_export"] == 1000
    result = rotary_export.fuse(saved)
    assert len(result.fused) == 2
    versions = {o.domain: o.version for o in result.model.opset_import}
    assert versions["rotary_export"] == 1
    case = make_feeds(2, 5)
    for got, want in zip(run(result.model, case), run(model, case), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


# ---- bad input


def damage_opset(model):
    model.opset_import[0].version = 99


def damage_ir(model):
    model.ir_version = 99


def damage_old(model):
    model.opset_import[0].version = 17


def damage_nodes(model):
    del model.graph.node[:]


def damage_version(model):
    model.opset_import.append(onnx.helper.make_opsetid("rotary_export", 7))


def damage_twice(model):
    model.graph.node.append(model.graph.node[0])


def damage_input(model):
    model.graph.node[0].input[0] = "nobody"


def damage_type(model):
    model.graph.initializer[0].data_type = 99


def damage_branch(model):
    branch = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["nobody"], ["x"])], "b", [], [])
    model.graph.node.append(
        onnx.helper.make_node("If", ["query"], [], then_branch=branch, else_branch=branch)
    )


def damage_cycle(model):
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def damage_attribute(model):
    node = model.graph.node[0]
    node.CopyFrom(onnx.helper.make_node("Transpose", node.input[:1], node.output, perm="long"))


BAD = {
    "newer-opset": (damage_opset, r"opset 99 and IR version 10; the installed onnx .* supports"),
    "newer-ir": (damage_ir, r"has opset 18 and IR version 99; the installed onnx"),
    "older-opset": (damage_old, r"has opset 17, it must be >= 18: onnx.version_converter raises"),
    "newer-op": (damage_version, r"has version 7 of rotary_export, this release supports up to 1"),
    "twice": (damage_twice, r"the model is damaged: ValueError: Output .* is redeclared"),
    "dangling": (damage_input, r"is damaged: no node computes nobody, an input of Unsqueeze"),
    "no-type": (damage_type, r"the model is damaged: ValueError: 99 is not a valid DataType"),
    "in-branch": (damage_branch, r"is damaged: no node computes nobody, an input of If"),
    "cycle": (damage_cycle, r"the model is damaged: its nodes form a cycle"),
    "attribute": (damage_attribute, r"the model can't be fused: TypeError: .*perm"),
    "no-nodes": (damage_nodes, r"is not an ONNX model: it has no ai.onnx opset or no nodes"),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_a_model_that_can_t_be_fused_is_an_error_with_the_reason(damage, message):
    model = make_model()
    damage(model)
    with pytest.raises(RotaryExportError, match=message):
        rotary_export.fuse(model)


ARGUMENTS = {
    "model": (lambda: rotary_export.fuse(b"model"), "model must be an onnx.ModelProto or a path"),
    "no-shapes": (lambda: rotary_export.fuse(make_model(), shapes=[]), "at least one shape"),
    "two-sizes": (lambda: rotary_export.fuse(make_model(), shapes=[(1, 2)]), r"got \(1, 2\)"),
    "negative": (lambda: rotary_export.fuse(make_model(), shapes=[(1, 2, -1)]), r"got \(1, 2, -1"),
    "inputs": (lambda: rotary_export.fuse(make_model(), inputs={"x": 1}), "a sequence of dicts"),
    "long-name": (lambda: rotary_export.fuse(make_model()).save("a" * 300), "can't be written"),
}


@pytest.mark.parametrize(("call", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_arguments_are_one_clear_error(call, message):
    with pytest.raises(RotaryExportError, match=message):
        call()


def test_data_of_constants_is_not_replaced_either(tmp_path):
    save_external(tmp_path / "in.onnx")
    model = onnx.load(tmp_path / "in.onnx", load_external_data=False)
    tensor = numpy_helper.from_array(np.ones(4096, "f"), "apart")
    onnx.external_data_helper.set_external_data(tensor, "out.onnx.data", offset=0, length=4 * 4096)
    tensor.ClearField("raw_data")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["unused"], value=tensor))
    onnx.save(model, tmp_path / "in.onnx")
    (tmp_path / "out.onnx.data").write_bytes(np.ones(4096, "f").tobytes())
    source = fuse_module.read_model(tmp_path / "in.onnx")
    names = {path.name for path in fuse_module.list_files(tmp_path / "in.onnx", source)}
    assert names == {"in.onnx", "weights.bin", "out.onnx.data"}


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_an_unreadable_file_is_one_line(tmp_path, content):
    file = tmp_path / "in.onnx"
    if content is not None:
        file.write_bytes(content)
    result = CliRunner().invoke(cli, ["fuse", str(file), str(tmp_path / "out.onnx")])
    assert result.exit_code == 2
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("rotary-export: ")
    assert str(file) in message
    assert not (tmp_path / "out.onnx").exists()


def test_a_model_without_rotary_is_exit_code_1(tmp_path):
    g = Graph()
    query, _ = add_query_key(g)
    g.output(g.op("Tanh", query), "out")
    onnx.save(g.model(), tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    result = CliRunner().invoke(cli, ["fuse", str(tmp_path / "in.onnx"), str(out), "--json"])
    assert result.exit_code == 1
    assert "the model has no rotary embedding" in json.loads(result.stdout)["error"]
    assert not out.exists()


def test_fusing_twice_is_an_error(file):
    result = rotary_export.fuse(file)
    with pytest.raises(CheckFailedError, match="is fused already: 1 node"):
        rotary_export.fuse(result.model)


def test_a_model_that_never_runs_is_not_fused():
    g = Graph()
    half(g)
    g.output(g.op("NoSuchOp", "query", domain="com.microsoft"), "bad")
    with pytest.raises(RotaryExportError, match="can't be verified, it runs at no shape"):
        rotary_export.fuse(g.model())


# ---- inputs


def test_inputs_mean_something_to_a_decoder():
    g = Graph()
    ids = g.input("input_ids", ["batch_size", "sequence_length"], TensorProto.INT64)
    mask = g.input("attention_mask", ["batch_size", "past_sequence_length + sequence_length"], 7)
    position = g.input("position_ids", ["batch_size", "sequence_length"], TensorProto.INT64)
    past = g.input("past_key_values.0.key", ["batch_size", 2, "past_sequence_length", H])
    flag = g.input("use_cache", [1], TensorProto.BOOL)
    table = g.const(np.zeros((11, 4), "f"))
    g.output(g.op("Gather", table, ids), "out")
    for name in (mask, position, past, flag):
        g.output(name, f"{name}_out")
    model = fuse_module.read_model(g.model())
    made = feeds.make_feeds(model.graph, feeds.Shape(3, 4, 5))
    assert made["input_ids"].shape == (3, 4)
    assert made["input_ids"].max() < 11
    assert made["attention_mask"].shape == (3, 9)
    assert made["attention_mask"].all()
    np.testing.assert_array_equal(made["position_ids"][1], [5, 6, 7, 8])
    assert made["past_key_values.0.key"].shape == (3, 2, 5, H)
    assert made["use_cache"].all()


def test_given_inputs_are_used():
    case = {"position_ids": np.array([[0, 1, 2, 39]])}
    result = rotary_export.fuse(make_model(), shapes=[(1, 4, 0)], inputs=[case])
    assert {row.shape.length for row in result.check.comparisons} == {4}


@pytest.mark.parametrize("location", ["../outside.bin", "x/../../outside.bin", "/outside.bin"])
def test_external_data_outside_the_folder_is_refused(tmp_path, location):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_external(folder / "in.onnx", "outside.bin")
    (folder / "outside.bin").rename(tmp_path / "outside.bin")
    model = onnx.load(folder / "in.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    message = f"must be in its folder, got the location {location!r}"
    with pytest.raises(RotaryExportError, match=re.escape(message)):
        rotary_export.fuse(folder / "in.onnx")
    with pytest.raises(RotaryExportError, match=re.escape(message)):
        check_locations(model, "in.onnx")
