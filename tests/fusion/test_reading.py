"""Models that `fuse` reads, in any order of nodes, and those that it refuses with the reason."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers.fuse_graphs import (
    Graph,
    half,
    make_feeds,
    make_model,
    run,
)
from onnx import TensorProto, numpy_helper

import rotary_export
from rotary_export.errors import RotaryExportError


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
