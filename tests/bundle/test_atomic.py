"""Folders and files that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from rotary_export import RotaryExportError
from rotary_export.bundle import atomic
from rotary_export.bundle.atomic import check_file, check_folder, write_files, write_folder


def accept(path: Path) -> None:
    """Accept every folder as one that may be replaced."""


def refuse(path: Path) -> None:
    raise RotaryExportError(f"{path} is somebody's")


def fail(file: Path, error: BaseException) -> None:
    """Write half a file."""
    file.touch()
    raise error


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced_only_with_force(tmp_path):
    (tmp_path / "b").mkdir()
    check_folder(tmp_path / "b", False, refuse)  # an empty one is as good as none
    (tmp_path / "b" / "old").touch()
    with pytest.raises(RotaryExportError, match="exists; force=True"):
        check_folder(tmp_path / "b", False, accept)
    with pytest.raises(RotaryExportError, match="is somebody's"):
        check_folder(tmp_path / "b", True, refuse)
    with write_folder(tmp_path / "b", True, accept) as staging:
        (staging / "new").touch()
        assert list_names(tmp_path / "b") == ["old"]
    assert list_names(tmp_path / "b") == ["new"]
    assert list_names(tmp_path) == ["b"]


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RotaryExportError, match="file/b can't be written: Not a directory"):
        check_folder(tmp_path / "file" / "b", True, accept)
    with pytest.raises(RotaryExportError, match="can't be written: File name too long"):
        check_folder(tmp_path / "b" / ("c" * 300), True, accept)
    with pytest.raises(RotaryExportError, match="missing/m can't be written: No such file"):
        check_file(tmp_path / "missing" / "m", True)
    check_folder(tmp_path / "deep" / "er", False, refuse)
    check_file(tmp_path / "m", False)
    assert list_names(tmp_path) == ["file"]


def test_a_folder_is_readable_by_others(tmp_path):
    with write_folder(tmp_path / "deep" / "b", False, accept):
        pass
    assert (tmp_path / "deep" / "b").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space")])
def test_a_failure_in_a_folder_leaves_nothing(tmp_path, error):
    wanted = RotaryExportError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted), write_folder(tmp_path / "b", False, accept) as staging:
        fail(staging / "half", error)
    assert list_names(tmp_path) == []


def test_files_replace_those_of_their_names_the_main_one_last(tmp_path, monkeypatch):
    moved = []
    replace = os.replace
    monkeypatch.setattr(
        atomic.os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b))
    )
    (tmp_path / "m.onnx").write_text("old")
    with write_files(tmp_path / "m.onnx") as staging:
        (staging / "m.onnx").write_text("new")
        (staging / "m.onnx.data").write_text("data")
        (staging / "z").write_text("last by name")
        assert (tmp_path / "m.onnx").read_text() == "old"
    assert moved == ["m.onnx.data", "z", "m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "new"
    assert list_names(tmp_path) == ["m.onnx", "m.onnx.data", "z"]


def test_files_of_a_failure_are_not_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), write_files(tmp_path / "m") as staging:
        fail(staging / "m", KeyboardInterrupt())
    assert list_names(tmp_path) == []
    with pytest.raises(RotaryExportError, match="missing/m can't be written: No such file"):
        with write_files(tmp_path / "missing" / "m"):
            pass


def test_a_file_is_replaced_only_with_force(tmp_path):
    check_file(tmp_path / "m", False)
    (tmp_path / "m").touch()
    check_file(tmp_path / "m", True)
    with pytest.raises(RotaryExportError, match="exists; force=True"):
        check_file(tmp_path / "m", False)
    with pytest.raises(RotaryExportError, match="is a folder"):
        check_file(tmp_path, True)
    with pytest.raises(RotaryExportError, match="can't be written: File name too long"):
        check_file(tmp_path / ("m" * 300), True)
