"""What `fuse` must not replace, with the reason; and what it must not break around it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.fuse_graphs import (
    Graph,
    H,
    add_products,
    add_query_key,
    find_rotary,
    make_feeds,
    rotate_both,
    rotate_half,
    rotate_pairs,
    run,
    write_angles,
    write_tables,
)
from onnx import TensorProto

import rotary_export
from rotary_export.errors import CheckFailedError
from rotary_export.fusion.rules import build
from rotary_export.fusion.symbolic.refusal import Refusal


def halves_differ(g: Graph) -> None:
    """2-D vision, read as 1-D: the two halves of the channels turn by different angles."""
    h = write_angles(g)
    w = g.op("Mul", h, g.const(np.float32(0.5)))
    angles = g.join(h, w)
    rotate_both(g, *(g.unsqueeze(g.op(f, angles), 1) for f in ("Cos", "Sin")))


def constant_halves_differ(g: Graph) -> None:
    rows = np.random.default_rng(0).normal(size=(40, H)).astype("f")
    ids = g.input("position_ids", ["batch", "seq"], TensorProto.INT64)
    rotate_both(
        g, *(g.unsqueeze(g.op("Gather", g.const(f(rows)), ids), 1) for f in (np.cos, np.sin))
    )


def half_tables_for_pairs(g: Graph) -> None:
    """vjepa2: pairs (2i, 2i + 1), tables tiled for (i, i + R/2): no rotation at all."""
    rotate_both(g, *write_tables(g, "half"), turn=rotate_pairs)


def pair_tables_for_halves(g: Graph) -> None:
    rotate_both(g, *write_tables(g, "repeat"))


def both_signs_plus(g: Graph) -> None:
    cos, sin = write_tables(g)

    def swap(g: Graph, x: str) -> str:
        return g.join(g.cut(x, H // 2, H), g.cut(x, 0, H // 2))

    rotate_both(g, cos, sin, swap)


def halves_swapped_twice(g: Graph) -> None:
    """The rotated part comes from another tensor."""
    cos, sin = write_tables(g)
    query, key = add_query_key(g)
    other = g.op("Identity", g.input("other", ["batch", 4, "seq", H]))
    g.output(add_products(g, query, cos, rotate_half(g, other), sin), "query_out")
    g.output(g.op("Tanh", key), "key_out")


def cosines_unlike_sines(g: Graph) -> None:
    """cos of one half, sin of the other: the members of a pair have different cosines."""
    angles = write_angles(g)
    other = g.op("Mul", angles, g.const(np.float32(2)))
    cos = g.unsqueeze(g.op("Cos", g.join(angles, other)), 1)
    sin = g.unsqueeze(g.op("Sin", g.join(angles, angles)), 1)
    rotate_both(g, cos, sin)


def tables_per_head(g: Graph) -> None:
    """(B, 4, S, R): every head turns by angles of its own."""
    cos, sin = write_tables(g)
    each = g.const(np.linspace(0.5, 1, 4, dtype="f").reshape(1, 4, 1, 1))
    query = g.op("Identity", g.input("query", ["batch", 4, "seq", H]))
    cos, sin = g.op("Mul", cos, each), g.op("Mul", sin, each)
    g.output(add_products(g, query, cos, rotate_half(g, query), sin), "query_out")
    g.output(g.op("Tanh", g.input("key", ["batch", 2, "seq", H])), "key_out")


def overlapping_slices(g: Graph) -> None:
    cos, sin = write_tables(g)

    def turn(g: Graph, x: str) -> str:
        return g.join(g.op("Neg", g.cut(x, 3, 7)), g.cut(x, 0, 4))

    rotate_both(g, cos, sin, turn)


def weights_per_channel(g: Graph) -> None:
    """Each pair is scaled by a number of its own, which the tables do not hold."""
    cos, sin = write_tables(g)
    weights = g.const(np.tile(np.arange(1, 5, dtype="f"), 2))
    for x in add_query_key(g):
        rotated = g.op("Mul", rotate_half(g, x), weights)
        g.output(add_products(g, g.op("Mul", x, weights), cos, rotated, sin), f"{x}_out")


REFUSED = {
    "weights-per-channel": (weights_per_channel, "no one value of the graph contains the cosines"),
    "halves-differ": (halves_differ, "the cosines of a pair differ"),
    "constant-halves-differ": (constant_halves_differ, "the cosines of a pair differ"),
    "half-tables-for-pairs": (half_tables_for_pairs, "the cosines of a pair differ"),
    "pair-tables-for-halves": (pair_tables_for_halves, "the cosines of a pair differ"),
    "both-signs-plus": (both_signs_plus, "must have opposite signs"),
    "cosines-unlike-sines": (cosines_unlike_sines, "the cosines of a pair differ"),
    "tables-per-head": (tables_per_head, "not broadcast over the heads"),
    "overlapping-slices": (overlapping_slices, "the pairs are neither"),
    "another-tensor": (halves_swapped_twice, "has no rotary embedding"),
}


@pytest.mark.parametrize(("write", "reason"), REFUSED.values(), ids=REFUSED)
def test_no_rule_fires(write, reason):
    g = Graph()
    write(g)
    with pytest.raises(CheckFailedError, match=reason):
        rotary_export.fuse(g.model())


def test_what_was_not_replaced_is_listed_beside_what_was_fused():
    g = Graph()
    cos, sin = write_tables(g)
    query, key = add_query_key(g)
    g.output(add_products(g, query, cos, rotate_half(g, query), sin), "query_out")
    swapped = g.join(g.cut(key, H // 2, H), g.cut(key, 0, H // 2))
    g.output(add_products(g, key, cos, swapped, sin), "key_out")
    result = rotary_export.fuse(g.model())
    assert (len(result.fused), result.nodes) == (1, 1)
    (refused,) = result.why
    assert "the two sines of a pair must have opposite signs" in refused.reason
    assert result.to_dict()["calls_not_replaced"] == 1


def test_intermediate_values_that_are_used_elsewhere_stay():
    g = Graph()
    cos, sin = write_tables(g)
    query, key = add_query_key(g)
    product = g.op("Mul", query, cos)
    rotated = rotate_half(g, query)
    turned = g.op("Add", product, g.op("Mul", rotated, sin))
    for name, value in (("a", product), ("b", rotated), ("c", turned), ("d", sin), ("e", key)):
        g.output(value, name)
    model = g.model()
    result = rotary_export.fuse(model)
    assert len(find_rotary(result.model)) == 1
    feeds = make_feeds(3, 5)
    for got, want in zip(run(result.model, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_values_that_are_rotated_too_get_a_node_of_their_own():
    g = Graph()
    cos, sin = write_tables(g)
    names = [*add_query_key(g), g.op("Identity", g.input("value", ["batch", 2, "seq", H]))]
    for x in names:
        g.output(add_products(g, x, cos, rotate_half(g, x), sin), f"{x}_out")
    result = rotary_export.fuse(g.model())
    assert (len(result.fused), result.nodes) == (3, 2)


def test_a_rotation_by_the_opposite_angle_gets_the_opposite_sines():
    g = Graph()
    cos, sin = write_tables(g)

    def turn_back(g: Graph, x: str) -> str:
        return g.join(g.cut(x, H // 2, H), g.op("Neg", g.cut(x, 0, H // 2)))

    rotate_both(g, cos, sin, turn_back)
    model = g.model()
    result = rotary_export.fuse(model)
    feeds = make_feeds(2, 7)
    for got, want in zip(run(result.model, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("hidden", [False, True], ids=["in the outputs", "inside only"])
def test_a_rule_that_is_wrong_is_caught_by_running_the_model(monkeypatch, hidden):
    """Inside only: what a rotary call returns is compared, whatever the outputs make of it."""

    def find_wrongly(value):
        found = find(value)
        if isinstance(found, Refusal):
            return found
        return replace(found, cos=found.sin, sin=found.cos)

    find = build.find_rotation
    monkeypatch.setattr(build, "find_rotation", find_wrongly)
    g = Graph()
    cos, sin = write_tables(g)
    for x in add_query_key(g):
        turned = add_products(g, x, cos, rotate_half(g, x), sin)
        g.output(g.op("Mul", turned, g.const(np.float32(0))) if hidden else turned, f"{x}_out")
    with pytest.raises(CheckFailedError, match="is not equal to the model, nothing was written"):
        rotary_export.fuse(g.model())
