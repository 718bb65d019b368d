"""`tools/soak/kills.py`: nothing is lost, mixed or left; and what is, it finds."""

import os
import random
import subprocess
import sys
from pathlib import Path

import kills
import pytest
from kill_works import WORKS, Work, make_sources
from soak_report import tabulate_kills

from rotary_export.errors import RotaryExportError

QUICK = [work for work in WORKS if work.name in ("`fuse --force`", "`run --out`")]
BAD = ("lost", "mixed", "rubbish", "failed")


def test_a_few_kills_lose_nothing():
    results = kills.kill_all(QUICK, 8, seed=1)
    for row in results["rows"]:
        assert row["placed"] == 2
        assert row["random"] <= 2  # a run may end before each of its tries
        assert not any(row[name] for name in BAD), row
    headers, rows = tabulate_kills(results)
    assert [len(row) for row in rows] == 3 * [len(headers)]
    assert rows[-1][:3] == ["all", results["kills"] - 4, 4]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    make_sources(folder)
    return folder


def write_without_care(folder: Path, version: int) -> None:
    """Write in place, as a program does that does not think of kills."""
    for name in ("a", "b"):
        os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT))
        (folder / name).write_text(str(version))
    os.mkdir(folder / f"left{random.random()}")


def read(folder: Path) -> tuple[int, set[str]]:
    first, second = ((folder / name).read_text() for name in ("a", "b"))
    if first != second:
        raise kills.MixedError(f"{first} and {second}")
    return int(first), {"a", "b"}


def test_what_is_wrong_is_counted(tmp_path, capsys):
    row = kills.kill_work(Work("x", write_without_care, read), tmp_path, 6, random.Random(0))
    assert row["lost"] + row["mixed"] > 0
    assert row["rubbish"] == 6
    assert "beside the output" in capsys.readouterr().err


@pytest.mark.parametrize("work", [WORKS[0], *WORKS[2:]], ids=lambda work: work.name.strip("`"))
def test_each_work_tells_its_versions_apart(work, sources):
    folder = sources / "work"
    for version in (1, 0):
        folder.mkdir(exist_ok=True)
        work.write(folder, version)
        assert work.read(folder)[0] == version
    names = {path.name for path in folder.iterdir()}
    assert work.read(folder)[1] == names
    for path in folder.iterdir():
        path.rename(sources / f"{os.urandom(4).hex()}")
    with pytest.raises((RotaryExportError, OSError)):
        work.read(folder)


# Forks, so it needs a process that has not run torch's threads.
KILL_BETWEEN_RENAMES = """
import os, signal, sys
from collections import Counter
from pathlib import Path

import kills
from kill_works import WORKS, make_sources

sources = Path(sys.argv[1])
make_sources(sources)
work = next(work for work in WORKS if "no exchange" in work.name)
folder = sources / "restored"
folder.mkdir()
assert kills.run_child(lambda: work.write(folder, 0)) == 0
rename = Path.rename


def kill(path, other):
    if other.name == "out":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, other)


Path.rename = kill
assert os.WIFSIGNALED(kills.run_child(lambda: work.write(folder, 1)))
Path.rename = rename
assert not (folder / "out").exists()
found = Counter()
assert kills.look(work, folder, found) == 0
assert found == {"restored": 1}
"""


def test_a_kill_between_the_renames_is_restored(tmp_path):
    """Where folders can't be exchanged."""
    command = [sys.executable, "-c", KILL_BETWEEN_RENAMES, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
