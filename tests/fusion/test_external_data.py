"""External data of `fuse`: read, written, never replaced by halves."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers.fuse_graphs import (
    H,
    make_feeds,
    make_model,
    run,
    save_external,
)
from onnx import numpy_helper

import rotary_export
from rotary_export.cli.main import cli
from rotary_export.errors import RotaryExportError
from rotary_export.fusion import fuse as fuse_module
from rotary_export.fusion.check import runs
from rotary_export.runtime.onnx_file import check_locations


def list_names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_external_data_is_read_and_written_as_such(tmp_path):
    source, out = tmp_path / "a" / "in.onnx", tmp_path / "b" / "out.onnx"
    source.parent.mkdir()
    out.parent.mkdir()
    save_external(source)
    data = (source.parent / "weights.bin").read_bytes()
    result = rotary_export.fuse(source)
    assert result.folder == source.parent
    assert len(result.model.SerializeToString()) < 30_000
    result.save(out)
    (written,) = list_names(out.parent) - {"out.onnx"}
    digest = hashlib.sha256((out.parent / written).read_bytes()).hexdigest()
    assert written == f"out.onnx.{digest[:16]}.data"
    assert (source.parent / "weights.bin").read_bytes() == data
    case = make_feeds(2, 5)
    for got, want in zip(run(onnx.load(out), case), run(onnx.load(source), case), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_a_file_with_external_data_is_replaced_at_once(tmp_path, monkeypatch):
    """A graph beside another's data would load, and be the values of neither model."""
    sources, out = [tmp_path / f"in{i}.onnx" for i in range(2)], tmp_path / "out.onnx"
    for source, scale in zip(sources, (1, 2), strict=True):
        model = make_model(4096)
        big = model.graph.initializer[-1]
        big.CopyFrom(numpy_helper.from_array(scale * numpy_helper.to_array(big), big.name))
        onnx.save(
            model, source, save_as_external_data=True, location=f"{source.name}.bin",
            size_threshold=1024,
        )  # fmt: skip
    results = [rotary_export.fuse(source) for source in sources]
    results[0].save(out)
    case = make_feeds(2, 5)
    old, new = (run(onnx.load(source), case)[-1] for source in sources)
    moved = []

    def stop_at_the_graph(source, target):
        if Path(target).parent == tmp_path:
            moved.append(Path(target).name)
        if Path(target) == out:
            raise KeyboardInterrupt
        return replaced(source, target)

    replaced = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_graph)
        with pytest.raises(KeyboardInterrupt):
            results[1].save(out, force=True)
    assert len(moved) == 2
    assert moved[1] == "out.onnx"
    assert not (tmp_path / moved[0]).exists()
    np.testing.assert_allclose(run(onnx.load(out), case)[-1], old, rtol=0, atol=2e-5)
    for result, want in ((results[1], new), (results[0], old)):
        result.save(out, force=True)
        np.testing.assert_allclose(run(onnx.load(out), case)[-1], want, rtol=0, atol=4e-5)
        assert len([name for name in list_names(tmp_path) if name.startswith("out.onnx.")]) == 1


@pytest.mark.parametrize("name", ["x" * 250 + ".onnx", "\N{SNOWMAN}" * 83 + ".onnx", "data"])
def test_names_may_be_as_long_as_the_system_allows(tmp_path, name):
    source, out = tmp_path / "in.onnx", tmp_path / name
    save_external(source)
    for _ in range(2):
        rotary_export.fuse(source).save(out, force=True)
        assert len(list_names(tmp_path)) == 4
    run(onnx.load(out), make_feeds(2, 5))


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_external_data_must_be_there(tmp_path, damage):
    save_external(tmp_path / "in.onnx")
    if damage == "missing":
        (tmp_path / "weights.bin").unlink()
    else:
        os.truncate(tmp_path / "weights.bin", 100)
    words = {"missing": "is missing", "short": "is cut off"}[damage]
    result = CliRunner().invoke(cli, ["fuse", str(tmp_path / "in.onnx"), str(tmp_path / "o.onnx")])
    assert result.exit_code == 2
    assert f"the external data of {tmp_path / 'in.onnx'} {words}" in result.stderr
    assert result.stderr.count("\n") == len(result.stderr.splitlines())
    assert not (tmp_path / "o.onnx").exists()


def test_a_proto_without_its_data_is_refused(tmp_path):
    save_external(tmp_path / "in.onnx")
    proto = onnx.load(tmp_path / "in.onnx", load_external_data=False)
    with pytest.raises(RotaryExportError, match="which a ModelProto does not locate: pass its"):
        rotary_export.fuse(proto)


def test_large_weights_are_mapped_while_the_model_is_run(monkeypatch):
    folders = []

    def look(model, folder, library):
        folders.append(folder)
        assert not any(t.raw_data and len(t.raw_data) > 1024 for t in model.graph.initializer)
        return opened(model, folder, library)

    opened = runs._open
    monkeypatch.setattr(runs, "_open", look)
    monkeypatch.setattr(fuse_module, "LARGE", 2**10)
    model = make_model(4096)
    result = rotary_export.fuse(model)
    assert None not in folders
    assert not folders[0].exists()
    assert result.folder is None
    sizes = {len(numpy_helper.to_array(t).tobytes()) for t in result.model.graph.initializer}
    assert H * 4096 * 4 in sizes


@pytest.mark.parametrize("threshold", [0, 64])
def test_small_tensors_of_external_data_are_read(tmp_path, threshold):
    """Sizes and slices among them: a shape that they give is not known otherwise."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(
        make_model(64), source, save_as_external_data=True, location="all.bin",
        size_threshold=threshold,
    )  # fmt: skip
    result = rotary_export.fuse(source)
    assert (len(result.fused), result.why) == (2, ())
    assert {path.name for path in result.sources} == {"in.onnx", "all.bin"}
    result.save(out)
    case = make_feeds(2, 5)
    for got, want in zip(run(onnx.load(out), case), run(onnx.load(source), case), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_data_of_which_all_is_small_is_never_replaced(tmp_path):
    onnx.save(
        make_model(), tmp_path / "in.onnx", save_as_external_data=True, location="out.onnx",
        size_threshold=0,
    )  # fmt: skip
    before = (tmp_path / "out.onnx").read_bytes()
    with pytest.raises(RotaryExportError, match="is read from: the input is never replaced"):
        rotary_export.fuse(tmp_path / "in.onnx").save(tmp_path / "out.onnx", force=True)
    assert (tmp_path / "out.onnx").read_bytes() == before


def test_a_small_tensor_of_a_constant_node_is_read(tmp_path):
    model = make_model()
    (tmp_path / "all.bin").write_bytes(b"")
    for tensor in list(model.graph.initializer):
        node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        model.graph.node.insert(0, node)
    del model.graph.initializer[:]
    onnx.save(
        model, tmp_path / "in.onnx", save_as_external_data=True, location="all.bin",
        size_threshold=0, convert_attribute=True,
    )  # fmt: skip
    assert len(rotary_export.fuse(tmp_path / "in.onnx").fused) == 2


def test_data_of_constants_is_not_replaced_either(tmp_path):
    save_external(tmp_path / "in.onnx")
    model = onnx.load(tmp_path / "in.onnx", load_external_data=False)
    tensor = numpy_helper.from_array(np.ones(4096, "f"), "apart")
    onnx.external_data_helper.set_external_data(tensor, "out.onnx.data", offset=0, length=4 * 4096)
    tensor.ClearField("raw_data")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["unused"], value=tensor))
    onnx.save(model, tmp_path / "in.onnx")
    (tmp_path / "out.onnx.data").write_bytes(np.ones(4096, "f").tobytes())
    source = fuse_module.read_model(tmp_path / "in.onnx")
    names = {path.name for path in fuse_module.list_files(tmp_path / "in.onnx", source)}
    assert names == {"in.onnx", "weights.bin", "out.onnx.data"}


@pytest.mark.parametrize("location", ["../outside.bin", "x/../../outside.bin", "/outside.bin"])
def test_external_data_outside_the_folder_is_refused(tmp_path, location):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_external(folder / "in.onnx", "outside.bin")
    (folder / "outside.bin").rename(tmp_path / "outside.bin")
    model = onnx.load(folder / "in.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    message = f"must be in its folder, got the location {location!r}"
    with pytest.raises(RotaryExportError, match=re.escape(message)):
        rotary_export.fuse(folder / "in.onnx")
    with pytest.raises(RotaryExportError, match=re.escape(message)):
        check_locations(model, "in.onnx")


@pytest.mark.parametrize("inside", ["branch", "constant"])
def test_external_data_of_inner_tensors_is_checked_too(inside):
    tensor = onnx.TensorProto(name="w", data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../w")
    constant = onnx.helper.make_node("Constant", [], ["w"], value=tensor)
    branch = onnx.helper.make_graph([], "branch", [], [], [tensor])
    node = onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    graph = onnx.helper.make_graph([node if inside == "branch" else constant], "graph", [], [])
    with pytest.raises(RotaryExportError, match=r"in its folder, got the location '\.\./w'"):
        check_locations(onnx.helper.make_model(graph), "in.onnx")
