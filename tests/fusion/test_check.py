"""The comparison of a model before and after: what it accepts, and what it must not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir.passes.common as common_passes
import pytest
from helpers.fuse_graphs import Graph, half, write_half
from onnx import TensorProto

import rotary_export
from rotary_export.errors import CheckFailedError
from rotary_export.fusion.check import compare, runs
from rotary_export.fusion.check.arithmetic import find_narrowest_types
from rotary_export.fusion.check.feeds import SHAPES
from rotary_export.fusion.normalize import normalize
from rotary_export.fusion.read import read_model
from rotary_export.runtime import ways

# Of the largest magnitude of an output; a limit that is raised must be raised here, too.
LIMITS = {
    "float64": (np.float64, 256, 2.0**-52),
    "float32": (np.float32, 256, 2.0**-23),
    "float16": (np.float16, 32, 2.0**-10),
    "bfloat16": (ml_dtypes.bfloat16, 32, 2.0**-7),
}


def compare_one(
    name: str, want: np.ndarray, got: np.ndarray, observed=(), narrowest=None
) -> compare.Comparison:
    shape = SHAPES[0]
    return compare._compare({name: want}, {name: got}, shape, "", "", observed, narrowest or {})


@pytest.mark.parametrize(("dtype", "limit", "ulp"), LIMITS.values(), ids=LIMITS)
def test_an_error_up_to_the_limit_is_equaland_no_further(dtype, limit, ulp):
    want = np.zeros((2, 3, 4), dtype)
    want[0, 0, 0] = 1
    for factor, passes in ((0.9, True), (1.1, False)):
        got = want.copy()
        got[1, 2, 3] = factor * limit * ulp
        row = compare_one("out", want, got)
        assert (row.passed, row.allowed) == (passes, limit)
        assert row.error.worst == (1, 2, 3)


@pytest.mark.parametrize("name", ["query_out", "observed"])
def test_what_is_observed_is_compared_by_its_own_magnitude(name):
    want = np.full((2, 3, 4), 1e-3, np.float32)
    want[0] = 1e3
    got = want.copy()
    got[1, 0, 0] *= 1.01
    assert compare_one(name, want, got, ["observed"]).passed == (name != "observed")


def test_integers_and_flags_must_be_equal():
    for want in (np.arange(6), np.array([True, False])):
        got = want.copy()
        assert compare_one("out", want, got).passed
        got[0] = not got[0]
        assert not compare_one("out", want, got).passed
        assert not compare_one("out", want, want[None]).passed


def test_another_shape_or_a_nan_does_not_pass():
    want = np.ones((2, 4), np.float32)
    assert not compare_one("out", want, want[:1]).passed
    got = want.copy()
    got[1, 1] = np.nan
    assert not compare_one("out", want, got).passed


def test_a_fused_model_that_does_not_run_is_an_error(monkeypatch):
    opened = runs._open

    def open_before(model, folder, library):
        if model.functions:
            raise RuntimeError("no kernel")
        return opened(model, folder, library)

    monkeypatch.setattr(runs, "_open", open_before)
    g = Graph()
    half(g)
    with pytest.raises(CheckFailedError, match=r"does not run at batch 1, length 7 .*: no kernel"):
        rotary_export.fuse(g.model())


def test_every_runtime_and_every_shape_is_compared():
    g = Graph()
    half(g)
    result = rotary_export.fuse(g.model())
    found = {(row.runtime, row.shape) for row in result.check.comparisons}
    names = ("ONNX Runtime, function body", "ONNX Runtime, op library")
    assert found == {(name, shape) for name in names for shape in SHAPES}
    assert {row.run_mode for row in result.check.comparisons} == {runs.AS_IT_IS}
    assert result.check.skipped == []


def test_an_op_library_that_is_not_available_is_said(monkeypatch):
    monkeypatch.setattr(ways, "library_refusal", lambda providers, wanted: "it is not built")
    g = Graph(23, TensorProto.FLOAT)
    half(g)
    result = rotary_export.fuse(g.model())
    assert {row.runtime for row in result.check.comparisons} == {"ONNX Runtime, function body"}
    assert result.check.skipped == ["ONNX Runtime, op library: it is not built"]


# ---- float32 outputs of float16 arithmetic


def test_outputs_are_judged_by_the_arithmetic_before_them():
    g = Graph()
    write_half(g)
    result = rotary_export.fuse(g.model())
    assert len(result.fused) == 2
    assert {row.allowed for row in result.check.comparisons} == {32.0}


def test_only_what_comes_after_a_rotary_call_is_judged_by_it():
    g = Graph()
    write_half(g)
    model = read_model(g.model())
    normalize(model)
    calls = [node.outputs[0].name for node in model.graph if node.op_type == "Add"]
    found = find_narrowest_types(model, calls)
    outputs = [value.name for value in model.graph.outputs]
    assert [found.get(name) for name in outputs] == ["float16", "float16", None]
    assert not any(found.get(each) for each in ("query", "position_ids"))


def test_the_type_inside_a_branch_counts():
    g = Graph()
    g.input("x", [2, 3])
    model = g.model()
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.FLOAT16),
        onnx.helper.make_node("Neg", ["narrow"], ["call"]),
        onnx.helper.make_node("Cast", ["call"], ["inner"], to=TensorProto.FLOAT),
    ]
    values = [onnx.helper.make_tensor_value_info("inner", TensorProto.FLOAT, [2, 3])]
    branch = onnx.helper.make_graph(nodes, "branch", [], values)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "flag"))
    model.graph.node.append(
        onnx.helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
    )
    model.graph.output.append(onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3]))
    source = read_model(model)
    common_passes.ShapeInferencePass()(source)
    assert find_narrowest_types(source, ["call"])["y"] == "float16"
    assert find_narrowest_types(source, []) == {}


def test_a_float32_output_of_float16_arithmetic_has_the_limit_of_float16():
    want = np.ones((2, 4), np.float32)
    for factor, passes in ((0.9, True), (1.1, False)):
        got = want.copy()
        got[1, 2] += factor * 32 * 2.0**-10
        assert compare_one("y", want, got, narrowest={"y": "float16"}).passed == passes
        assert not compare_one("y", want, got).passed
