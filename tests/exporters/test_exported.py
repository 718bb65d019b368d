"""The committed bundles are what the code exports, and the README is what the code says."""

import inspect
import re
import shutil

import onnx
import pytest
import rebuild_exported
import update_pages
from helpers.paths import EXPORTED, ROOT

import rotary_export
from rotary_export.bundle.manifest import FILE_NAME, hash_file

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", rebuild_exported.BUNDLES)
def test_no_drift(name, tmp_path):
    rebuild_exported.build(name, tmp_path / name, force=False)
    assert list(rebuild_exported.find_drift(EXPORTED / name, tmp_path / name)) == []


@pytest.mark.parametrize("name", rebuild_exported.BUNDLES)
def test_committed_bundle_is_proven_here(name):
    report = rotary_export.verify(EXPORTED / name)
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


@pytest.mark.parametrize("document", update_pages.DOCUMENTS)
def test_tables_are_up_to_date(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert update_pages.fill(document, text) == text


@pytest.mark.parametrize("block", re.findall(r"```python\n(?!class)(.*?)```", README, re.DOTALL))
def test_readme_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_readme_class_definition_is_the_code():
    shown = re.search(r"def __init__\((.*?)\): \.\.\.", README, re.DOTALL)[1]
    namespace = {}
    exec(f"def shown({shown}): ...", namespace)
    real = inspect.signature(rotary_export.RotaryEmbedding.__init__).parameters
    for name, parameter in inspect.signature(namespace["shown"]).parameters.items():
        assert (parameter.kind, parameter.default) == (real[name].kind, real[name].default)
    assert list(real) == re.findall(r"(\w+)(?:=[^,]*)?,", shown)


def test_ci_runs_the_readme_test_command():
    command = re.findall(r"```bash\n(.*pytest)\n```", README)[0]
    assert command in (ROOT / ".ci" / "run").read_text()
