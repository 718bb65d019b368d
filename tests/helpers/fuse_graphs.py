"""Small models with a rotary embedding, written as exporters write it; for tests/fusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper

from rotary_export.op import spec

H = 8  # head_dim
GENAI_HEADS, GENAI_DIM = (4, 2), 16


class Graph:
    """Writes nodes in order; a value is its name."""

    def __init__(self, opset: int = 18, element: int = TensorProto.FLOAT) -> None:
        self.opset, self.element = opset, element
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.stored: list[Any] = []
        self.extra = [helper.make_opsetid("com.microsoft", 1)]

    def input(self, name: str, dims: list[Any], element: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, element or self.element, dims))
        return name

    def const(self, value: Any) -> str:
        name = f"c{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, out: str | None = None, n: int = 1, **more: Any) -> Any:
        names = [out] if out else [f"v{len(self.nodes)}_{i}" for i in range(n)]
        self.nodes.append(helper.make_node(kind, inputs, names, **more))
        return names[0] if n == 1 else names

    def cut(self, x: str, start: int, end: int, step: int = 1, axis: int = -1) -> str:
        return self.op(
            "Slice", x, self.ints(start), self.ints(end), self.ints(axis), self.ints(step)
        )

    def join(self, *parts: str, axis: int = -1) -> str:
        return self.op("Concat", *parts, axis=axis)

    def unsqueeze(self, x: str, axis: int) -> str:
        return self.op("Unsqueeze", x, self.ints(axis))

    def output(self, value: str, name: str, element: int | None = None) -> None:
        self.op("Identity", value, out=name)
        self.outputs.append(helper.make_tensor_value_info(name, element or self.element, None))

    def model(self) -> ModelProto:
        graph = helper.make_graph(
            self.nodes, "test", self.inputs, self.outputs, initializer=self.stored
        )
        opsets = [helper.make_opsetid("", self.opset), *self.extra]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def write_angles(g: Graph, half: int = H // 2, batch: Any = "batch") -> str:
    """position_ids (B, S) -> angles (B, S, half), as transformers computes them."""
    ids = g.input("position_ids", [batch, "seq"], TensorProto.INT64)
    wide = g.op("Cast", g.unsqueeze(ids, -1), to=TensorProto.FLOAT)
    return g.op("Mul", wide, g.const(np.float32(10000.0) ** -np.linspace(0, 0.9, half, dtype="f")))


def write_tables(
    g: Graph, tiling: str = "half", factor: float = 1.0, axis: int = 1, half: int = H // 2
) -> tuple[str, str]:
    """Full-width cosines and sines, (B, 1, S, R) or (B, S, 1, R); "none": half-width."""
    angles = write_angles(g, half)
    if tiling == "half":
        angles = g.join(angles, angles)
    elif tiling == "repeat":
        pairs = g.op("Expand", g.unsqueeze(angles, -1), g.ints(1, 1, 1, 2))
        angles = g.op("Reshape", pairs, g.ints(0, 0, 2 * half))
    tables = []
    for function in ("Cos", "Sin"):
        table = g.op(function, angles)
        if factor != 1.0:
            table = g.op("Mul", table, g.const(np.float32(factor)))
        if g.element != TensorProto.FLOAT:
            table = g.op("Cast", table, to=g.element)
        tables.append(g.unsqueeze(table, axis))
    return tables[0], tables[1]


def rotate_half(g: Graph, x: str, size: int = H, cut: str = "slice") -> str:
    if cut == "split":
        first, second = g.op("Split", x, g.ints(size // 2, size // 2), n=2, axis=-1)
    else:
        first, second = g.cut(x, 0, size // 2), g.cut(x, size // 2, 2**63 - 1)
    return g.join(g.op("Neg", second), first)


def rotate_pairs(g: Graph, x: str, size: int = H) -> str:
    """(x0, x1, x2, x3, ...) -> (-x1, x0, -x3, x2, ...)."""
    even, odd = g.cut(x, 0, 2**63 - 1, 2), g.cut(x, 1, 2**63 - 1, 2)
    pairs = g.join(g.unsqueeze(g.op("Neg", odd), -1), g.unsqueeze(even, -1))
    return g.op("Reshape", pairs, g.ints(0, 0, 0, size))


def add_products(g: Graph, x: str, cos: str, rotated: str, sin: str, kind: str = "Add") -> str:
    return g.op(kind, g.op("Mul", x, cos), g.op("Mul", rotated, sin))


def add_query_key(g: Graph, layout: str = "BNS") -> tuple[str, str]:
    """Query of 4 heads and key of 2."""
    dims = {"BNS": ["batch", 0, "seq", H], "BSN": ["batch", "seq", 0, H]}[layout]
    names = []
    for name, heads in (("query", 4), ("key", 2)):
        g.input(name, [heads if d == 0 else d for d in dims])
        names.append(g.op("Identity", name))
    return names[0], names[1]


def run(model: ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def half(g: Graph, cut: str = "slice", factor: float = 1.0, axis: int = 1) -> None:
    cos, sin = write_tables(g, factor=factor, axis=axis)
    for x in add_query_key(g, "BNS" if axis == 1 else "BSN"):
        g.output(add_products(g, x, cos, rotate_half(g, x, cut=cut), sin), f"{x}_out")


def make_model(weights: int = 0) -> ModelProto:
    """Return query and key in the half layout; besides, a product with so many columns."""
    g = Graph()
    half(g)
    if weights:
        big = g.const(np.random.default_rng(0).normal(size=(H, weights)).astype("f"))
        g.output(g.op("MatMul", g.op("Identity", "query"), big), "wide")
    return g.model()


def save_external(path: Path, location: str = "weights.bin") -> None:
    """Write such a model with its product in external data."""
    onnx.save(
        make_model(4096), path, save_as_external_data=True, location=location,
        size_threshold=1024,
    )  # fmt: skip


def rotate_both(g: Graph, cos: str, sin: str, turn: Any = rotate_half) -> None:
    """Query and key, x cos + turn(x) sin."""
    for x in add_query_key(g):
        g.output(add_products(g, x, cos, turn(g, x), sin), f"{x}_out")


def turn_by_signs(*signs: int) -> Any:
    """rotate_half with a sign for each channel of the result."""

    def turn(g: Graph, x: str) -> str:
        swapped = g.join(g.cut(x, H // 2, H), g.cut(x, 0, H // 2))
        return g.op("Mul", swapped, g.const(np.array(signs, "f")))

    return turn


def one_wrong_sign(g: Graph) -> None:
    """Channels 1 and 5 are x cos + y sin and y cos + x sin: not a rotation."""
    rotate_both(g, *write_tables(g), turn_by_signs(-1, 1, -1, -1, 1, 1, 1, 1))


def write_mixed(g: Graph) -> None:
    """The query is a rotation, the key nearly one, and a third value has nothing to do with it."""
    cos, sin = write_tables(g)
    query, key = add_query_key(g)
    g.output(add_products(g, query, cos, rotate_half(g, query), sin), "query_out")
    g.output(add_products(g, key, cos, turn_by_signs(*[1] * H)(g, key), sin), "key_out")
    g.output(g.op("Tanh", key, out="other"), "other_out")


def put_in_branches(g: Graph) -> ModelProto:
    """Put a model of query and key into both branches of an `If`, whose nodes are all of it."""
    branches = []
    for end in ("", "e"):  # names are unique over both branches
        branch = helper.make_graph(
            g.nodes, f"branch{end}", [],
            [helper.make_tensor_value_info(o.name + end, g.element, ["batch", n, "seq", H])
             for o, n in zip(g.outputs, (4, 2), strict=True)],
        )  # fmt: skip
        made = {name for node in g.nodes for name in node.output}
        for node in branch.node:
            node.input[:] = [n + end if n in made else n for n in node.input]
            node.output[:] = [n + end for n in node.output]
        branches.append(branch)
    node = helper.make_node(
        "If", ["flag"], ["a", "b"], then_branch=branches[0], else_branch=branches[1]
    )
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    outputs = [helper.make_tensor_value_info(n, g.element, None) for n in ("a", "b")]
    graph = helper.make_graph([node], "t", [flag, *g.inputs], outputs, initializer=g.stored)
    opsets = [helper.make_opsetid("", g.opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def find_rotary(model: ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if (n.domain, n.op_type) == (spec.DOMAIN, spec.OP_TYPE)]


def make_feeds(batch: int, length: int, layout: str = "BNS") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(length)
    order = [0, 1, 2, 3] if layout == "BNS" else [0, 2, 1, 3]
    feeds = {
        name: rng.normal(size=(batch, heads, length, H)).astype("f").transpose(order)
        for name, heads in (("query", 4), ("key", 2))
    }
    ids = rng.integers(0, 40, (batch, length))
    return feeds | {"position_ids": ids}


def write_half(g: Graph) -> None:
    """float32 in and out, float16 between: what converters write to keep the types of a file."""
    tables = write_tables(g)
    half_tables = [g.op("Cast", table, to=TensorProto.FLOAT16) for table in tables]
    for x in add_query_key(g):
        narrow = g.op("Cast", x, to=TensorProto.FLOAT16)
        rotated = g.op("Mul", rotate_half(g, narrow), half_tables[1])
        y = g.op("Add", g.op("Mul", narrow, half_tables[0]), rotated)
        g.output(g.op("Cast", y, to=TensorProto.FLOAT), f"{x}_out")
    g.output(g.op("Tanh", "query"), "apart")


def write_genai(do_rotary: bool = False, half: int = GENAI_DIM // 2) -> ModelProto:
    """A layer of onnxruntime-genai's builder: for DirectML it has nodes of their own for rope."""
    rng = np.random.default_rng(0)
    g = Graph(22, TensorProto.FLOAT16)
    num_heads, kv_num_heads = GENAI_HEADS
    ids = g.input("input_ids", ["batch_size", "sequence_length"], TensorProto.INT64)
    mask = g.input("attention_mask", ["batch_size", "total_sequence_length"], TensorProto.INT64)
    if not do_rotary:
        g.input("position_ids", ["batch_size", "sequence_length"], TensorProto.INT64)
    dims = ["batch_size", kv_num_heads, "past_sequence_length", "kv_cache_dim"]
    past = [g.input(f"past_key_values.0.{name}", dims) for name in ("key", "value")]
    lengths = g.op("Sub", g.op("ReduceSum", mask, g.ints(1), keepdims=0), g.ints(1))
    total = g.op("Gather", g.op("Shape", mask), g.const(np.int64(1)), axis=0)
    lengths, total = (g.op("Cast", v, to=TensorProto.INT32) for v in (lengths, total))
    x = g.op("Gather", g.const(rng.normal(size=(50, 64)).astype(np.float16)), ids)
    q, k, v = (
        g.op("MatMul", x, g.const(rng.normal(size=(64, heads * GENAI_DIM)).astype(np.float16) / 8))
        for heads in (num_heads, kv_num_heads, kv_num_heads)
    )
    angles = np.outer(np.arange(64), 10000.0 ** -np.linspace(0, 0.9, half))
    tables = [g.const(f(angles).astype(np.float16)) for f in (np.cos, np.sin)]
    partial = half < GENAI_DIM // 2
    if not do_rotary:
        q, k = (
            g.op(
                "RotaryEmbedding", x, "position_ids", *tables, domain="com.microsoft",
                interleaved=0, num_heads=heads if partial else 0,
                rotary_embedding_dim=2 * half if partial else 0,
            )
            for x, heads in ((q, num_heads), (k, kv_num_heads))
        )  # fmt: skip
    outputs = g.op(
        "GroupQueryAttention", q, k, v, *past, lengths, total, *(tables if do_rotary else ()), n=3,
        domain="com.microsoft", num_heads=num_heads, kv_num_heads=kv_num_heads,
        do_rotary=int(do_rotary), scale=0.25,
    )  # fmt: skip
    for value, name in zip(outputs, ("out", "present.0.key", "present.0.value"), strict=True):
        g.output(value, name)
    model = g.model()  # it writes shapes, too
    for name, heads in ((q, num_heads), (k, kv_num_heads)):
        dims = ["batch_size", "sequence_length", heads * GENAI_DIM]
        model.graph.value_info.append(helper.make_tensor_value_info(name, g.element, dims))
    return model
