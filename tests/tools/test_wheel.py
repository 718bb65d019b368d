"""`tools/wheel`: a wheel or an sdist with a wrong tag or a wrong file is found."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import build_wheel
import pytest
import wheel_files
from helpers.paths import CSRC, TOOLS
from wheel_files import LIBRARY, METADATA, PLATFORM, check_sdist, check_wheel, tag_wheel
from wheel_report import tabulate_installs, tabulate_tags

RESULTS = TOOLS / "results" / "wheel.json"
TRACKED = (".ci/run", "README.md", "rotary_export/__init__.py", "tests/test_a.py")
INFO = "rotary_export-1.0.dist-info"
IN_WHEEL = ("rotary_export/__init__.py", LIBRARY, *(f"{INFO}/{name}" for name in METADATA))
IN_SDIST = ("PKG-INFO", *TRACKED[1:])


def write_wheel(folder, tag, names):
    path = folder / f"rotary_export-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "")
    return path


@pytest.mark.parametrize(
    ("tag", "dropped", "added", "problem"),
    [
        (f"py3-none-manylinux2014_x86_64.{PLATFORM}", None, None, None),
        ("py3-none-linux_x86_64", None, None, f" is not py3-none-{PLATFORM}"),
        (f"cp311-none-{PLATFORM}", None, None, f" is not py3-none-{PLATFORM}"),
        (f"py3-none-{PLATFORM}", LIBRARY, None, f" lacks {LIBRARY}"),
        (f"py3-none-{PLATFORM}", None, "tests/test_a.py", " must not contain tests/test_a.py"),
        (f"py3-none-{PLATFORM}", None, "rotary_export.libs/libgcc.so", " must not contain rotary_"),
    ],
)
def test_wheels_are_checked(tmp_path, tag, dropped, added, problem):
    names = [name for name in (*IN_WHEEL, added) if name not in (dropped, None)]
    problems = check_wheel(write_wheel(tmp_path, tag, names), TRACKED)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


@pytest.mark.parametrize(
    ("dropped", "added", "problem"),
    [
        (None, None, None),
        ("tests/test_a.py", None, "a.tar.gz lacks tests/test_a.py"),
        (None, "build/rubbish.o", "a.tar.gz must not contain build/rubbish.o"),
        (None, ".ci/run", "a.tar.gz must not contain .ci/run"),
    ],
)
def test_sdists_are_checked(tmp_path, dropped, added, problem):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as file:
        for name in (*IN_SDIST, added):
            if name not in (dropped, None):
                file.addfile(tarfile.TarInfo(f"rotary_export-1.0/{name}"), io.BytesIO())
    assert check_sdist(tmp_path / "a.tar.gz", TRACKED) == ([problem] if problem else [])


def test_a_wheel_that_auditwheel_refuses_is_not_tagged(tmp_path):
    refuse = [sys.executable, "-c", "import sys; sys.exit('too recent: ' + sys.argv[3])"]
    with pytest.raises(RuntimeError, match=rf"a\.whl can't be {PLATFORM}: too recent: {PLATFORM}"):
        tag_wheel(Path("a.whl"), tmp_path, refuse)


def test_the_highest_glibc_is_compared_as_a_number(monkeypatch):
    symbols = "GLIBC_2.2.5 GLIBC_2.14 GLIBC_2.9"
    monkeypatch.setattr(wheel_files, "_read_elf", lambda option, library: symbols)
    assert wheel_files.find_highest_glibc(Path("a.so")) == (2, 14)


# ---- without a compiler


def test_cmake_says_that_there_is_no_compiler(tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake on the PATH (pip installs its own if there is none)")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("make", "ninja"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    done = subprocess.run(
        [cmake, "-S", str(CSRC), "-B", str(tmp_path / "build")],
        env={"PATH": str(programs)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    words = " ".join(done.stderr.split())
    assert f"(message): rotary_export: {build_wheel.NO_COMPILER[0]}" in words


OURS = """
      │ CMake Error: a C++17 compiler must be
      │   installed, found none that works
      rotary_export is not installed, since its op library was not built.
"""


@pytest.mark.parametrize(
    ("code", "output", "problem"),
    [
        (1, OURS, None),
        (0, OURS, "pip installed without a compiler"),
        (1, OURS + "Traceback (most recent call last):", "pip prints a traceback"),
        (1, OURS.replace("C++17", "C++"), f"pip does not print {build_wheel.NO_COMPILER[0]!r}"),
    ],
)
def test_the_refusal_is_judged(code, output, problem):
    assert build_wheel.judge_refusal(code, output) == ([problem] if problem else [])


# ---- the runs


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start another user's process")
def test_the_other_user_can_write_in_his_folder_alone():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        work = folder / "work"
        work.mkdir()
        script = "id -un; touch here; touch ../there 2>/dev/null || echo refused"
        told = build_wheel.run_as_user(["/bin/sh", "-c", script], work)
        assert told.split() == [build_wheel.USER, "refused"]
        assert (work / "here").owner() == build_wheel.USER
        assert not (folder / "there").exists()


def test_the_committed_results_have_tables_and_no_problem():
    found = json.loads(RESULTS.read_text())
    assert found["problems"] == []
    assert tuple(map(int, found["glibc"].split("."))) <= wheel_files.GLIBC
    for headers, rows in (tabulate_tags(found), tabulate_installs(found)):
        assert all(len(row) == len(headers) for row in rows)
    installs = [(row["what"], row["user"]) for row in found["installs"]]
    kinds = [f"{kind}, `[{extras}]`" for kind, extras, _ in build_wheel.INSTALLS]
    assert installs == [(kind, build_wheel.USER) for kind in kinds]
