"""`export`: a bundle is there whole or not at all, and what was there stays or is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.bundles import make_rope, read_tree

import rotary_export
from rotary_export import RotaryExportError
from rotary_export.bundle import atomic
from rotary_export.bundle.manifest import GraphInfo, read_manifest
from rotary_export.errors import CheckFailedError
from rotary_export.exporters import export as exporter
from rotary_export.proof.comparison import Error
from rotary_export.proof.report import Report, Row


@pytest.fixture
def quick(monkeypatch):
    """Write and prove next to nothing, so that what is around it can be tried often."""

    def write(graph, folder, formats, opset, say):
        files = {kind: f"{graph.name}.{kind}" for kind in formats}
        for file in files.values():
            (folder / file).write_text(f"{graph.name} {opset}")
        return GraphInfo(graph.inputs, graph.outputs, files)

    monkeypatch.setattr(exporter, "_write_graph", write)
    monkeypatch.setattr(exporter, "compare_plain", lambda *_, **__: Report())
    return monkeypatch


def export_quick(out: Path, opset: int = 23, **arguments):
    return rotary_export.export(make_rope("plain"), out, opset=opset, **arguments)


def test_force_replaces_and_nothing_else_does(tmp_path, quick):
    out = tmp_path / "deep" / "er" / "b"
    export_quick(out, formats=("onnx", "program"))
    before = read_tree(tmp_path)
    assert len(before) == 3 + 5
    with pytest.raises(RotaryExportError, match=r"b exists; force=True \(--force\) replaces it$"):
        export_quick(out)
    assert read_tree(tmp_path) == before
    export_quick(out, opset=24, formats=["onnx"], force=True)
    assert {name for name in read_tree(tmp_path) if "b/" in name} == {
        "deep/er/b/manifest.json",
        "deep/er/b/rotate.onnx",
        "deep/er/b/tables.onnx",
    }
    assert read_manifest(out).opset == 24
    assert (out.stat().st_mode & 0o777) == 0o755


def test_an_empty_folder_is_taken(tmp_path, quick):
    (tmp_path / "b").mkdir()
    export_quick(tmp_path / "b")
    assert len(list(tmp_path.iterdir())) == 1
    assert read_manifest(tmp_path / "b").name == "b"


FAILURES = {
    "write": ("_write_graph", RuntimeError("x")),
    "write-interrupt": ("_write_graph", KeyboardInterrupt()),
    "disk-full": ("_write_graph", OSError(28, "No space left on device")),
    "prove": ("compare_plain", RuntimeError("x")),
    "prove-interrupt": ("compare_plain", KeyboardInterrupt()),
    "move": ("finish_bundle", PermissionError(13, "Permission denied")),
    "manifest": ("replace", MemoryError()),
}


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_everything_as_it_was(tmp_path, quick, failure, replacing):
    out = tmp_path / "deep" / "er" / "b"
    if replacing:
        export_quick(out)
    before = read_tree(tmp_path)
    name, error = FAILURES[failure]

    def fail(*args, **_):
        if name == "_write_graph":
            (args[1] / "half").write_text("written")
        raise error

    quick.setattr(exporter, name, fail)
    wanted = RotaryExportError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted) as raised:
        export_quick(out, opset=24, force=replacing)
    if isinstance(error, OSError):
        assert str(raised.value) == f"{out} can't be written: {error.strerror}"
    assert read_tree(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(5, "I/O error"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [0, 1])
def test_a_failing_rename_leaves_the_old_bundle(tmp_path, quick, error, at):
    out = tmp_path / "b"
    export_quick(out)
    before = read_tree(tmp_path)
    rename, calls = Path.rename, []
    quick.setattr(atomic, "exchange", lambda *_: False)  # as on a system that can't

    def fail(self, target):
        calls.append(self)
        if len(calls) == at + 1:
            raise error
        return rename(self, target)

    quick.setattr(Path, "rename", fail)
    with pytest.raises((RotaryExportError, KeyboardInterrupt)):
        export_quick(out, opset=24, force=True)
    assert read_tree(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(5, "I/O error"), KeyboardInterrupt()], ids=repr)
def test_a_failing_exchange_leaves_the_old_bundle(tmp_path, quick, error):
    def fail(*_):
        raise error

    out = tmp_path / "b"
    export_quick(out)
    before = read_tree(tmp_path)
    quick.setattr(atomic, "exchange", fail)
    with pytest.raises((RotaryExportError, KeyboardInterrupt)):
        export_quick(out, opset=24, force=True)
    assert read_tree(tmp_path) == before


def test_a_bundle_that_fails_its_proof_is_not_left(tmp_path, quick):
    off = Error(0.5, 7.0, exact=False, worst=(1, 2))
    bad = Row("rotate", "key_out", "TorchScript", "primitive", "exact", "oracle-rotate", off)
    good = Row("rotate", "query_out", "eager", "eager", "exact", "oracle-rotate")
    quick.setattr(exporter, "compare_plain", lambda *_, **__: Report([good, bad]))
    wanted = r"rotate\.key_out by TorchScript differs from eager by 7 ulp at \(1, 2\)"
    with pytest.raises(CheckFailedError, match=wanted):
        export_quick(tmp_path / "b")
    assert read_tree(tmp_path) == {}


def test_a_bundle_that_came_in_the_meantime_stays(tmp_path, quick):
    def compare(*_, **__):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "theirs").write_text("theirs")
        return Report()

    quick.setattr(exporter, "compare_plain", compare)
    with pytest.raises(RotaryExportError, match="b exists and is not a bundle"):
        export_quick(tmp_path / "b")
    assert read_tree(tmp_path) == {"b": None, "b/theirs": b"theirs"}


def test_a_file_that_came_into_the_old_bundle_in_the_meantime_stays(tmp_path, quick):
    def compare(*_, **__):
        (tmp_path / "b" / "theirs").write_text("theirs")
        return Report()

    export_quick(tmp_path / "b")
    before = read_tree(tmp_path)
    quick.setattr(exporter, "compare_plain", compare)
    with pytest.raises(RotaryExportError, match="b contains 'theirs', which is not of the bundle"):
        export_quick(tmp_path / "b", opset=24, force=True)
    assert read_tree(tmp_path) == before | {"b/theirs": b"theirs"}
