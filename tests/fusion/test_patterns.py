"""What `fuse` finds: every way in which exporters write a rotation."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers.fuse_graphs import (
    Graph,
    H,
    add_products,
    add_query_key,
    find_rotary,
    half,
    make_feeds,
    rotate_half,
    rotate_pairs,
    run,
    write_angles,
    write_tables,
)
from onnx import TensorProto

import rotary_export


def half_by_parts(g: Graph) -> None:
    """(a cos - b sin, b cos + a sin), with tables of half the width."""
    cos, sin = write_tables(g, "none")
    for x in add_query_key(g):
        a, b = g.op("Split", x, n=2, axis=-1, num_outputs=2)
        first = add_products(g, a, cos, b, sin, "Sub")
        g.output(g.join(first, add_products(g, b, cos, a, sin)), f"{x}_out")


def half_other_way_round(g: Graph) -> None:
    """x cos - (b, -a) sin."""
    cos, sin = write_tables(g)
    for x in add_query_key(g):
        a, b = g.cut(x, 0, H // 2), g.cut(x, H // 2, H)
        turned = g.join(b, g.op("Neg", a))
        g.output(add_products(g, x, cos, turned, sin, "Sub"), f"{x}_out")


def pairs(g: Graph) -> None:
    cos, sin = write_tables(g, "repeat")
    for x in add_query_key(g):
        g.output(add_products(g, x, cos, rotate_pairs(g, x), sin), f"{x}_out")


def pairs_stacked(g: Graph) -> None:
    """Even and odd channels apart, half-width tables, then stacked: llama's first code."""
    cos, sin = write_tables(g, "none", axis=2)
    for x, heads in zip(add_query_key(g, "BSN"), (4, 2), strict=True):
        split = g.op("Reshape", x, g.ints(0, 0, heads, H // 2, 2))
        a, b = (g.op("Gather", split, g.const(np.int64(i)), axis=-1) for i in (0, 1))
        parts = (add_products(g, a, cos, b, sin, "Sub"), add_products(g, a, sin, b, cos))
        stacked = g.join(*(g.unsqueeze(part, -1) for part in parts))
        g.output(g.op("Reshape", stacked, g.ints(0, 0, heads, H)), f"{x}_out")


def pairs_in_halves_out(g: Graph) -> None:
    """DeepSeek's: pairs (2i, 2i + 1) are rotated, and come out as halves."""
    cos, sin = (g.cut(table, 0, H // 2) for table in write_tables(g))
    for x in add_query_key(g):
        a, b = g.cut(x, 0, 2**63 - 1, 2), g.cut(x, 1, 2**63 - 1, 2)
        first = add_products(g, a, cos, b, sin, "Sub")
        g.output(g.join(first, add_products(g, b, cos, a, sin)), f"{x}_out")


def complex_numbers(g: Graph) -> None:
    """Complex multiplication as exporters write it: a last axis of real and imaginary part."""
    angles = write_angles(g)
    polar = [g.unsqueeze(g.op(function, angles), -1) for function in ("Cos", "Sin")]
    turn = g.unsqueeze(g.join(*polar), 2)  # (B, S, 1, H/2, 2)
    c, d = g.op("Split", turn, g.ints(1, 1), n=2, axis=-1)
    for x, heads in zip(add_query_key(g, "BSN"), (4, 2), strict=True):
        z = g.op("Reshape", x, g.ints(0, 0, heads, H // 2, 2))
        a, b = g.op("Split", z, g.ints(1, 1), n=2, axis=-1)
        real = add_products(g, a, c, b, d, "Sub")
        product = g.join(real, add_products(g, a, d, b, c))
        g.output(g.op("Reshape", product, g.ints(0, 0, heads, H)), f"{x}_out")


def partial(g: Graph, rotate: str = "half") -> None:
    """The leading 4 of 8 channels."""
    cos, sin = write_tables(g, "half" if rotate == "half" else "repeat", half=2)
    turn = rotate_half if rotate == "half" else rotate_pairs
    for x in add_query_key(g):
        head, tail = g.cut(x, 0, 4), g.cut(x, 4, 2**63 - 1)
        turned = add_products(g, head, cos, turn(g, head, 4), sin)
        g.output(g.join(turned, tail), f"{x}_out")


def trailing(g: Graph) -> None:
    """The last 4 of 8 channels: the slice is the input of the node."""
    cos, sin = write_tables(g, half=2)
    for x in add_query_key(g):
        head, tail = g.cut(x, 0, 4), g.cut(x, 4, 2**63 - 1)
        turned = add_products(g, tail, cos, rotate_half(g, tail, 4), sin)
        g.output(g.join(head, turned), f"{x}_out")


def stored_tables(g: Graph, tiling: str = "half") -> None:
    """Rows of constant tables, gathered by ids."""
    angles = np.outer(np.arange(40), 10000.0 ** -np.linspace(0, 0.9, H // 2)).astype("f")
    wide = np.tile(angles, 2) if tiling == "half" else np.repeat(angles, 2, axis=1)
    ids = g.input("position_ids", ["batch", "seq"], TensorProto.INT64)
    cos, sin = (
        g.unsqueeze(g.op("Gather", g.const(f(wide)), ids, axis=0), 1) for f in (np.cos, np.sin)
    )
    turn = rotate_half if tiling == "half" else rotate_pairs
    for x in add_query_key(g):
        g.output(add_products(g, x, cos, turn(g, x), sin), f"{x}_out")


def matrix(g: Graph, layout: str = "half") -> None:
    """The halves, or the members of pairs, are exchanged by a product with a signed permutation."""
    swap = np.zeros((H, H), np.float32)
    for i in range(H // 2):
        a, b = (i, i + H // 2) if layout == "half" else (2 * i, 2 * i + 1)
        swap[b, a], swap[a, b] = -1.0, 1.0
    cos, sin = write_tables(g, "half" if layout == "half" else "repeat")
    for x in add_query_key(g):
        g.output(add_products(g, x, cos, g.op("MatMul", x, g.const(swap)), sin), f"{x}_out")


def assign(g: Graph, x: str, part: str, first: int) -> str:
    """x[..., first::2] = part, as torch's newer exporter writes it."""
    size = g.op("Gather", g.op("Shape", x, start=0), g.const(np.int64(3)), axis=0)
    rows = g.op("Range", g.const(np.int64(0)), size, g.const(np.int64(1)))
    rows = g.unsqueeze(g.cut(rows, first, 2**63 - 1, 2, axis=0), -1)
    front, update = (g.op("Transpose", v, perm=[3, 1, 2, 0]) for v in (x, part))
    mixed = g.op("ScatterND", front, rows, update, reduction="none")
    return g.op("Transpose", mixed, perm=[3, 1, 2, 0])


def assigned_slices(g: Graph) -> None:
    """Even and odd channels are assigned to an empty tensor."""
    cos, sin = write_tables(g, "none")
    for x in add_query_key(g):
        a, b = g.cut(x, 0, 2**63 - 1, 2), g.cut(x, 1, 2**63 - 1, 2)
        out = g.op("Expand", g.const(np.float32(0.0)), g.op("Shape", x, start=0))
        out = assign(g, out, add_products(g, a, cos, b, sin, "Sub"), 0)
        g.output(assign(g, out, add_products(g, b, cos, a, sin), 1), f"{x}_out")


PATTERNS = {
    "half": (half, 0, 0),
    "half-split": (lambda g: half(g, "split"), 0, 0),
    "half-attention-factor": (lambda g: half(g, factor=1.25), 0, 0),
    "half-heads-last": (lambda g: half(g, axis=2), 0, 0),
    "half-by-parts": (half_by_parts, 0, 0),
    "half-other-way-round": (half_other_way_round, 0, 0),
    "half-partial": (partial, 0, 4),
    "half-trailing": (trailing, 0, 0),
    "half-stored-tables": (stored_tables, 0, 0),
    "half-matrix": (matrix, 0, 0),
    "interleaved-matrix": (lambda g: matrix(g, "pairs"), 1, 0),
    "interleaved-assigned": (assigned_slices, 1, 0),
    "interleaved": (pairs, 1, 0),
    "interleaved-stacked": (pairs_stacked, 1, 0),
    "interleaved-to-halves": (pairs_in_halves_out, 1, 0),
    "interleaved-complex": (complex_numbers, 1, 0),
    "interleaved-partial": (lambda g: partial(g, "pairs"), 1, 4),
    "interleaved-stored-tables": (lambda g: stored_tables(g, "repeat"), 1, 0),
}


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize(("write", "interleaved", "rotary_dim"), PATTERNS.values(), ids=PATTERNS)
def test_a_pattern_becomes_one_node(write, interleaved, rotary_dim, opset):
    g = Graph(opset)
    write(g)
    model = g.model()
    copy = model.SerializeToString()
    result = rotary_export.fuse(model)
    assert model.SerializeToString() == copy
    assert (len(result.fused), result.nodes, result.why) == (2, 1, ())
    (node,) = find_rotary(result.model)
    attributes = {a.name: a.i for a in node.attribute}
    assert attributes.get("interleaved", 0) == interleaved
    assert attributes.get("rotary_embedding_dim", 0) == rotary_dim
    assert len(node.output) == 2
    assert "Neg" not in {n.op_type for n in result.model.graph.node}
    onnx.checker.check_model(result.model, full_check=True)
    dims = next(v for v in model.graph.input if v.name == "query").type.tensor_type.shape.dim
    layout = "BSN" if dims[1].dim_param == "seq" else "BNS"
    for batch, length in ((1, 1), (3, 9), (2, 33)):
        feeds = make_feeds(batch, length, layout)
        for got, want in zip(run(result.model, feeds), run(model, feeds), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_value_info_exists_so_that_ort_may_work_in_place():
    g = Graph()
    half(g)
    result = rotary_export.fuse(g.model())
    (node,) = find_rotary(result.model)
    values = (*result.model.graph.value_info, *result.model.graph.input, *result.model.graph.output)
    known = {v.name for v in values if v.type.tensor_type.HasField("shape")}
    assert {name for name in (*node.input, *node.output) if name} <= known


def test_tables_are_cut_once_for_all_layers():
    g = Graph()
    cos, sin = write_tables(g)
    x, key = add_query_key(g)
    for layer in range(3):
        x, key = (add_products(g, v, cos, rotate_half(g, v), sin) for v in (x, key))
        x, key = (g.op("Tanh", v) for v in (x, key))
        g.output(x, f"x{layer}")
        g.output(key, f"key{layer}")
    result = rotary_export.fuse(g.model())
    assert (len(result.fused), result.nodes) == (6, 3)
    assert [n.op_type for n in result.model.graph.node].count("Slice") == 2


def test_positions_that_all_rows_share_stay_shared():
    """Tables of batch 1: nothing is expanded, and the node runs at every batch."""
    g = Graph(23)
    g.extra = []
    angles = write_angles(g, batch=1)
    cos, sin = (g.unsqueeze(g.op(f, g.join(angles, angles)), 1) for f in ("Cos", "Sin"))
    for x in add_query_key(g):
        g.output(add_products(g, x, cos, rotate_half(g, x), sin), f"{x}_out")
    model = g.model()
    result = rotary_export.fuse(model)
    (node,) = find_rotary(result.model)
    known = {v.name: v.type.tensor_type.shape.dim for v in result.model.graph.value_info}
    assert [known[name][0].dim_value for name in node.input[1:3]] == [1, 1]
    feeds = make_feeds(3, 5) | {"position_ids": np.arange(5)[None]}
    for got, want in zip(run(result.model, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("which", ["cos", "sin"])
def test_query_and_key_of_different_tables_are_not_joined(which):
    g = Graph()
    tables = dict(zip(("cos", "sin"), write_tables(g), strict=True))
    query, key = add_query_key(g)
    g.output(add_products(g, query, tables["cos"], rotate_half(g, query), tables["sin"]), "a")
    tables[which] = g.op("Mul", tables[which], g.const(np.float32(1.5)))
    g.output(add_products(g, key, tables["cos"], rotate_half(g, key), tables["sin"]), "b")
    model = g.model()
    result = rotary_export.fuse(model)
    assert (len(result.fused), result.nodes) == (2, 2)
    feeds = make_feeds(2, 5)
    for got, want in zip(run(result.model, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_half_and_interleaved_are_not_joined():
    """The same tables, half-width: only the layout differs."""
    g = Graph()
    cos, sin = write_tables(g, "none")
    query, key = add_query_key(g)
    a, b = g.cut(query, 0, H // 2), g.cut(query, H // 2, H)
    first, second = add_products(g, a, cos, b, sin, "Sub"), add_products(g, b, cos, a, sin)
    g.output(g.join(first, second), "a")
    a, b = g.cut(key, 0, H, 2), g.cut(key, 1, H, 2)
    first, second = add_products(g, a, cos, b, sin, "Sub"), add_products(g, b, cos, a, sin)
    pairs = g.join(g.unsqueeze(first, -1), g.unsqueeze(second, -1))
    g.output(g.op("Reshape", pairs, g.ints(0, 0, 0, H)), "b")
    model = g.model()
    result = rotary_export.fuse(model)
    assert (len(result.fused), result.nodes) == (2, 2)


def test_a_key_that_comes_from_the_query_is_not_joined_with_it():
    g = Graph()
    cos, sin = write_tables(g)
    x, _ = add_query_key(g)
    for name in ("once", "twice"):
        x = add_products(g, x, cos, rotate_half(g, x), sin)
        g.output(x, name)
    model = g.model()
    for value in model.graph.input:  # all sizes are equal, so that nothing else keeps them apart
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = {"batch": 2, "seq": 5}[dim.dim_param]
    result = rotary_export.fuse(model)
    assert set(result.fused) == {"once", "twice"}
    assert [n.input[0] for n in find_rotary(result.model)] == ["query", "once"]


@pytest.mark.parametrize("element", [TensorProto.FLOAT16, TensorProto.FLOAT])
def test_half_precision_uses_the_tables_from_before_rounding(element):
    g = Graph(23, element)
    half(g)
    result = rotary_export.fuse(g.model())
    (node,) = find_rotary(result.model)
    graph = result.model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input)}
    assert [types[name] for name in node.input[1:3]] == [TensorProto.FLOAT] * 2
    assert types[node.input[0]] == element


def test_casts_around_the_rotation_are_removed():
    g = Graph(23, TensorProto.FLOAT16)
    g.element = TensorProto.FLOAT
    cos, sin = write_tables(g)
    g.element = TensorProto.FLOAT16
    for x in add_query_key(g):
        wide = g.op("Cast", x, to=TensorProto.FLOAT)
        turned = add_products(g, wide, cos, rotate_half(g, wide), sin)
        g.output(g.op("Cast", turned, to=TensorProto.FLOAT16), f"{x}_out")
    result = rotary_export.fuse(g.model())
    assert result.nodes == 1
    casts = [n for n in result.model.graph.node if n.op_type == "Cast"]
    assert [n.input[0] for n in casts] == ["v0_0"]  # the position ids, nothing else
    (node,) = find_rotary(result.model)
    graph = result.model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input)}
    assert types[node.input[0]] == TensorProto.FLOAT16


def test_a_cast_to_another_type_stays():
    """Float16 in and bfloat16 out: the op's result would have the type of X."""
    g = Graph(23, TensorProto.FLOAT)
    cos, sin = write_tables(g)
    g.element = TensorProto.FLOAT16
    for x in add_query_key(g):
        wide = g.op("Cast", x, to=TensorProto.FLOAT)
        turned = add_products(g, wide, cos, rotate_half(g, wide), sin)
        g.output(g.op("Cast", turned, to=TensorProto.BFLOAT16), f"{x}_out", TensorProto.BFLOAT16)
    result = rotary_export.fuse(g.model())
    assert result.nodes == 1
    types = [n.op_type for n in result.model.graph.node]
    assert types.count("Cast") == 5  # of the position ids, and two of query and key each


def test_bfloat16_is_checked_by_onnx_reference_where_ort_does_not_run_it():
    g = Graph(23, TensorProto.BFLOAT16)
    half(g)
    result = rotary_export.fuse(g.model())
    assert result.nodes == 1
    assert {row.run_mode for row in result.check.comparisons} == {"by onnx.reference"}


@pytest.mark.parametrize("entry", [2.0, 0.0], ids=["scaled", "no-channel"])
def test_another_matrix_is_no_rotation(entry):
    g = Graph()
    swap = np.roll(np.eye(H, dtype=np.float32), H // 2, axis=1)
    swap[: H // 2] *= -1.0
    swap[H // 2, 0] = entry
    cos, sin = write_tables(g)
    for x in add_query_key(g):
        g.output(add_products(g, x, cos, g.op("MatMul", x, g.const(swap)), sin), f"{x}_out")
    with pytest.raises(rotary_export.RotaryExportError, match=r"could be replaced|recognises"):
        rotary_export.fuse(g.model())


@pytest.mark.parametrize("wrong", ["added", "same-twice"])
def test_other_assignments_are_no_rotation(wrong):
    g = Graph()
    cos, sin = write_tables(g, "none")
    for x in add_query_key(g):
        a, b = g.cut(x, 0, 2**63 - 1, 2), g.cut(x, 1, 2**63 - 1, 2)
        out = g.op("Expand", g.const(np.float32(0.0)), g.op("Shape", x, start=0))
        out = assign(g, out, add_products(g, a, cos, b, sin, "Sub"), 0)
        if wrong == "added":
            g.nodes[-2].attribute[0].s = b"add"
        first = 1 if wrong == "added" else 0
        g.output(assign(g, out, add_products(g, b, cos, a, sin), first), f"{x}_out")
    with pytest.raises(rotary_export.RotaryExportError, match="could be replaced"):
        rotary_export.fuse(g.model())
