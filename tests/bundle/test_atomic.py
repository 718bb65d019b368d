"""Folders and files that appear whole or not at all."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import rotary_export
from rotary_export import RotaryExportError
from rotary_export.bundle.atomic import check_file, check_folder, write_files, write_folder
from rotary_export.bundle.copy_files import copy_tree
from rotary_export.bundle.folder import find_out
from rotary_export.bundle.json_file import read_json
from rotary_export.cli.main import cli
from rotary_export.runtime.onnx_file import load_onnx_file


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


@pytest.fixture(params=[0o002, 0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_what_is_written_has_the_modes_of_new_files(tmp_path, umask):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "data").touch(0o600)
    (tmp_path / "source" / "tool").touch(0o755)
    (tmp_path / "source" / "tool").chmod(0o755)
    with write_folder(tmp_path / "deep" / "b", False, accept) as folder:
        copy_tree(tmp_path / "source", folder / "copy")
    with write_files(tmp_path / "m") as folder:
        (folder / "m").touch()
    modes = {
        str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777
        for path in tmp_path.rglob("*")
        if path.parts[-2] != "source" and path.name != "source"
    }
    assert modes == {
        "deep": 0o777 & ~umask,
        "deep/b": 0o777 & ~umask,
        "deep/b/copy": 0o777 & ~umask,
        "deep/b/copy/data": 0o666 & ~umask,
        "deep/b/copy/tool": 0o777 & ~umask,
        "m": 0o666 & ~umask,
    }


NAMES = ["x" * 250, "x" * 255, "\N{SNOWMAN}" * 85, "a" + "\N{EARTH GLOBE AMERICAS}" * 63]


@pytest.mark.parametrize("name", NAMES, ids=["250", "255", "three-bytes", "four-bytes"])
def test_names_may_be_as_long_as_the_system_allows(tmp_path, name):
    for text in ("old", "new"):
        with write_folder(tmp_path / "b" / name, True, accept) as folder:
            (folder / text).touch()
        with write_files(tmp_path / name) as folder:
            (folder / name).write_text(text)
    assert list_names(tmp_path) == sorted(["b", name])
    assert list_names(tmp_path / "b" / name) == ["new"]
    assert (tmp_path / name).read_text() == "new"


@pytest.mark.parametrize("path", ["a\0b", "a\ud83db"], ids=["nul", "surrogate"])
def test_what_is_not_a_path_is_refused(tmp_path, path):
    for call in (
        lambda: check_folder(tmp_path / path, True, accept),
        lambda: check_file(tmp_path / path, True),
        lambda: write_folder(tmp_path / path, True, accept).__enter__(),
        lambda: write_files(tmp_path / path).__enter__(),
        lambda: find_out(path),
        lambda: read_json(tmp_path / path),
        lambda: rotary_export.load(path),
        lambda: rotary_export.fuse(path),
        lambda: load_onnx_file(tmp_path / path),
    ):
        with pytest.raises(RotaryExportError, match=r"a path must be text without NUL, got .*a\\"):
            call()
    for command in (["inspect", path], ["export", "--out", path], ["run", "b", "--out", path]):
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 2
        assert result.stderr.startswith("rotary-export: a path must be text without NUL, got 'a")
        assert result.stderr.isprintable() or result.stderr.count("\n") == 1
    assert list_names(tmp_path) == []


def test_nothing_is_written_through_a_link(tmp_path):
    """Or in its place: neither the link nor what it points to is lost."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    (tmp_path / "file").write_text("old")
    for name in ("folder", "file", "missing"):
        (tmp_path / f"to-{name}").symlink_to(name)
        path, message = tmp_path / f"to-{name}", f"to-{name} is a symbolic link to {name}, which"
        for call in (
            lambda path=path: check_folder(path, True, accept),
            lambda path=path: check_file(path, True),
            lambda path=path: write_folder(path, True, accept).__enter__(),
        ):
            with pytest.raises(RotaryExportError, match=message):
                call()
        assert path.is_symlink()
    (tmp_path / "above").symlink_to("folder")
    with write_folder(tmp_path / "above" / "b", False, accept):
        pass
    assert list_names(tmp_path / "folder") == ["b", "old"]
    assert (tmp_path / "file").read_text() == "old"


def test_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(RotaryExportError, match="is not a regular file"):
            check_file(path, True)


@pytest.mark.parametrize(("flag", "message"), [(0, "Permission denied"), (1, "Read-only file sys")])
def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch, flag, message):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    monkeypatch.setattr(os, "statvfs", lambda *_: SimpleNamespace(f_flag=flag))
    for check in (lambda path: check_folder(path, False, accept), lambda p: check_file(p, False)):
        with pytest.raises(RotaryExportError, match=f"b can't be written: {message}"):
            check(tmp_path / "b")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space")])
def test_a_failure_in_a_folder_leaves_nothing(tmp_path, error):
    wanted = RotaryExportError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted), write_folder(tmp_path / "b", False, accept) as staging:
        fail(staging / "half", error)
    assert list_names(tmp_path) == []


def test_files_replace_those_of_their_names_the_main_one_last(tmp_path, monkeypatch):
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
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
