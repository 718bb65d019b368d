"""`FuseResult.why`, `fuse --why`, `--dry-run`, `inspect`: what was not replaced, and why."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers.fuse_graphs import (
    Graph,
    H,
    add_products,
    add_query_key,
    half,
    rotate_half,
    rotate_pairs,
    write_angles,
    write_tables,
)
from onnx import TensorProto

import rotary_export
from rotary_export.cli.main import cli
from rotary_export.errors import RotaryExportError
from rotary_export.fusion.candidates import NotReplaced
from rotary_export.fusion.result import NothingFusedError


def finish(g: Graph, cos: str, sin: str, turn=rotate_half) -> None:
    for x in add_query_key(g):
        g.output(add_products(g, x, cos, turn(g, x), sin), f"{x}_out")


def explain(write, **options) -> NotReplaced:
    """Return why the first call of a graph is not replaced."""
    g = Graph()
    write(g)
    with pytest.raises(NothingFusedError) as error:
        rotary_export.fuse(g.model(), dry_run=True, **options)
    return error.value.why[0]


def turn_by_signs(*signs: int):
    """rotate_half with a sign for each channel of the result."""

    def turn(g: Graph, x: str) -> str:
        swapped = g.join(g.cut(x, H // 2, H), g.cut(x, 0, H // 2))
        return g.op("Mul", swapped, g.const(np.array(signs, "f")))

    return turn


def one_wrong_sign(g: Graph) -> None:
    finish(g, *write_tables(g), turn_by_signs(-1, 1, -1, -1, 1, 1, 1, 1))


def all_wrong_signs(g: Graph) -> None:
    finish(g, *write_tables(g), turn_by_signs(*[1] * H))


def sine_of_another_size(g: Graph) -> None:
    finish(g, *write_tables(g), turn_by_signs(-1, -1, -1, -1, 1, 1, 1, 2))


def sines_of_other_angles(g: Graph) -> None:
    angles = write_angles(g)
    other = g.op("Mul", angles, g.const(np.float32(2)))
    cos = g.unsqueeze(g.op("Cos", g.join(angles, angles)), 1)
    finish(g, cos, g.unsqueeze(g.op("Sin", g.join(angles, other)), 1))


def tables_of_halves_for_pairs(g: Graph) -> None:
    finish(g, *write_tables(g, "half"), rotate_pairs)


def tables_of_pairs_for_halves(g: Graph) -> None:
    finish(g, *write_tables(g, "repeat"))


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
    finish(g, *(g.unsqueeze(g.op(f, angles), 1) for f in ("Cos", "Sin")))


def vision_in_blocks(g: Graph) -> None:
    """2-D vision: each half of the channels is rotated by itself."""

    def turn(g: Graph, x: str) -> str:
        first, second = g.cut(x, 0, H // 2), g.cut(x, H // 2, H)
        return g.join(rotate_half(g, first, H // 2), rotate_half(g, second, H // 2))

    finish(g, *vision_angles(g), turn)


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

    finish(g, *write_tables(g), turn)


def one_channel_is_shifted(g: Graph) -> None:
    """A number is added to channel 3, so that it is not a sum of two products."""
    cos, sin = write_tables(g)
    shift = g.const(np.eye(H, dtype="f")[3])

    def turn(g: Graph, x: str) -> str:
        return g.op("Add", rotate_half(g, x), shift)

    finish(g, cos, sin, turn)


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

    finish(g, cos, sin, turn)


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


# ---- nodes that are named


def write_mixed(g: Graph) -> None:
    """The query is a rotation, the key nearly one, and a third value has nothing to do with it."""
    cos, sin = write_tables(g)
    query, key = add_query_key(g)
    g.output(add_products(g, query, cos, rotate_half(g, query), sin), "query_out")
    g.output(add_products(g, key, cos, turn_by_signs(*[1] * H)(g, key), sin), "key_out")
    g.output(g.op("Tanh", key, out="other"), "other_out")


def test_any_node_can_be_examined():
    g = Graph()
    write_mixed(g)
    result = rotary_export.fuse(g.model(), examine=["other_out", "query_out"], dry_run=True)
    key, other = result.why
    assert (key.candidate, other.candidate) == (True, False)
    assert (other.node, other.check) == ("other_out", f"{ROTATION}: find_rotation")
    assert other.reason == "no value above it has its shape ['batch', 2, 'seq', 8]"
    assert result.to_dict()["calls_not_replaced"] == 1


def test_a_rotation_that_no_pattern_matches():
    """Two Neg stand between the products and their sum: no rule's pattern has them."""
    g = Graph()
    cos, sin = write_tables(g)
    query, _ = add_query_key(g)
    turned = g.op("Mul", rotate_half(g, query), sin)
    g.output(g.op("Add", turned, g.op("Neg", g.op("Neg", g.op("Mul", query, cos)))), "query_out")
    with pytest.raises(NothingFusedError) as error:
        rotary_export.fuse(g.model(), examine=["query_out"])
    (found,) = error.value.why
    assert found.check == "fusion/rules/apply.py: STEPS"
    assert found.reason == "it is a rotation, but the pattern of no rule ends in ai.onnx::Add"
    assert found.nearest == "half layout, all 8 channels fit"


def test_a_node_that_is_no_longer_in_the_graph():
    g = Graph()
    half(g)
    model = g.model()
    inner = next(node for node in model.graph.node if node.op_type == "Neg").output[0]
    (found,) = rotary_export.fuse(model, examine=[inner], dry_run=True).why
    assert found.check == "fusion/normalize.py: normalize"
    assert found.reason.startswith("it is not in the graph after normalisation: it is a part of")


def test_a_node_that_does_not_exist():
    g = Graph()
    half(g)
    with pytest.raises(RotaryExportError, match="no node or value of the name nope"):
        rotary_export.fuse(g.model(), examine=["nope"], dry_run=True)


# ---- the dry run


def test_a_dry_run_runs_nothing_and_can_t_be_saved(tmp_path, monkeypatch):
    g = Graph()
    half(g)
    g.output(g.op("NoSuchOp", "query", domain="com.microsoft"), "bad")  # no runtime runs it
    result = rotary_export.fuse(g.model(), dry_run=True)
    assert (len(result.fused), result.nodes) == (2, 1)
    assert result.to_dict()["compared"] == []
    assert result.check.skipped == ["all shapes: this is a dry run"]
    with pytest.raises(RotaryExportError, match="a dry run can't be written"):
        result.save(tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


# ---- the command line


@pytest.fixture
def mixed(tmp_path):
    g = Graph()
    write_mixed(g)
    path = tmp_path / "in.onnx"
    onnx.save(g.model(), path)
    return path


def call(*arguments: object):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_dry_run_and_why_on_the_command_line(mixed):
    result = call("fuse", mixed, "--dry-run", "--why")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("not replaced: "))
    assert SIGNS in lines[first]
    assert lines[first + 1] == f"  decided by: {ROTATION}: match_pairs"
    assert lines[first + 2].startswith("  nearest: half layout, 0 of 8 channels fit; ")
    assert lines[-1] == (
        f"{mixed}: nothing was written, it would fuse 1 rotary calls into 1 nodes; not replaced: 1"
    )
    assert [path.name for path in mixed.parent.iterdir()] == ["in.onnx"]


def test_without_why_only_the_reason_is_printed(mixed, tmp_path):
    result = call("fuse", mixed, tmp_path / "out.onnx")
    assert result.exit_code == 0, result.output
    assert "decided by" not in result.stdout
    assert "--why names the check that decided" in result.stdout
    assert (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("node", "line"),
    [
        ("query_out", "query_out: replaced"),
        ("other_out", "not replaced: other_out: no value above it has its shape"),
    ],
)
def test_why_of_one_node(mixed, node, line):
    result = call("fuse", mixed, "--dry-run", f"--why={node}")
    assert line in result.stdout
    assert SIGNS not in result.stdout


def test_json_contains_all_of_it(mixed):
    report = json.loads(call("fuse", mixed, "--dry-run", "--json", "--why", "other_out").stdout)
    assert (report["calls_fused"], report["calls_not_replaced"], report["out"]) == (1, 1, None)
    key, other = report["not_replaced"]
    assert key["check"] == f"{ROTATION}: match_pairs"
    assert key["nearest"].startswith("half layout")
    assert (other["node"], other["candidate"]) == ("other_out", False)
    assert report["not_compared"] == ["all shapes: this is a dry run"]


@pytest.mark.parametrize("options", [["--dry-run"], ["out.onnx"]])
def test_nothing_to_fuse_is_exit_code_1_and_explained(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    g = Graph()
    one_wrong_sign(g)
    onnx.save(g.model(), "in.onnx")
    result = call("fuse", "in.onnx", *options, "--json", "--why")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["error"].startswith("none of the 2 rotary calls could be replaced: ")
    assert (report["calls_fused"], report["calls_not_replaced"]) == (0, 2)
    assert "channels 1 and 5 differ" in report["not_replaced"][0]["nearest"]
    assert "  nearest: half layout" in call("fuse", "in.onnx", *options, "--why").stdout
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_the_output_is_required_without_dry_run(mixed):
    for arguments in (["fuse", mixed], ["fuse", "--why", mixed, "out.onnx"]):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "--why [NODE] stands after the files" in result.stderr


# ---- inspect


def write_nothing(g: Graph) -> None:
    g.output(g.op("Tanh", g.input("x", ["batch", H])), "out")


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (write_mixed, "1 of 2 candidates"),
        (half, "2 of 2 candidates"),
        (one_wrong_sign, "0 of 2 candidates"),
        (write_nothing, "0 of 0 candidates"),
    ],
)
def test_inspect_says_how_many_calls_would_be_fused(tmp_path, write, line):
    g = Graph()
    write(g)
    onnx.save(g.model(), tmp_path / "in.onnx")
    result = call("inspect", tmp_path / "in.onnx")
    assert result.exit_code == 0, result.output
    assert f"fuse would replace: {line}" in result.stdout.splitlines()
    found = json.loads(call("inspect", tmp_path / "in.onnx", "--json").stdout)
    assert found["fuse would replace"] == line


def test_inspect_of_a_fused_file_does_not_say_so(tmp_path):
    g = Graph()
    half(g)
    rotary_export.fuse(g.model()).save(tmp_path / "fused.onnx")
    assert "fuse would replace" not in call("inspect", tmp_path / "fused.onnx").stdout


def test_inspect_of_a_damaged_or_old_file_says_why_it_does_not_know(tmp_path):
    g = Graph()
    half(g)
    model = g.model()
    model.opset_import[0].version = 17
    onnx.save(model, tmp_path / "old.onnx")
    model.opset_import[0].version = 18
    model.graph.node[0].input[0] = "nobody"
    onnx.save(model, tmp_path / "damaged.onnx")
    for name, words in (("old", "has opset 17"), ("damaged", "is damaged")):
        result = call("inspect", tmp_path / f"{name}.onnx")
        assert result.exit_code == 0, result.output
        assert f"fuse would replace: not known: {tmp_path / name}.onnx {words}" in result.stdout
