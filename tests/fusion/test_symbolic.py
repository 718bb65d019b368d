"""What each handler makes of channels, held against ONNX Runtime; and shapes that are inferred."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from helpers.fuse_graphs import Graph, run
from onnx import TensorProto, helper
from onnxscript import ir

from rotary_export.fusion.symbolic.channels import Tracer
from rotary_export.fusion.symbolic.polynomials import (
    UnknownShapeError,
    add,
    format_polynomial,
    multiply,
    number,
    scale,
    symbol,
)
from rotary_export.fusion.symbolic.shapes import fill_shapes, read_sizes

DIMS = [2, 3, 8]  # of x, of which the last are channels
LAST = 2**63 - 1
STEPS = np.arange(1, 9, dtype="f")


def gather(g: Graph, x: str, indices: Any, axis: int) -> str:
    return g.op("Gather", x, g.const(np.array(indices)), axis=axis)


def cut(g: Graph, x: str, starts: list[int], ends: list[int], *more: list[int]) -> str:
    return g.op("Slice", x, *(g.ints(*bounds) for bounds in (starts, ends, *more)))


def split(g: Graph, x: str, sizes: list[int], axis: int, which: int) -> str:
    return g.op("Split", x, g.ints(*sizes), n=len(sizes), axis=axis)[which]


def join_turned(g: Graph, x: str) -> str:
    return g.join(g.op("Neg", g.cut(x, 4, 8)), g.cut(x, 0, 4))


# Each of x (2, 3, 8). All that they compute are sums of numbers times channels of x.
OPERATORS = {
    "identity": lambda g, x: g.op("Identity", x),
    "add": lambda g, x: g.op("Add", x, g.cut(x, 3, 4)),
    "add-number": lambda g, x: g.op("Add", x, g.const(STEPS)),
    "sub": lambda g, x: g.op("Sub", g.op("Mul", x, g.const(STEPS)), x),
    "mul": lambda g, x: g.op("Mul", g.const(STEPS), x),
    "neg": lambda g, x: g.op("Neg", x),
    "div": lambda g, x: g.op("Div", x, g.const(STEPS)),
    "cast": lambda g, x: g.op("Cast", x, to=TensorProto.DOUBLE),
    "slice": lambda g, x: cut(g, x, [2], [6], [2]),
    "slice-negative": lambda g, x: cut(g, x, [-3], [-1], [-1]),
    "slice-steps": lambda g, x: cut(g, x, [1], [LAST], [-1], [3]),
    "slice-two-axes": lambda g, x: cut(g, x, [1, 4], [3, 8], [1, 2]),
    "slice-no-axes": lambda g, x: cut(g, x, [1, 0, 5], [2, 2, 7]),
    "slice-rows": lambda g, x: cut(g, x, [1], [3], [1]),
    "split-first": lambda g, x: split(g, x, [3, 5], -1, 0),
    "split-second": lambda g, x: split(g, x, [3, 5], 2, 1),
    "split-rows": lambda g, x: split(g, x, [1, 2], -2, 1),
    "concat": join_turned,
    "concat-rows": lambda g, x: g.join(g.op("Neg", x), x, axis=-2),
    "gather": lambda g, x: gather(g, x, [7, 0, 3], -1),
    "gather-negative": lambda g, x: gather(g, x, [-1, -8], 2),
    "gather-one": lambda g, x: gather(g, x, 5, -1),
    "gather-2-d": lambda g, x: gather(g, x, [[0, 1], [6, 7]], 2),
    "gather-rows": lambda g, x: gather(g, x, [2, 0], 1),
    "reshape-pairs": lambda g, x: g.op("Reshape", x, g.ints(0, 0, 4, 2)),
    "reshape-merged": lambda g, x: g.op("Reshape", x, g.ints(2, -1)),
    "reshape-rows": lambda g, x: g.op("Reshape", x, g.ints(6, 8)),
    "reshape-swapped": lambda g, x: g.op("Reshape", x, g.ints(3, 2, 8)),
    "flatten": lambda g, x: g.op("Flatten", x, axis=2),
    "unsqueeze": lambda g, x: g.unsqueeze(x, -1),
    "squeeze": lambda g, x: g.op("Squeeze", g.unsqueeze(x, 1), g.ints(1)),
    "transpose-rows": lambda g, x: g.op("Transpose", x, perm=[1, 0, 2]),
    "transpose-channels": lambda g, x: g.op("Transpose", x, perm=[0, 2, 1]),
    "transpose-default": lambda g, x: g.op("Transpose", x),
    "expand": lambda g, x: g.op("Expand", g.unsqueeze(x, -1), g.ints(1, 1, 1, 3)),
    "expand-rows": lambda g, x: g.op("Expand", g.unsqueeze(x, 1), g.ints(1, 4, 1, 1)),
    "tile": lambda g, x: g.op("Tile", x, g.ints(1, 1, 2)),
}  # fmt: skip


def read(write, dims: list[Any] = DIMS) -> tuple[onnx.ModelProto, ir.Value, ir.Value]:
    """Return a model, its x, and what is computed of x, with inferred shapes."""
    g = Graph()
    x = g.op("Identity", g.input("x", dims))
    out = write(g, x)
    g.outputs.append(helper.make_empty_tensor_value_info(out))
    model = onnx.shape_inference.infer_shapes(g.model(), data_prop=True)
    found = ir.serde.deserialize_model(model)
    values = {value.name: value for node in found.graph for value in node.outputs}
    return model, values[x], values[out]


def evaluate(channel: Any, x: np.ndarray) -> float:
    """Evaluate a polynomial of channels of x and numbers."""
    total = 0.0
    for product, coefficient in channel:
        for item in product:
            assert item[0] == "source", item
            coefficient *= x.reshape(-1)[item[1]]
        total += coefficient
    return total


@pytest.mark.parametrize("write", OPERATORS.values(), ids=OPERATORS)
def test_a_handler_of_all_axes_equals_onnxruntime(write):
    """With every axis among the channels, each element is a polynomial of elements of x."""
    model, source, out = read(write)
    x = np.random.default_rng(0).normal(size=DIMS).astype("f")
    (want,) = run(model, {"x": x})
    channels = Tracer(source).trace(out, want.ndim)
    assert channels.shape == want.shape
    got = [evaluate(channel, x) for channel in channels.flat]
    np.testing.assert_allclose(got, want.reshape(-1), rtol=1e-6)


CHANNELS = [
    "identity", "add", "add-number", "sub", "mul", "neg", "div", "cast", "slice", "slice-negative",
    "slice-steps", "split-first", "split-second", "concat", "gather", "gather-negative",
    "gather-2-d", "reshape-pairs", "unsqueeze", "expand", "tile",
]  # fmt: skip


@pytest.mark.parametrize("name", CHANNELS)
def test_a_handler_of_channels_leaves_the_other_axes_as_they_are(name):
    """With sizes that are not static: what is found of a channel holds in every row."""
    model, source, out = read(OPERATORS[name], ["batch", "seq", 8])
    x = np.random.default_rng(0).normal(size=DIMS).astype("f")
    (want,) = run(model, {"x": x})
    channels = Tracer(source).trace(out, want.ndim - 2)
    rows, wanted = x.reshape(-1, 8), want.reshape(6, -1)
    for row, values in zip(rows, wanted, strict=True):
        got = [evaluate(channel, row) for channel in channels.flat]
        np.testing.assert_allclose(got, values, rtol=1e-6)


ROWS = [
    "slice-rows", "split-rows", "gather-rows", "transpose-rows", "expand-rows", "reshape-swapped",
]  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_handler_of_rows_wraps_every_channel(name):
    """Equal only to what moves the rows in the same way: not to x, and not to other rows."""
    _, source, out = read(OPERATORS[name], [2, 3, 8])
    for i, channel in enumerate(Tracer(source).trace(out, 1)):
        ((product, coefficient),) = channel
        ((kind, _, *inner),) = product
        assert (kind, coefficient) == ("leading", 1.0)
        while inner[0] != symbol("source", i):
            ((product, _),) = inner[0]
            ((kind, _, *inner),) = product
            assert kind == "leading"


OTHER_ROWS = {
    "slice": [lambda g, x, i=i: cut(g, x, [i], [i + 1], [1]) for i in (0, 1)],
    "split": [lambda g, x, i=i: split(g, x, [1, 1, 1], 1, i) for i in (0, 1)],
    "gather": [lambda g, x, i=i: gather(g, x, [i], 1) for i in (0, 1)],
    "transpose": [lambda g, x, p=p: g.op("Transpose", x, perm=p) for p in ([0, 1, 2], [1, 0, 2])],
    "concat": [lambda g, x, p=p: g.join(*(x, g.op("Neg", x))[::p], axis=1) for p in (1, -1)],
    "function": [lambda g, x, f=f: g.op(f, x) for f in ("Cos", "Sin")],
    "argument": [lambda g, x, f=f: g.op("Cos", f(g, x)) for f in (join_turned, OPERATORS["neg"])],
}


@pytest.mark.parametrize("writes", OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_what_may_differ_is_not_equal(writes):
    one, other = writes

    def write(g: Graph, x: str) -> str:
        return g.join(one(g, x), one(g, x), other(g, x))

    _, source, out = read(write, [3, 3, 8])
    channels = Tracer(source).trace(out, 1)
    first, same, different = channels[:8], channels[8:16], channels[16:]
    assert list(first) == list(same)
    assert not any(a == b for a, b in zip(first, different, strict=True))


def test_columns_of_a_constant_that_are_equal_are_known_to_be():
    table = np.random.default_rng(0).normal(size=(5, 4)).astype("f")
    table[:, 2] = table[:, 0]
    table[0, 3] = table[0, 1]  # equal in one row only

    _, source, out = read(lambda g, x: g.op("Identity", g.const(table)))
    channels = Tracer(source).trace(out, 1)
    assert channels[0] == channels[2]
    assert len({*channels}) == 3


def test_what_no_handler_understands_is_a_symbol_of_its_own():
    _, source, out = read(lambda g, x: g.op("CumSum", x, g.const(np.int64(1))))
    channels = Tracer(source).trace(out, 1)
    assert list(channels) == [symbol("value", out, i) for i in range(8)]


def test_channels_of_unknown_number_are_an_error():
    _, source, out = read(OPERATORS["neg"], [2, 3, "channels"])
    with pytest.raises(UnknownShapeError):
        Tracer(source).trace(out, 1)


def test_arithmetic_of_polynomials():
    a, b = symbol("source", 0), symbol("source", 1)
    total = add(scale(a, 2.0), b, -1.0)
    assert multiply(total, total) == add(
        add(scale(multiply(a, a), 4.0), multiply(b, b)), multiply(a, b), -4.0
    )
    assert add(a, a, -1.0) == number(0) == frozenset()
    assert format_polynomial(total) == "2*x[0] - x[1]"
    assert format_polynomial(number(3)) == "3"
    assert format_polynomial(frozenset()) == "0"
    assert len(format_polynomial([((("source", i),), 1.0) for i in range(99)])) == 80


# ---- shapes


def make_node(op_type: str, dims: list[list[Any]], constants: dict[int, list[int]], **attributes):
    """Return a node whose inputs have these shapes; some are constants, some computed."""
    inputs = []
    for i, sizes in enumerate(dims):
        value = ir.Value(name=f"i{i}", shape=ir.Shape(sizes), type=ir.TensorType(ir.DataType.INT64))
        if i in constants:
            value.const_value = ir.tensor(np.array(constants[i], np.int64))
        inputs.append(value)
    return ir.node(op_type, inputs, attributes)


def compute_shape(*parts: int | tuple[list[Any], list[int]]) -> ir.Value:
    """Concat of numbers and of sizes that are picked of a shape, as torch's old exporter writes."""
    pieces = []
    for i, part in enumerate(parts):
        if isinstance(part, int):
            value = ir.Value(name=f"p{i}", shape=ir.Shape([1]))
            value.const_value = ir.tensor(np.array([part], np.int64))
        else:
            dims, picked = part
            shape = ir.node("Shape", [ir.Value(name=f"p{i}", shape=ir.Shape(dims))])
            value = ir.node("Gather", [shape.outputs[0], constant(picked)]).outputs[0]
        pieces.append(value)
    return ir.node("Concat", pieces, {"axis": 0}).outputs[0]


def constant(values: list[int]) -> ir.Value:
    value = ir.Value(name="c", shape=ir.Shape([len(values)]))
    value.const_value = ir.tensor(np.array(values, np.int64))
    return value


BSND = ["B", "S", 8, 2]
SHAPES = {
    "reshape-merges": (
        "Reshape", BSND, compute_shape((BSND, [0]), (BSND, [1]), -1), None, ["B", "S", 16],
    ),
    "reshape-splits": ("Reshape", ["B", "S", 16], compute_shape(0, 0, 4, -1), None,
                       ["B", "S", 4, 4]),
    "reshape-keeps-what-is-known": (
        "Reshape", ["B", "S", 16], compute_shape(0, 0, -1), ["B", None, 16], ["B", "S", 16],
    ),
    "reshape-two-unknown": ("Reshape", ["B", "S", 16], compute_shape(-1, 16), None, [None, 16]),
    "tile": ("Tile", ["B", 5, 8], compute_shape((["B"], [0]), 1, 3), None, [None, 5, 24]),
    "expand": ("Expand", [1, 5, 1], compute_shape((["B"], [0]), 1, 3), None, ["B", 5, 3]),
    "expand-more-axes": ("Expand", [5, 1], compute_shape((["B"], [0]), 1, 3), None, ["B", 5, 3]),
}  # fmt: skip


@pytest.mark.parametrize(("op_type", "dims", "shape", "known", "want"), SHAPES.values(), ids=SHAPES)
def test_sizes_of_half_known_shapes(op_type, dims, shape, known, want):
    x = ir.Value(name="x", shape=ir.Shape(dims))
    node = ir.node(op_type, [x, shape])
    if known is not None:
        node.outputs[0].shape = ir.Shape(known)
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 18})
    assert fill_shapes(ir.Model(graph, ir_version=10))
    got = [d if isinstance(d, int) else d.value for d in node.outputs[0].shape]
    assert got == want


def test_a_slice_keeps_the_axes_that_are_not_cut():
    x, end = ir.Value(name="x", shape=ir.Shape(["B", "S", 8])), ir.Value(name="end")
    node = ir.node("Slice", [x, constant([0]), end, constant([-2])])
    graph = ir.Graph([x, end], [node.outputs[0]], nodes=[node], opset_imports={"": 18})
    assert fill_shapes(ir.Model(graph, ir_version=10))
    assert [d if isinstance(d, int) else d.value for d in node.outputs[0].shape] == ["B", None, 8]


def test_a_computed_shape_is_read_as_far_as_it_is_known():
    assert read_sizes(compute_shape((BSND, [0, -2]), -1)) == ["B", 8, -1]
    is_free = ir.node("Equal", [compute_shape((BSND, [2]), -1), constant([-1])]).outputs[0]
    chosen = ir.node("Where", [is_free, constant([7, 7]), constant([8, 9])]).outputs[0]
    assert read_sizes(chosen) == [8, 7]
