"""The function bodies: valid, inlined, overloaded; their signatures; what they refuse."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest
from helpers.cases import CASES, EDGES, LONG, PAIRWISE, Case, check_each, sweep
from helpers.function_bodies import (
    collect_onnx_cases,
    load_without_library,
    make_model,
    make_with_bodies,
    run_bound,
)
from helpers.oracles import assert_same_bits, assert_within
from onnx import ModelProto, TensorProto, helper

from rotary_export.errors import RotaryExportError
from rotary_export.op import spec
from rotary_export.op.onnx_function import add_functions
from rotary_export.op.onnx_schema import register_schema
from rotary_export.op.onnx_signature import read_signature

OPSETS = range(18, 26)
DOMAIN_AND_NAME = (spec.DOMAIN, spec.OP_TYPE)
F32 = Case(kv_heads=2, scaled=True)
# One of each type, ids shape and rank.
MIXED = [
    F32,
    replace(F32, interleaved=True),
    replace(F32, rotary_dim=4, scaled=False),
    Case(("float16", "float32"), flat=True, ids="offset", kv_heads=1),
    Case(("bfloat16", "bfloat16"), ids="shared"),
    Case(("float64", "float64"), interleaved=True, rotary_dim=4, ids="tables-shared", scaled=True),
]


def check(model: ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def check_run(case: Case, model: ModelProto) -> None:
    """Run and compare: a primitive body has eager's bits, ORT's own op is near the oracle."""
    inputs = case.make_inputs(3)
    outputs = run_bound(load_without_library(model), inputs)
    ops = {node.op_type for function in model.functions for node in function.node}
    want, expected = case.compute_eager(inputs), case.compute_expected(inputs)
    for got, eager, oracle in zip(outputs, want, expected, strict=True):
        assert_within(got, oracle, case.max_ulp)
        if spec.OP_TYPE not in ops:
            assert_same_bits(got, eager)


# ---- every body


@pytest.mark.parametrize("opset", OPSETS)
def test_every_body_is_valid(opset):
    """All cases at the first primitive and native opset; pairs of values at the others."""

    def check_case(case: Case) -> None:
        register_schema()
        for dynamic in (False, True):
            model = make_with_bodies(case, opset=opset, dynamic=dynamic)
            check(model)
            ops = [node.op_type for node in model.functions[0].node]
            native = opset >= 23 and case.types[0] != "float64"
            assert ops.count(spec.OP_TYPE) == native * (2 if case.kv_heads else 1)
            assert len(model.graph.node[0].output) == (2 if case.kv_heads else 1)

    check_each(CASES if opset in (18, 23) else PAIRWISE, check_case)


@sweep(LONG)
def test_more_positions_than_rows_is_a_limit_of_ort_s_own_op(case):
    check_run(case, make_with_bodies(case, opset=22))
    model = make_with_bodies(case, opset=23)
    if case.types[0] == "float64":
        check_run(case, model)
        return
    with pytest.raises(Exception, match="Updating cos_cache and sin_cache"):
        run_bound(load_without_library(model), case.make_inputs())


CHECK_ALL = """
import pathlib, sys, onnx
assert "rotary_export" not in sys.modules and not onnx.defs.has("RotaryEmbedding", "rotary_export")
paths = sorted(pathlib.Path(sys.argv[1]).iterdir())
for path in paths:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
print(len(paths))
"""


def test_every_body_is_valid_where_our_schema_is_not_registered(tmp_path: Path):
    for index, case in enumerate(CASES):
        onnx.save(make_with_bodies(case, opset=23 if index % 2 else 18), tmp_path / f"{index}.onnx")
    command = [sys.executable, "-P", "-c", CHECK_ALL, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == len(CASES)


# ---- inlining and overloads


@pytest.mark.parametrize("opset", [18, 23])
def test_the_inliner_and_ort_inline_the_same_computation(opset):
    def check_case(case: Case) -> None:
        model = make_with_bodies(case, opset=opset)
        inlined = onnx.inliner.inline_local_functions(model)
        assert not inlined.functions
        assert {node.domain for node in inlined.graph.node} <= {"", "ai.onnx"}
        check(inlined)
        inputs = case.make_inputs(3)
        got = run_bound(load_without_library(inlined), inputs)
        for y, want in zip(got, run_bound(load_without_library(model), inputs), strict=True):
            assert_same_bits(y, want)

    check_each(PAIRWISE + EDGES, check_case)


@pytest.mark.parametrize("opset", OPSETS)
def test_several_signatures_are_overloads_and_each_node_calls_its_own(opset):
    cases = [*MIXED, MIXED[0]]
    model = make_with_bodies(*cases, opset=opset)
    check(model)
    assert len(model.functions) == len(MIXED)
    overloads = [function.overload for function in model.functions]
    assert len(set(overloads)) == len(MIXED)
    assert [node.overload for node in model.graph.node] == [*overloads, overloads[0]]
    bodies = {b"".join(n.SerializeToString() for n in f.node) for f in model.functions}
    assert len(bodies) == len(MIXED)
    assert model.ir_version >= 10

    seeds = [case.make_inputs(seed) for seed, case in enumerate(cases)]
    feeds = {f"n{i}_{name}": x for i, inputs in enumerate(seeds) for name, x in inputs.items()}
    alone = [
        run_bound(load_without_library(make_with_bodies(case, opset=opset)), inputs)
        for case, inputs in zip(cases, seeds, strict=True)
    ]
    for one in (model, onnx.inliner.inline_local_functions(model)):
        outputs = run_bound(load_without_library(one), feeds)
        for got, want in zip(outputs, itertools.chain(*alone), strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("opset", OPSETS)
def test_one_signature_has_no_overload_and_the_lowest_ir_version(opset):
    model = make_with_bodies(F32, F32, opset=opset)
    assert [function.overload for function in model.functions] == [""]
    assert [node.overload for node in model.graph.node] == ["", ""]
    lowest = helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
    assert model.ir_version == max(lowest, 8)  # model-local functions came with 8


def test_onnx_s_own_cases_run_on_the_bodies():
    cases = collect_onnx_cases()
    assert len(cases) == 8
    for case in cases:
        model = case.model
        model.graph.node[0].domain = spec.DOMAIN
        model.opset_import.append(helper.make_opsetid(spec.DOMAIN, spec.OP_VERSION))
        add_functions(model)
        for inputs, (want, *_) in case.data_sets:
            feeds = zip((i.name for i in model.graph.input), inputs, strict=True)
            (y,) = load_without_library(model).run(None, dict(feeds))
            np.testing.assert_allclose(y, want, case.rtol, case.atol, err_msg=case.name)


# ---- ids outside the tables


@pytest.mark.parametrize("opset", [18, 23], ids=["primitive", "native"])
@pytest.mark.parametrize("x_type", ["float32", "float16", "float64"])
@pytest.mark.parametrize("bad", [-1, -(2**31), 9, 2**40])
@pytest.mark.parametrize("ids", ["per-batch", "shared", "offset"])
def test_ids_outside_the_tables_are_refused(opset, x_type, bad, ids):
    case = Case((x_type, "float32"), ids=ids, kv_heads=1)
    inputs = case.make_inputs()
    session = load_without_library(make_with_bodies(case, opset=opset))
    run_bound(session, inputs)
    inputs["position_ids"].view(-1)[-1] = bad
    with pytest.raises(Exception, match=r"position_ids value|indices element out of data bounds"):
        run_bound(session, inputs)


def test_an_offset_whose_rows_run_out_is_refused():
    for opset in (18, 23):
        session = load_without_library(make_with_bodies(Case(ids="offset"), opset=opset))
        inputs = Case(ids="offset").make_inputs()
        for offset in (4, 5):
            inputs["position_ids"][0] = offset
            if offset == 4:
                run_bound(session, inputs)
        with pytest.raises(Exception, match=r"position_ids value|out of data bounds"):
            run_bound(session, inputs)


# ---- what ORT optimises it to


@pytest.mark.parametrize("opset", [23, 24, 25])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "xpos"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [0, 4], ids=["full", "partial"])
def test_ort_s_optimised_graph_is_two_nodes(tmp_path, opset, scaled, interleaved, rotary_dim):
    case = Case(interleaved=interleaved, rotary_dim=rotary_dim, kv_heads=2, scaled=scaled)
    tables = ("cos_cache", "sin_cache", "scale_cache")
    file = str(tmp_path / "optimised.onnx")
    load_without_library(make_with_bodies(case, opset=opset, constants=tables), file)
    optimised = onnx.load(file)
    assert [node.op_type for node in optimised.graph.node] == [spec.OP_TYPE] * 2
    assert {node.domain for node in optimised.graph.node} <= {"", "ai.onnx"}


# ---- reading a node's signature

READ = {
    "same-symbol": (["b", 3, "s", 8], ["m", 4], ["b", "s"], ("per-batch", False)),
    "same-size": ([2, 3, 5, 8], [9, 4], [2, 5], ("per-batch", False)),
    "one": ([2, 3, 5, 8], [9, 4], [1, 5], ("shared", False)),
    "batch-one": ([1, 3, 5, 8], [9, 4], [1, 5], ("per-batch", False)),
    "unknown": ([None, 3, None, 8], [None, 4], [None, None], ("shared", False)),
    "other-symbol": (["b", 3, "s", 8], ["m", 4], ["c", "s"], ("shared", False)),
    "offset": (["b", 3, "s", 8], ["m", 4], [1], ("offset", False)),
    "tables": (["b", 3, "s", 8], ["b", "s", 4], None, ("none", False)),
    "tables-one": (["b", 3, "s", 8], [1, "s", 4], None, ("none", True)),
    "tables-unknown": ([None, 3, None, 8], [None, None, 4], None, ("none", True)),
}


@pytest.mark.parametrize(("x", "cos", "ids", "want"), READ.values(), ids=READ)
def test_the_signature_follows_from_the_known_shapes(x, cos, ids, want):
    shapes = {"X": x, "cos_cache": cos, "sin_cache": cos, "position_ids": ids}
    types = dict.fromkeys(shapes, TensorProto.FLOAT) | {"position_ids": TensorProto.INT64}
    given = {k: v for k, v in shapes.items() if v is not None}
    node = helper.make_node(spec.OP_TYPE, list(given), ["Y"], domain=spec.DOMAIN)
    values = {k: helper.make_tensor_value_info(k, types[k], v) for k, v in given.items()}
    signature = read_signature(node, values, 23)
    assert (signature.ids, signature.expand_tables) == want


@pytest.mark.parametrize("batch", [1, 2])
def test_ids_of_unknown_batch_size_may_have_both(batch):
    for opset in (18, 23):
        case = Case(ids="per-batch" if batch == 2 else "shared", kv_heads=1)
        model = make_model(case, opset=opset)
        for value in model.graph.input:
            if value.name == "position_ids":
                value.type.tensor_type.shape.dim[0].Clear()
        add_functions(model)
        check(model)
        check_run(case, model)


def test_types_and_sizes_that_the_body_requires_must_be_known():
    def read(x: list[int | str | None] | None, opset: int = 23) -> None:
        node = helper.make_node(
            spec.OP_TYPE, ["X", "c", "c"], ["Y"], domain=spec.DOMAIN, name="layer0"
        )
        values = {
            name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("X", x), ("c", [1, 5, 4]))
        }
        read_signature(node, values, opset)

    with pytest.raises(RotaryExportError, match=r"^layer0: type and shape of X are not known$"):
        read(None)
    with pytest.raises(
        RotaryExportError, match=r"^layer0: the last dimension of X and cos_cache must be known$"
    ):
        read(["b", 3, "s", None])
    with pytest.raises(RotaryExportError, match=r"^opset must be >= 18, got 17$"):
        read([1, 3, 5, 8], 17)


# ---- models with functions, subgraphs


def test_adding_bodies_twice_changes_nothing():
    model = make_with_bodies(*MIXED[:3])
    once = model.SerializeToString()
    add_functions(model)
    assert model.SerializeToString() == once


def test_other_functions_are_kept():
    model = make_model(F32)
    other = helper.make_function(
        "test", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])],
        [helper.make_opsetid("", 23)],
    )  # fmt: skip
    model.functions.append(other)
    add_functions(model)
    add_functions(model)
    assert [(f.domain, f.name) for f in model.functions] == [("test", "Twice"), DOMAIN_AND_NAME]


def test_nodes_in_subgraphs_have_bodies():
    """X is an outer value, tables are stored in the branches, the branches differ in signature."""
    inputs = F32.make_inputs()
    branches = []
    for name, interleaved in (("then", 0), ("else", 1)):
        stored = [
            onnx.numpy_helper.from_array(inputs[table].numpy(), f"{name}_{table}")
            for table in ("cos_cache", "sin_cache", "scale_cache")
        ]
        node = helper.make_node(
            spec.OP_TYPE,
            ["X", stored[0].name, stored[1].name, "position_ids", "key", stored[2].name],
            [f"{name}_Y", f"{name}_key"],
            domain=spec.DOMAIN,
            interleaved=interleaved,
        )
        outputs = [
            helper.make_tensor_value_info(out, TensorProto.FLOAT, list(inputs[like].shape))
            for out, like in zip(node.output, ("X", "key"), strict=True)
        ]
        branches.append(helper.make_graph([node], name, [], outputs, initializer=stored))
    model = make_model(F32)
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    kept = [v for v in model.graph.input if not v.name.endswith("_cache")]
    choice = helper.make_node(
        "If", ["flag"], ["Y", "key_out"], then_branch=branches[0], else_branch=branches[1]
    )
    graph = helper.make_graph([choice], "test", [*kept, flag], model.graph.output)
    model.graph.CopyFrom(graph)
    assert len(add_functions(model)) == 2
    check(model)
    session = load_without_library(model)
    for interleaved in (False, True):
        feeds = {v.name: inputs[v.name].numpy() for v in kept} | {"flag": np.array(not interleaved)}
        case = replace(F32, interleaved=interleaved)
        want = [y.numpy() for y in case.compute_eager(inputs)]
        for got, eager in zip(session.run(None, feeds), want, strict=True):
            np.testing.assert_allclose(got, eager, rtol=0, atol=1e-4)
