"""What a killed run leaves beside its target, and what the next run does with it."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.paths import EXPORTED

import rotary_export
from rotary_export import RotaryExportError
from rotary_export.bundle import atomic, staging
from rotary_export.bundle.atomic import check_folder, write_files, write_folder
from rotary_export.cli.main import cli
from rotary_export.errors import InterruptedWarning

load_module = importlib.import_module("rotary_export.runtime.load")  # also a function's name


def accept(path: Path) -> None:
    """Accept every folder as one that may be replaced."""


def run_killed(work: Callable[[], object]) -> None:
    """Run in a child process that kills itself."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def kill() -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def write(path: Path, text: str, before: Callable[[], object] = lambda: None) -> None:
    """Write a folder with one file."""
    with write_folder(path, True, accept) as folder:
        (folder / "file").write_text(text)
        before()


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_next_run_deletes_what_a_killed_one_left_and_says_so(tmp_path):
    out = tmp_path / "b"
    run_killed(lambda: write(out, "1", kill))
    (left,) = list_names(tmp_path)
    assert left.startswith(".b.")
    with pytest.warns(InterruptedWarning, match=f"was interrupted and left .*{left}: deleted it$"):
        write(out, "2")
    assert list_names(tmp_path) == ["b"]
    assert (out / "file").read_text() == "2"


def test_a_check_deletes_it_too(tmp_path):
    run_killed(lambda: write(tmp_path / "b", "1", kill))
    with pytest.warns(InterruptedWarning):
        check_folder(tmp_path / "b", False, accept)
    assert list_names(tmp_path) == []


def test_the_folder_of_a_run_that_goes_on_is_left(tmp_path):
    def write_meanwhile() -> None:
        write(tmp_path / "b", "2")
        assert (tmp_path / "b" / "file").read_text() == "2"

    write(tmp_path / "b", "1", write_meanwhile)
    assert list_names(tmp_path) == ["b"]
    assert (tmp_path / "b" / "file").read_text() == "1"


def test_only_folders_that_were_left_by_a_run_are_deleted(tmp_path):
    prefix = staging._make_prefix("b")
    other = staging._make_prefix("c")
    for name in (".b.12345678", f"{prefix}1234567", f"{prefix}123456789", f"{other}12345678"):
        (tmp_path / name).mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / f"{prefix}00000000").symlink_to(tmp_path / "target")
    (tmp_path / f"{prefix}11111111").write_text("a file")
    before = list_names(tmp_path)
    write(tmp_path / "b", "1")
    assert list_names(tmp_path) == sorted([*before, "b"])


def test_what_is_of_another_user_is_not_deleted(tmp_path, monkeypatch):
    run_killed(lambda: write(tmp_path / "b", "1", kill))
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    write(tmp_path / "b", "2")
    assert len(list_names(tmp_path)) == 2


def test_a_killed_exchange_leaves_one_of_both(tmp_path, monkeypatch):
    out = tmp_path / "b"
    write(out, "old")
    monkeypatch.setattr(atomic, "exchange", lambda *paths: staging.exchange(*paths) and kill())
    run_killed(lambda: write(out, "new"))
    monkeypatch.undo()
    assert (out / "file").read_text() == "new"
    with pytest.warns(InterruptedWarning, match="deleted it$"):
        write(out, "newer")
    assert list_names(tmp_path) == ["b"]


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A bundle whose replacement was killed between the renames of a system without exchange."""
    out = tmp_path / "b"
    write(out, "old")
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "exchange", lambda *_: False)
        patch.setattr(Path, "rename", lambda a, b: kill() if b == out else rename(a, b))
        run_killed(lambda: write(out, "new"))
    assert not out.exists()
    return out


def test_without_exchange_the_next_run_restores_the_old_folder(out):
    with pytest.warns(InterruptedWarning, match=f"restored {out} from it and deleted it$"):
        check_folder(out, True, accept)
    assert (out / "file").read_text() == "old"
    assert list_names(out.parent) == ["b"]


def test_until_then_load_and_inspect_name_it(out):
    message = f"it has no manifest.json; an interrupted run left it in {out.parent}/.b.*/old"
    with pytest.raises(RotaryExportError, match=message):
        rotary_export.load(out)
    result = CliRunner().invoke(cli, ["inspect", str(out)])
    assert result.exit_code == 2
    assert "an interrupted run left it in" in result.stderr
    out.mkdir()
    with pytest.raises(RotaryExportError, match=r"it has no manifest.json$"):
        rotary_export.load(out)


def test_the_old_folder_replaces_an_empty_one(out):
    out.mkdir()
    with pytest.warns(InterruptedWarning, match="restored"):
        check_folder(out, True, accept)
    assert (out / "file").read_text() == "old"


def test_the_old_folder_is_kept_where_something_else_was_made_since(out):
    out.mkdir()
    (out / "mine").touch()
    with pytest.warns(InterruptedWarning, match="can't be cleared: Directory not empty"):
        check_folder(out, True, accept)
    (left,) = set(list_names(out.parent)) - {"b"}
    assert (out.parent / left / "old" / "file").read_text() == "old"
    assert list_names(out) == ["mine"]


def test_a_bundle_that_is_replaced_while_it_is_loaded_is_refused(tmp_path, monkeypatch):
    """Its manifest would be of one bundle, its graph of another."""
    for name in ("b", "other"):
        shutil.copytree(EXPORTED / "plain", tmp_path / name)
    check = load_module.check_files

    def replace(*arguments):
        check(*arguments)
        assert staging.exchange(tmp_path / "b", tmp_path / "other")

    rotary_export.load(tmp_path / "b")
    monkeypatch.setattr(load_module, "check_files", replace)
    with pytest.raises(RotaryExportError, match="b was replaced while it was being loaded: load"):
        rotary_export.load(tmp_path / "b")


def test_a_command_prints_it_as_a_line(tmp_path):
    run_killed(lambda: write(tmp_path / "kit", "1", kill))
    arguments = ["deploy", "node", str(EXPORTED / "plain"), "--out", str(tmp_path / "kit")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("rotary-export: an earlier run was interrupted and left ")
    assert result.stderr.count("interrupted") == 1


@pytest.mark.parametrize("code", [38, 22, 95])
def test_where_folders_can_t_be_exchanged_they_are_renamed(tmp_path, monkeypatch, code):
    class Library:
        @staticmethod
        def renameat2(*_):
            staging.ctypes.set_errno(code)
            return -1

    write(tmp_path / "b", "old")
    monkeypatch.setattr(staging.ctypes, "CDLL", lambda *_, **__: Library)
    write(tmp_path / "b", "new")
    assert (tmp_path / "b" / "file").read_text() == "new"
    assert list_names(tmp_path) == ["b"]
    monkeypatch.setattr(staging.ctypes, "CDLL", lambda *_, **__: None)
    write(tmp_path / "b", "newer")
    assert (tmp_path / "b" / "file").read_text() == "newer"
    monkeypatch.undo()
    with pytest.raises(OSError, match="No such file"):
        staging.exchange(tmp_path / "b", tmp_path / "missing")


def test_where_files_can_t_be_locked_what_was_left_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(37, "No locks available")

    run_killed(lambda: write(tmp_path / "b", "1", kill))
    monkeypatch.setattr(staging.fcntl, "flock", fail)
    with pytest.warns(InterruptedWarning, match="may be of an interrupted run, but can't be locke"):
        write(tmp_path / "b", "2")
    assert len(list_names(tmp_path)) == 2
    assert (tmp_path / "b" / "file").read_text() == "2"


def name_data(path: Path) -> set[Path]:
    """Return what a file names: its content is the name of its data."""
    return {path.with_name(path.read_text())} if path.exists() else set()


def write_pair(path: Path, data: str) -> None:
    with write_files(path, name_data) as folder:
        (folder / path.name).write_text(data)
        (folder / data).write_text(data)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("data", ["first", "second"])
def test_a_file_never_names_the_data_of_another(tmp_path, monkeypatch, at, data):
    """Killed before its data is moved, before it is, and before the old data is deleted."""
    path = tmp_path / "m"
    write_pair(path, "first")
    calls = []

    def count(change):
        def call(*args, **options):
            calls.append(args)
            return kill() if len(calls) == at else change(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", count(os.replace))
        patch.setattr(Path, "unlink", count(Path.unlink))
        run_killed(lambda: write_pair(path, "second"))
    assert path.read_text() == ("second" if at == 3 else "first")
    assert (tmp_path / path.read_text()).read_text() == path.read_text()
    with pytest.warns(InterruptedWarning):
        write_pair(path, data)
    assert list_names(tmp_path) == [data, "m"] if data < "m" else ["m", data]
    assert (tmp_path / data).read_text() == path.read_text() == data


def test_old_data_is_not_deleted_for_a_killed_run_if_it_is_named_again(tmp_path, monkeypatch):
    path = tmp_path / "m"
    write_pair(path, "first")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: kill())
        run_killed(lambda: write_pair(path, "second"))
    assert list_names(tmp_path)[1:] == ["first", "m", "second"]
    path.write_text("first")  # as from a backup
    with pytest.warns(InterruptedWarning):
        staging.clear_interrupted(path, name_data)
    assert list_names(tmp_path) == ["first", "m", "second"]
