"""Named nodes, dry runs, `fuse --why`, `inspect`: what was not replaced, on the command line."""

from __future__ import annotations

import json

import onnx
import pytest
from click.testing import CliRunner
from helpers.fuse_graphs import (
    Graph,
    H,
    add_query_key,
    half,
    one_wrong_sign,
    rotate_half,
    write_mixed,
    write_tables,
)

import rotary_export
from rotary_export.cli.main import cli
from rotary_export.errors import RotaryExportError
from rotary_export.fusion.result import NothingFusedError

ROTATION = "fusion/symbolic/rotation.py"
SIGNS = "the two sines of a pair must have opposite signs"


# ---- nodes that are named


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
def test_inspect_counts_the_calls_that_would_be_fused(tmp_path, write, line):
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


def test_inspect_of_a_damaged_or_old_file_reports_why_it_has_no_count(tmp_path):
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
