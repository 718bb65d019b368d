"""`fuse --bundle`, and `run` and `bench` of a plain `.onnx` file."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers.fuse_graphs import Graph, half, make_feeds, run
from helpers.paths import EXPORTED

from rotary_export.cli.main import cli
from rotary_export.runtime.onnx_file import read_onnx_file


@pytest.fixture
def file(tmp_path):
    g = Graph()
    half(g)
    onnx.save(g.model(), tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def invoke(*arguments: object):
    return CliRunner().invoke(cli, [str(each) for each in arguments])


def test_a_native_body_needs_an_onnxruntime_that_checks_positions(file):
    assert read_onnx_file(file).minimum_onnxruntime == {"fused": "1.20", "portable": "1.0"}
    native = EXPORTED / "plain" / "rotate.onnx"
    assert read_onnx_file(native).minimum_onnxruntime == {"fused": "1.20", "portable": "1.25"}


def test_fuse_writes_a_bundle_that_the_commands_open(file, tmp_path):
    bundle, arrays, out = tmp_path / "b", tmp_path / "in.npz", tmp_path / "out.npz"
    result = invoke("fuse", file, "--bundle", bundle)
    assert result.exit_code == 0, result.output
    assert "b: fused 2 rotary calls into 1 nodes; not replaced: 0" in result.stdout
    result = invoke("verify", bundle)
    assert result.exit_code == 0, result.output
    line = "comparisons with ONNX Runtime, function body, all within tolerance"
    assert line in " ".join(result.stdout.split())
    result = invoke("inspect", bundle)
    assert "fused: 2 calls of a file" in result.stdout
    np.savez(arrays, **make_feeds(2, 5))
    result = invoke("run", bundle, "--graph", "model", "--input", arrays, "--out", out)
    assert result.exit_code == 0, result.output
    result = invoke("bench", bundle, "--shape", 2, 3, "--seconds", 0.01)
    assert result.exit_code == 0, result.output
    result = invoke("deploy", "mlserver", bundle, "--out", tmp_path / "kit")
    assert result.exit_code == 0, result.output


def test_fuse_writes_a_file_and_a_bundle(file, tmp_path):
    out, bundle = tmp_path / "out.onnx", tmp_path / "b"
    result = invoke("fuse", file, out, "--bundle", bundle, "--json")
    report = json.loads(result.stdout)
    assert (report["out"], report["bundle"]) == (str(out), str(bundle))
    assert out.is_file()
    assert (bundle / "manifest.json").is_file()
    result = invoke("fuse", file, "--json", "--dry-run")
    assert json.loads(result.stdout)["bundle"] is None


def test_a_bundle_that_exists_is_refused_before_the_file_is_read(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").write_text("mine")
    result = invoke("fuse", tmp_path / "nothing.onnx", "--bundle", tmp_path / "b")
    assert result.exit_code == 2
    assert "b exists and is not a bundle; it is left as it is" in " ".join(result.stderr.split())
    result = invoke("fuse", tmp_path / "nothing.onnx")
    assert result.exit_code == 2
    assert "Missing argument 'OUT.onnx' or --bundle DIR" in result.stderr


def test_run_takes_a_plain_file(file, tmp_path):
    arrays, out = tmp_path / "in.npz", tmp_path / "out.npz"
    feeds = make_feeds(2, 5)
    np.savez(arrays, **feeds)
    result = invoke("run", file, "--input", arrays, "--out", out)
    assert result.exit_code == 0, result.output
    assert "model ran on CPUExecutionProvider: primitive" in result.stdout
    got = np.load(out)
    for name, want in zip(got.files, run(onnx.load(file), feeds), strict=True):
        np.testing.assert_array_equal(got[name], want)
    np.savez(arrays, **(feeds | {"key": feeds["key"][:1]}))
    result = invoke("run", file, "--input", arrays, "--out", out, "--force")
    assert result.exit_code == 2
    assert "key must have shape (batch_size, 2, seq_len, 8), batch_size=2" in result.stderr
    invoke("fuse", file, tmp_path / "fused.onnx")
    np.savez(arrays, **feeds)
    command = ["run", tmp_path / "fused.onnx", "--input", arrays, "--out", out, "--force"]
    assert "CPUExecutionProvider: fused (" in invoke(*command, "--require-fused").stdout


def test_bench_takes_a_plain_file(file):
    result = invoke("bench", file, "--shape", 2, 3, "--seconds", 0.01, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["bundle"], report["dtype"]) == ("in", "float32")
    assert [(row["batch_size"], row["seq_len"]) for row in report["rows"]] == [(2, 3)]


@pytest.mark.parametrize("command", ["run", "bench"])
@pytest.mark.parametrize("content", [None, b"not a model"])
def test_a_file_that_is_none_is_one_line(tmp_path, command, content):
    file = tmp_path / "in.onnx"
    if content is not None:
        file.write_bytes(content)
    np.savez(tmp_path / "in.npz", x=np.ones(1))
    more = ["--input", tmp_path / "in.npz", "--out", tmp_path / "o.npz"] if command == "run" else []
    result = invoke(command, file, *more)
    assert result.exit_code == 2
    assert (
        f"{file} {'is not an ONNX file' if content else 'can' + chr(39) + 't be read'}"
        in " ".join(result.stderr.split())
    )


def test_a_plain_file_has_one_runtime_and_one_graph(file, tmp_path):
    np.savez(tmp_path / "in.npz", x=np.ones(1))
    for option in (("--runtime", "program"), ("--graph", "tables")):
        command = ["run", file, "--input", tmp_path / "in.npz", "--out", tmp_path / "o.npz"]
        result = invoke(*command, *option)
        assert result.exit_code == 2
        assert "An .onnx file has no other --runtime and no other --graph" in result.stderr
