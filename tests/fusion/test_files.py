"""Files in and out of `fuse`: safe writing, bad input, the command line."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers.fuse_graphs import (
    Graph,
    add_query_key,
    find_rotary,
    half,
    make_feeds,
    make_model,
    run,
    save_external,
)

import rotary_export
from rotary_export.cli.main import cli
from rotary_export.errors import CheckFailedError, RotaryExportError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "in.onnx"
    onnx.save(make_model(), path)
    return path


def list_names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_command_writes_a_file_that_runs_with_and_without_the_library(file, tmp_path):
    before = file.read_bytes()
    result = CliRunner().invoke(cli, ["fuse", str(file), str(tmp_path / "out.onnx")])
    assert result.exit_code == 0, result.output
    assert "2      primitives, half" in result.stdout
    assert "out.onnx: fused 2 rotary calls into 1 nodes; not replaced: 0" in result.stdout
    assert list_names(tmp_path) == {"in.onnx", "out.onnx"}
    assert file.read_bytes() == before
    fused = onnx.load(tmp_path / "out.onnx")
    case = make_feeds(3, 7)
    for got, want in zip(run(fused, case), run(onnx.load(file), case), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_the_command_prints_json(file, tmp_path):
    out = str(tmp_path / "out.onnx")
    options = ["--json", "--shape", "2", "3", "0"]
    result = CliRunner().invoke(cli, ["fuse", str(file), out, *options])
    report = json.loads(result.stdout)
    assert (report["calls_fused"], report["nodes"], report["calls_not_replaced"]) == (2, 1, 0)
    assert {(r["batch"], r["length"], r["past"]) for r in report["compared"]} == {(2, 3, 0)}


def test_a_file_is_replaced_only_if_asked_for(file, tmp_path):
    out = tmp_path / "out.onnx"
    out.write_text("mine")
    result = CliRunner().invoke(cli, ["fuse", str(file), str(out)])
    assert (result.exit_code, out.read_text()) == (2, "mine")
    assert result.stderr.endswith("out.onnx exists; force=True (--force) replaces it\n")
    assert CliRunner().invoke(cli, ["fuse", str(file), str(out), "--force"]).exit_code == 0
    assert len(find_rotary(onnx.load(out))) == 1


def test_the_input_is_never_replaced(tmp_path):
    source, data = tmp_path / "in.onnx", tmp_path / "out.onnx.data"
    save_external(source, data.name)
    (tmp_path / "link.onnx").symlink_to(source)
    before = source.read_bytes(), data.read_bytes()
    (tmp_path / "hard.onnx").hardlink_to(source)
    result = rotary_export.fuse(source)
    for out, message in (
        ("in.onnx", "in.onnx is read from: the input is never replaced"),
        ("hard.onnx", "hard.onnx is read from: the input is never replaced"),
        (data.name, "out.onnx.data is read from: the input is never replaced"),
        ("link.onnx", "link.onnx is a symbolic link to .*in.onnx, which is not replaced"),
    ):
        with pytest.raises(RotaryExportError, match=message):
            result.save(tmp_path / out, force=True)
        command = ["fuse", str(source), str(tmp_path / out), "--force"]
        assert CliRunner().invoke(cli, command).exit_code == 2
    assert (source.read_bytes(), data.read_bytes()) == before
    assert list_names(tmp_path) == {"in.onnx", "link.onnx", "hard.onnx", "out.onnx.data"}


def test_data_that_the_input_reads_too_is_kept(tmp_path):
    """`out.onnx` is a copy of the input: both name `out.onnx.data`."""
    source, out, data = (tmp_path / name for name in ("in.onnx", "out.onnx", "out.onnx.data"))
    save_external(source, data.name)
    out.write_bytes(source.read_bytes())
    before = source.read_bytes(), data.read_bytes()
    rotary_export.fuse(source).save(out, force=True)
    assert (source.read_bytes(), data.read_bytes()) == before
    (new,) = list_names(tmp_path) - {"in.onnx", "out.onnx", "out.onnx.data"}
    rotary_export.fuse(source).save(out, force=True)
    assert list_names(tmp_path) == {"in.onnx", "out.onnx", "out.onnx.data", new}


def test_what_can_t_be_written_leaves_nothing(file, tmp_path):
    result = rotary_export.fuse(file)
    for out, message in (
        (tmp_path / "no" / "out.onnx", "can't be written: No such file or directory"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(RotaryExportError, match=message):
            result.save(out, force=True)
    assert list_names(tmp_path) == {"in.onnx"}


ARGUMENTS = {
    "model": (lambda: rotary_export.fuse(b"model"), "model must be an onnx.ModelProto or a path"),
    "no-shapes": (lambda: rotary_export.fuse(make_model(), shapes=[]), "at least one shape"),
    "two-sizes": (lambda: rotary_export.fuse(make_model(), shapes=[(1, 2)]), r"got \(1, 2\)"),
    "negative": (
        lambda: rotary_export.fuse(make_model(), shapes=[(1, 2, -1)]),
        r"got \(1, 2, -1",
    ),
    "inputs": (
        lambda: rotary_export.fuse(make_model(), inputs={"x": 1}),
        "a sequence of dicts",
    ),
    "long-name": (
        lambda: rotary_export.fuse(make_model()).save("a" * 300),
        "can't be written",
    ),
}


@pytest.mark.parametrize(("call", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_arguments_are_one_clear_error(call, message):
    with pytest.raises(RotaryExportError, match=message):
        call()


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_an_unreadable_file_is_one_line(tmp_path, content):
    file = tmp_path / "in.onnx"
    if content is not None:
        file.write_bytes(content)
    result = CliRunner().invoke(cli, ["fuse", str(file), str(tmp_path / "out.onnx")])
    assert result.exit_code == 2
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("rotary-export: ")
    assert str(file) in message
    assert not (tmp_path / "out.onnx").exists()


def test_a_model_without_rotary_is_exit_code_1(tmp_path):
    g = Graph()
    query, _ = add_query_key(g)
    g.output(g.op("Tanh", query), "out")
    onnx.save(g.model(), tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    result = CliRunner().invoke(cli, ["fuse", str(tmp_path / "in.onnx"), str(out), "--json"])
    assert result.exit_code == 1
    assert "the model has no rotary embedding" in json.loads(result.stdout)["error"]
    assert not out.exists()


def test_fusing_twice_is_an_error(file):
    result = rotary_export.fuse(file)
    with pytest.raises(CheckFailedError, match="is fused already: 1 node"):
        rotary_export.fuse(result.model)


def test_a_model_that_never_runs_is_not_fused():
    g = Graph()
    half(g)
    g.output(g.op("NoSuchOp", "query", domain="com.microsoft"), "bad")
    with pytest.raises(RotaryExportError, match="can't be verified, it runs at no shape"):
        rotary_export.fuse(g.model())
