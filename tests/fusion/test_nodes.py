"""Rotary nodes of other domains: `ai.onnx` (and its batch of 1), `com.microsoft`."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.function_bodies import collect_onnx_cases
from helpers.fuse_graphs import (
    Graph,
    H,
    add_query_key,
    find_rotary,
    make_feeds,
    put_in_branches,
    run,
    write_angles,
)
from onnx import TensorProto

import rotary_export
from rotary_export.errors import CheckFailedError
from rotary_export.op import spec


def read(node) -> dict[str, int]:
    return {a.name: a.i for a in node.attribute}


def write_onnx(batch: int | str, partial: bool = False) -> Graph:
    """Torch's own fusion: two nodes, tables of batch 1 where the positions are shared."""
    g = Graph(23)
    angles = write_angles(g, 2 if partial else 4, batch)
    cos, sin = g.op("Cos", angles), g.op("Sin", angles)
    for x in add_query_key(g):
        if partial:
            turned = g.op("RotaryEmbedding", g.cut(x, 0, 4), cos, sin)
            turned = g.join(turned, g.cut(x, 4, 2**63 - 1))
        else:
            turned = g.op("RotaryEmbedding", x, cos, sin)
        g.output(turned, f"{x}_out")
    return g


@pytest.mark.parametrize("partial", [False, True], ids=["full", "partial"])
def test_torch_s_nodes_become_one_and_run_at_any_batch(partial):
    model = write_onnx(1, partial).model()
    feeds = make_feeds(3, 5) | {"position_ids": np.arange(5)[None]}
    with pytest.raises(Exception, match="cos_cache"):
        run(model, feeds)
    result = rotary_export.fuse(model)
    (node,) = find_rotary(result.model)
    assert read(node) == ({"rotary_embedding_dim": 4} if partial else {})
    assert {row.run_mode for row in result.check.comparisons} == {"as it is", "row by row"}
    rows = [
        run(model, {k: v if k == "position_ids" else v[i : i + 1] for k, v in feeds.items()})
        for i in range(3)
    ]
    for got, *want in zip(run(result.model, feeds), *rows, strict=True):
        np.testing.assert_allclose(got, np.concatenate(want), rtol=0, atol=2e-6)


def test_onnx_s_own_cases_are_fused():
    for case in collect_onnx_cases():
        if not case.model.graph.input[0].type.tensor_type.shape.dim:
            continue
        result = rotary_export.fuse(case.model)
        (node,) = find_rotary(result.model)
        assert node.op_type == spec.OP_TYPE
        for inputs, (want, *_) in case.data_sets:
            feeds = dict(zip((i.name for i in case.model.graph.input), inputs, strict=True))
            (got,) = run(result.model, feeds)
            np.testing.assert_allclose(got, want, case.rtol, case.atol, err_msg=case.name)


def write_microsoft(
    flat: bool = False,
    ids: str = "each",
    width: int = H // 2,
    domain: str = "com.microsoft",
    **attributes: int | float,
) -> Graph:
    """`width` columns of 40 rows; X of 4 heads, (B, 4, S, H) or (B, S, 4 * H)."""
    g = Graph()
    angles = np.outer(np.arange(40), 10000.0 ** -np.linspace(0, 0.9, width)).astype("f")
    dims = [1] if ids == "offset" else ["batch", "seq"]
    position_ids = g.input("position_ids", dims, TensorProto.INT64)
    x = g.input("query", ["batch", "seq", 4 * H] if flat else ["batch", 4, "seq", H])
    cos, sin = g.const(np.cos(angles)), g.const(np.sin(angles))
    y = g.op("RotaryEmbedding", x, position_ids, cos, sin, domain=domain, **attributes)
    g.output(y, "query_out")
    return g


MICROSOFT = {
    "4d": ({}, {}),
    "interleaved": ({"interleaved": 1}, {"interleaved": 1}),
    "offset": ({"ids": "offset"}, {}),
    "flat": ({"flat": True, "num_heads": 4}, {"num_heads": 4}),
    "flat-heads-inferred": ({"flat": True}, {"num_heads": 4}),
    "flat-narrow-tables-split-the-heads": ({"flat": True, "width": 2}, {"num_heads": 8}),
    "partial": (
        {"flat": True, "width": 2, "num_heads": 4, "rotary_embedding_dim": 4},
        {"num_heads": 4, "rotary_embedding_dim": 4},
    ),
    "scale-has-no-effect": ({"scale": 3.0}, {}),
    "packed": ({"is_packed_batching": 1, "flat": True, "num_heads": 4}, {"num_heads": 4}),
}


@pytest.mark.parametrize(("options", "want"), MICROSOFT.values(), ids=MICROSOFT)
def test_microsoft_s_node(options, want):
    model = write_microsoft(**options).model()
    result = rotary_export.fuse(model)
    (node,) = find_rotary(result.model)
    assert read(node) == want
    assert [name[0] for name in node.input] == ["q", "c", "c", "p"]
    rng = np.random.default_rng(0)
    shape = (2, 6, 4 * H) if options.get("flat") else (2, 4, 6, H)
    ids = np.array([7]) if options.get("ids") == "offset" else rng.integers(0, 40, (2, 6))
    feeds = {"query": rng.normal(size=shape).astype("f"), "position_ids": ids}
    np.testing.assert_allclose(run(result.model, feeds)[0], run(model, feeds)[0], atol=2e-6)


REFUSED = {
    "narrow": ({"width": 2}, "tables for 4 channels, heads of 8"),
    "heads": ({"flat": True, "width": 2, "num_heads": 4}, "4 heads of 4 channels do not fill"),
    "dim": (
        {"flat": True, "num_heads": 4, "rotary_embedding_dim": 4},
        "rotary_embedding_dim is 4, the tables are for 8",
    ),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_microsoft_s_node_is_not_replaced_where_it_does_not_fit(options, reason):
    with pytest.raises(CheckFailedError, match=reason):
        rotary_export.fuse(write_microsoft(**options).model())


def test_what_rotates_inside_another_op_is_named():
    g = Graph()
    x = g.input("x", ["batch", "seq", 4 * H])
    lengths = g.input("lengths", ["batch"], TensorProto.INT32)
    total = g.const(np.int32(8))
    past = [g.input(name, ["batch", 4, "past", H]) for name in ("past_key", "past_value")]
    table = g.const(np.ones((40, H // 2), "f"))
    outputs = g.op(
        "GroupQueryAttention", x, x, x, *past, lengths, total, table, table, n=3,
        domain="com.microsoft", num_heads=4, kv_num_heads=4, do_rotary=1,
    )  # fmt: skip
    g.output(outputs[0], "out")
    with pytest.raises(CheckFailedError, match="GroupQueryAttention rotates inside"):
        rotary_export.fuse(g.model())


def test_nodes_in_subgraphs_are_fused():
    model = put_in_branches(write_onnx("batch"))
    result = rotary_export.fuse(model)
    assert (len(result.fused), result.nodes) == (4, 2)
    (unseen,) = result.check.skipped
    assert all(name in unseen for name in result.fused)
    feeds = make_feeds(2, 5) | {"flag": np.array(False)}
    for got, want in zip(run(result.model, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
