"""The committed bundles are what the code exports."""

import shutil

import onnx
import pytest
import rebuild_exported
from helpers.paths import EXPORTED

import rotary_export
from rotary_export.bundle.manifest import FILE_NAME, hash_file


@pytest.mark.parametrize("name", rebuild_exported.BUNDLES)
def test_no_drift(name, tmp_path):
    rebuild_exported.build(name, tmp_path / name, force=False)
    assert list(rebuild_exported.find_drift(EXPORTED / name, tmp_path / name)) == []


@pytest.mark.parametrize("name", rebuild_exported.BUNDLES)
def test_committed_bundle_is_proven_here(name):
    report = rotary_export.verify(EXPORTED / name, allow_code=True)
    assert report.passed
    assert report.skipped == {}


def test_no_drift_of_the_example(tmp_path):
    new = rebuild_exported.make_example(tmp_path)
    assert list(rebuild_exported.find_example_drift(new)) == []
    (new / "key.npy").write_bytes(b"")
    assert list(rebuild_exported.find_example_drift(new)) == ["example/key.npy differs"]


def test_drift_is_found(tmp_path):
    copy = tmp_path / "plain"
    shutil.copytree(EXPORTED / "plain", copy)
    model = onnx.load(copy / "rotate.onnx")
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("interleaved", 1))
    onnx.save(model, copy / "rotate.onnx")
    manifest = (copy / FILE_NAME).read_text()
    old = hash_file(EXPORTED / "plain" / "rotate.onnx")
    (copy / FILE_NAME).write_text(manifest.replace(old, hash_file(copy / "rotate.onnx")))
    drift = list(rebuild_exported.find_drift(copy, EXPORTED / "plain"))
    assert drift == ["rotate.onnx: the graph differs"]
