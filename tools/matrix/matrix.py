#!/usr/bin/env python
"""Run bundles with other releases of ONNX Runtime, and export with other releases of packages.

    python tools/matrix/matrix.py --json tools/results/matrix.json
    python tools/matrix/matrix.py --only runtimes
    python tools/matrix/matrix.py --only packages --python DIR/bin/python --label "torch 2.14.1"

Each release is installed into a folder of its own, which Python finds first; what is installed
otherwise is not changed. `--python` takes an environment that was made by hand instead, as torch
releases with CUDA need one. Rows that are not measured stay in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matrix_bundles import BITS, make_bundles

ROOT = Path(__file__).parents[2]
RUNTIMES = (
    "1.20.1 1.21.1 1.22.1 1.23.2 1.24.4 1.25.1 1.26.0 1.27.0 1.28.0 1.29.0 1.30.0 1.31.1 1.32.0"
).split()
# The oldest and the newest release of each package, the others as in tools/constraints.txt.
PACKAGES: tuple[Mapping[str, str], ...] = (
    {},
    {"transformers": "5.18.0"},
    {"transformers": "5.24.0"},
    {"onnx": "1.23.0"},
    {"onnxscript": "0.7.0"},
)
KERNELS = ("op library", "function body")
EPSILONS = {"float32": 2.0**-23, "float16": 2.0**-10}
_LIMIT = 256  # ulp of the largest: as the proof allows a whole model
Row = dict[str, Any]


def measure_runtimes(versions: Sequence[str], folder: Path) -> Iterator[Row]:
    """Run every bundle with each release of ONNX Runtime; yield a row for each release."""
    bundles = make_bundles(folder / "bundles")
    bare = folder / "bare"
    venv.create(bare, with_pip=True)
    install = [str(bare / "bin" / "pip"), "install", "--quiet", "--no-compile"]
    _call([*install, "numpy", "ml_dtypes", "protobuf", "flatbuffers"])
    for version in versions:
        releases = folder / version
        _call([*install, "--no-deps", "--target", str(releases), f"onnxruntime=={version}"])
        path = os.pathsep.join((str(releases), str(folder / "package")))
        script = Path(__file__).with_name("run_bundles.py")
        command = [str(bare / "bin" / "python"), "-P", str(script), str(folder / "bundles")]
        done = _run(command, path)
        rows = json.loads(done.stdout) if done.returncode == 0 else {}
        outcomes = {
            f"{name}, {kernel}": _judge(folder / "bundles" / name, kernel, rows, done.returncode)
            for name in bundles
            for kernel in KERNELS
        }
        yield {"onnxruntime": version, "outcomes": outcomes}


def _judge(bundle: Path, kernel: str, rows: Mapping[str, str], code: int) -> str:
    """Return "bits", "equal", "refused: ..." or what is wrong."""
    if code != 0:
        return f"WRONG: the process ended with {code}"
    problem = rows[f"{bundle.name}, {kernel}"]
    if problem:
        return problem
    exact = True
    for file in sorted(bundle.glob("*.want.npz")):
        got = np.load(file.with_name(file.name.replace("want", kernel.split()[0])))
        for name, want in np.load(file).items():
            exact &= bool(np.array_equal(got[name], want))
            largest = np.abs(want.astype(np.float64)).max() or 1.0
            error = np.abs(got[name].astype(np.float64) - want).max() / largest
            unit = EPSILONS.get(want.dtype.name, 2.0**-52)
            if not error / unit <= _LIMIT:
                return f"WRONG: {name} is off by {error:.2g} of its largest"
    return BITS if exact else "equal"


def measure_packages(
    environments: Sequence[Mapping[str, str]], python: str, label: str, folder: Path
) -> Iterator[Row]:
    """Export a module and two models in each environment; yield a row for each."""
    script = Path(__file__).with_name("try_exports.py")
    for index, changed in enumerate(environments):
        overlay = folder / f"overlay-{index}"
        overlay.mkdir()
        for name, version in changed.items():
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            _call([*install, "--target", str(overlay), f"{name}=={version}"])
        path = os.pathsep.join((str(overlay), str(ROOT), str(Path(__file__).parent)))
        done = _run([python, "-P", str(script), str(folder / f"out-{index}")], path)
        lines = done.stdout.splitlines()
        found = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
        tests = [python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
        tested = _run([*tests, str(ROOT / "tests" / "compat")], path)
        yield {
            "environment": label or ", ".join(map(" ".join, changed.items())) or "as constrained",
            "versions": found.get("versions", {}),
            "exports": found.get("exports", {"all": _describe_end(done)}),
            "compat": _find_summary(tested),
        }


def _describe_end(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return f"WRONG: {lines[-1] if lines else f'ended with {done.returncode}'}"


def _find_summary(tested: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in tested.stdout.splitlines() if "passed" in line or "failed" in line]
    return lines[-1].split(" in ")[0] if lines else _describe_end(tested)


def _run(command: Sequence[str], path: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def _call(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("runtimes", "packages"))
    parser.add_argument("--runtime", action="append", help="a release of ONNX Runtime")
    parser.add_argument("--python", default=sys.executable, help="of an environment made by hand")
    parser.add_argument("--label", default="", help="the name of that environment")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[Row]] = {"runtimes": [], "packages": []}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text(encoding="utf-8"))
    wrong = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "package").mkdir()
        (folder / "package" / "rotary_export").symlink_to(ROOT / "rotary_export")
        measured: list[tuple[str, str, Iterator[Row]]] = []
        if options.only != "packages":
            versions = options.runtime or RUNTIMES
            measured.append(("runtimes", "onnxruntime", measure_runtimes(versions, folder)))
        if options.only != "runtimes":
            environments = ({},) if options.label else PACKAGES
            rows = measure_packages(environments, options.python, options.label, folder)
            measured.append(("packages", "environment", rows))
        for part, key, rows in measured:
            for row in rows:
                print(json.dumps(row), flush=True)
                wrong |= "WRONG" in json.dumps(row) or "failed" in row.get("compat", "")
                found[part] = [old for old in found[part] if old[key] != row[key]] + [row]
                if options.json:
                    text = json.dumps(found, indent=1) + "\n"
                    options.json.write_text(text, encoding="utf-8")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
