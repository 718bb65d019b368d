"""`FuseResult.why`: the check that refused each call, and the nearest rotation."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.fuse_graphs import (
    Graph,
    H,
    add_products,
    add_query_key,
    one_wrong_sign,
    rotate_both,
    rotate_half,
    rotate_pairs,
    turn_by_signs,
    write_angles,
    write_tables,
)
from onnx import TensorProto

import rotary_export
from rotary_export.fusion.candidates import NotReplaced
from rotary_export.fusion.result import NothingFusedError


def explain(write, **options) -> NotReplaced:
    """Return why the first call of a graph is not replaced."""
    g = Graph()
    write(g)
    with pytest.raises(NothingFusedError) as error:
        rotary_export.fuse(g.model(), dry_run=True, **options)
    return error.value.why[0]


def all_wrong_signs(g: Graph) -> None:
    rotate_both(g, *write_tables(g), turn_by_signs(*[1] * H))


def sine_of_another_size(g: Graph) -> None:
    rotate_both(g, *write_tables(g), turn_by_signs(-1, -1, -1, -1, 1, 1, 1, 2))


def sines_of_other_angles(g: Graph) -> None:
    angles = write_angles(g)
    other = g.op("Mul", angles, g.const(np.float32(2)))
    cos = g.unsqueeze(g.op("Cos", g.join(angles, angles)), 1)
    rotate_both(g, cos, g.unsqueeze(g.op("Sin", g.join(angles, other)), 1))


def tables_of_halves_for_pairs(g: Graph) -> None:
    rotate_both(g, *write_tables(g, "half"), rotate_pairs)


def tables_of_pairs_for_halves(g: Graph) -> None:
    rotate_both(g, *write_tables(g, "repeat"))


def vision_angles(g: Graph) -> tuple[str, str]:
    """Angles of rows, then of columns, each H / 4 wide and tiled."""
    rows = write_angles(g, H // 4)
    columns = g.op("Mul", rows, g.const(np.float32(0.5)))
    angles = g.join(rows, rows, columns, columns)
    return tuple(g.unsqueeze(g.op(f, angles), 1) for f in ("Cos", "Sin"))


def vision_in_one(g: Graph) -> None:
    """2-D vision: the halves turn by different angles, as pairs (i, i + R/2): not a rotation."""
    rows = write_angles(g)
    angles = g.join(rows, g.op("Mul", rows, g.const(np.float32(0.5))))
    rotate_both(g, *(g.unsqueeze(g.op(f, angles), 1) for f in ("Cos", "Sin")))


def vision_in_blocks(g: Graph) -> None:
    """2-D vision: each half of the channels is rotated by itself."""

    def turn(g: Graph, x: str) -> str:
        first, second = g.cut(x, 0, H // 2), g.cut(x, H // 2, H)
        return g.join(rotate_half(g, first, H // 2), rotate_half(g, second, H // 2))

    rotate_both(g, *vision_angles(g), turn)


def tables_per_head(g: Graph) -> None:
    cos, sin = write_tables(g)
    each = g.const(np.linspace(0.5, 1, 4, dtype="f").reshape(1, 4, 1, 1))
    query = g.op("Identity", g.input("query", ["batch", 4, "seq", H]))
    cos, sin = g.op("Mul", cos, each), g.op("Mul", sin, each)
    g.output(add_products(g, query, cos, rotate_half(g, query), sin), "query_out")


def halves_and_pairs(g: Graph) -> None:
    """The first pair of channels is written as (0, 1), all others as (i, i + R/2)."""

    def turn(g: Graph, x: str) -> str:
        order = np.array([1, 5, 6, 7, 0, 1, 2, 3])
        picked = g.op("Gather", x, g.const(order), axis=-1)
        return g.op("Mul", picked, g.const(np.array([-1] * 4 + [1] * 4, "f")))

    rotate_both(g, *write_tables(g), turn)


def one_channel_is_shifted(g: Graph) -> None:
    """A number is added to channel 3, so that it is not a sum of two products."""
    cos, sin = write_tables(g)
    shift = g.const(np.eye(H, dtype="f")[3])

    def turn(g: Graph, x: str) -> str:
        return g.op("Add", rotate_half(g, x), shift)

    rotate_both(g, cos, sin, turn)


def trailing_and_wrong(g: Graph) -> None:
    """The last 4 of 8 channels are rotated, one of them with the wrong sign; 0 to 3 are copied."""
    rotated = np.array([0, 0, 0, 0, 1, 1, 1, 1], "f")
    angles = write_angles(g, 2)
    cos, sin = (g.join(*[g.unsqueeze(g.op(f, angles), 1)] * 4) for f in ("Cos", "Sin"))
    cos = g.op("Add", g.op("Mul", cos, g.const(rotated)), g.const(1 - rotated))
    signs = np.array([0, 0, 0, 0, -1, 1, 1, 1], "f")

    def turn(g: Graph, x: str) -> str:
        picked = g.op("Gather", x, g.const(np.array([0, 1, 2, 3, 6, 7, 4, 5])), axis=-1)
        return g.op("Mul", picked, g.const(signs))

    rotate_both(g, cos, sin, turn)


def weights_per_channel(g: Graph) -> None:
    cos, sin = write_tables(g)
    weights = g.const(np.tile(np.arange(1, 5, dtype="f"), 2))
    for x in add_query_key(g):
        rotated = g.op("Mul", rotate_half(g, x), weights)
        g.output(add_products(g, g.op("Mul", x, weights), cos, rotated, sin), f"{x}_out")


ROTATION = "fusion/symbolic/rotation.py"
SIGNS = "the two sines of a pair must have opposite signs"
COSINES = "the cosines of a pair differ, or are not known to be equal"
EVERY = "channels 0 and 4, 1 and 5, 2 and 6 (and 1 more pairs) differ"
EXPLAINED = {
    "one-wrong-sign": (
        one_wrong_sign,
        f"{ROTATION}: match_pairs",
        f"channels 1 and 5: {SIGNS}: x[1]*Cos(",
        f"half layout, 6 of 8 channels fit; channels 1 and 5 differ: {SIGNS}",
    ),
    "all-wrong-signs": (
        all_wrong_signs,
        f"{ROTATION}: match_pairs",
        f"channels 0 and 4: {SIGNS}",
        f"half layout, 0 of 8 channels fit; {EVERY}: {SIGNS}",
    ),
    "sine-of-another-size": (
        sine_of_another_size,
        f"{ROTATION}: match_pairs",
        "channels 3 and 7: the sines of a pair differ",
        "half layout, 6 of 8 channels fit; channels 3 and 7 differ: the sines of a pair differ, or "
        "are not known to be equal",
    ),
    "sines-of-other-angles": (
        sines_of_other_angles,
        f"{ROTATION}: match_pairs",
        "channels 0 and 4: the sines of a pair differ",
        f"half layout, 0 of 8 channels fit; {EVERY}: the sines of a pair differ, or are not known "
        "to be equal",
    ),
    "tables-of-halves-for-pairs": (
        tables_of_halves_for_pairs,
        f"{ROTATION}: match_pairs",
        f"channels 0 and 1: {COSINES}",
        "interleaved layout, 0 of 8 channels fit; channels 0 and 1, 2 and 3, 4 and 5 (and 1 more "
        f"pairs) differ: {COSINES}; the tables are tiled for the half layout",
    ),
    "tables-of-pairs-for-halves": (
        tables_of_pairs_for_halves,
        f"{ROTATION}: match_pairs",
        f"channels 0 and 4: {COSINES}",
        f"half layout, 0 of 8 channels fit; {EVERY}: {COSINES}; the tables are tiled for the "
        "interleaved layout",
    ),
    "vision-in-one": (
        vision_in_one,
        f"{ROTATION}: match_pairs",
        f"channels 0 and 4: {COSINES}",
        f"half layout, 0 of 8 channels fit; {EVERY}: {COSINES}",
    ),
    "vision-in-blocks": (
        vision_in_blocks,
        f"{ROTATION}: find_layout",
        "the pairs are neither (i, i + rotary_dim / 2) nor (2i, 2i + 1) of the channels: channel 0 "
        "is x[0]*Cos(",
        "half layout in two blocks of 4 channels (the op has one block), all 8 channels fit",
    ),
    "tables-per-head": (
        tables_per_head,
        "fusion/rules/build.py: make_plan",
        "the tables are not broadcast over the heads: x has ['batch', 4, 'seq'] before its "
        "channels, the tables ['batch', 4, 'seq'] and ['batch', 4, 'seq']",
        "half layout, all 8 channels fit",
    ),
    "halves-and-pairs": (
        halves_and_pairs,
        f"{ROTATION}: find_layout",
        "the pairs are neither",
        "half layout, 6 of 8 channels fit; channels 0 and 4 differ: channel 0 is not x[0]*cos - "
        "x[4]*sin: x[0]*Cos(Cast(position_ids[0])) - x[1]*Sin(Cast(position_ids[0]))",
    ),
    "one-channel-is-shifted": (
        one_channel_is_shifted,
        f"{ROTATION}: check_terms",
        "channel 3 is not a sum of products with x: it is ",
        "half layout, 6 of 8 channels fit; channels 3 and 7 differ: channel 3 is not x[3]*cos - "
        "x[7]*sin: no sum of products with x",
    ),
    "trailing-and-wrong": (
        trailing_and_wrong,
        f"{ROTATION}: find_rotary_dim",
        "the rotated channels are not the leading ones: channel 7 is rotated, channel 0 is not",
        "half layout of channels 4 to 7, 2 of 4 channels fit; channels 5 and 7 differ: " + SIGNS,
    ),
    "weights-per-channel": (
        weights_per_channel,
        f"{ROTATION}: find_table",
        "no one value of the graph contains the cosines",
        "half layout, all 8 channels fit",
    ),
}


@pytest.mark.parametrize(("write", "check", "reason", "nearest"), EXPLAINED.values(), ids=EXPLAINED)
def test_the_check_that_decided_and_the_nearest_rotation(write, check, reason, nearest):
    found = explain(write)
    assert found.check == check
    assert found.reason.startswith(reason)
    assert found.nearest == nearest
    assert (found.op, found.candidate) == ("ai.onnx::Add", True)


def test_the_source_that_got_furthest_is_reported_and_not_the_longest_text():
    """Above the sum are other values of x's shape, each of which is refused earlier."""

    def write(g: Graph) -> None:
        cos, sin = write_tables(g)
        swap = turn_by_signs(*[1] * H)
        query, _ = add_query_key(g)
        x = g.op("Neg", g.op("Mul", query, g.const(np.arange(1, H + 1, dtype="f"))))
        g.output(add_products(g, x, cos, swap(g, x), sin), "query_out")

    found = explain(write)
    assert found.check == f"{ROTATION}: match_pairs"
    assert SIGNS in found.reason


def test_of_the_nodes_of_a_call_the_one_that_got_furthest_is_reported():
    """(a cos - b sin, b cos + a sin): each sum alone is nothing, their Concat nearly a rotation."""

    def write(g: Graph) -> None:
        cos, sin = write_tables(g, "none")
        query, _ = add_query_key(g)
        a, b = g.op("Split", query, n=2, axis=-1, num_outputs=2)
        first, second = (add_products(g, *parts) for parts in ((a, cos, b, sin), (b, cos, a, sin)))
        g.output(g.join(first, second), "query_out")

    g = Graph()
    write(g)
    with pytest.raises(NothingFusedError, match="none of the 1 rotary calls") as error:
        rotary_export.fuse(g.model())
    (found,) = error.value.why
    assert found.nearest == f"half layout, 0 of 8 channels fit; {EVERY}: {SIGNS}"


def test_an_attention_that_rotates_inside_names_what_decided():
    def write(g: Graph) -> None:
        query, key = add_query_key(g)
        rotated = g.op("Attention", query, key, key, domain="com.microsoft", do_rotary=1)
        g.output(rotated, "out")

    found = explain(write)
    assert found.check == "fusion/candidates.py: find_not_replaced"
    assert (found.reason, found.nearest) == (
        "com.microsoft::Attention rotates inside: it keeps its own kernel", "",
    )  # fmt: skip


def test_a_node_of_another_domain_names_the_rule():
    def write(g: Graph) -> None:
        ids = g.input("position_ids", ["batch", "seq"], TensorProto.INT64)
        x = g.input("query", ["batch", 4, "seq", H])
        table = g.const(np.ones((40, 2), "f"))
        y = g.op("RotaryEmbedding", x, ids, table, table, domain="com.microsoft")
        g.output(y, "out")

    found = explain(write)
    assert found.check == "fusion/rules/microsoft_node.py: MicrosoftRule.check"
    assert found.reason == "tables for 4 channels, heads of 8"


def test_names_are_those_of_the_file():
    """Normalisation names nodes, too: a reader of the file would look for those in vain."""
    g = Graph()
    one_wrong_sign(g)
    model = g.model()
    sums = [node for node in model.graph.node if node.op_type == "Add"]
    sums[0].name = "layers.0/rotate_query"
    with pytest.raises(NothingFusedError) as error:
        rotary_export.fuse(model)
    names = [(each.node, each.output) for each in error.value.why]
    known = {name for node in model.graph.node for name in node.output}
    assert [node for node, _ in names] == ["layers.0/rotate_query", names[1][1]]
    assert {output for _, output in names} <= known
