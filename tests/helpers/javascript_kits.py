"""The kits for Node.js and for browsers: bundles, cases, and how they are run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from helpers.bundles import get_bundle, make_arrays, run_eager, to_numpy
from helpers.target_runs import get_model_bundle, make_model_arrays, require, run_model_eager

from rotary_export.deploy.deploy import deploy
from rotary_export.proof.tolerances import TOLERANCES
from rotary_export.runtime.ways import FUNCTION_BODY

NEWEST, OLDEST = "1.30.0", "1.25.1"  # of what setup_targets installs
SHAPES = ((1, 1), (3, 7), (2, 32))  # batch_size, seq_len; none was traced
MODEL_SHAPES = ((1, 1), (3, 9))
# Type: bundles, and how much the function body may differ from eager.
BUNDLES = {
    "float32": {"plain": "native", "xpos": "native-xpos", "opset18": "exact"},
    "float16": {"float16": "native-half"},
}
Arrays = Mapping[str, np.ndarray]


def find_allowed(tolerance: str, dtype: str) -> float:
    """Return a tolerance, relative to the largest magnitude of an output.

    For a model it is what its proof allows.
    """
    ulp = TOLERANCES[tolerance].max_ulp
    if tolerance == "model":
        rows = get_model_bundle().report.rows
        ulp = next(row.eager_allowed for row in rows if row.runtime == FUNCTION_BODY.name)
    return ulp * float(ml_dtypes.finfo(dtype).eps)


def name_shapes(shapes: Sequence[tuple[int, int]]) -> list[str]:
    return [f"{batch}x{length}" for batch, length in shapes]


def make_kit(target: str, name: str, folder: Path, runtime: str = ".") -> Path:
    """Deploy one of bundles.SPECS, or "model"; packages come from where setup_targets put them."""
    bundle = get_model_bundle() if name == "model" else get_bundle(name)
    kit = deploy(target, bundle.path, folder / name)
    (kit / "node_modules").symlink_to(require(target) / runtime / "node_modules")
    return kit


def make_case(name: str, shape: tuple[int, int]) -> tuple[Arrays, Arrays]:
    """Make inputs, and eager's outputs."""
    if name == "model":
        inputs = make_model_arrays(*shape)
        return inputs, run_model_eager(inputs)
    inputs = make_arrays(name, batch=shape[0], seq_len=shape[1])
    return inputs, {k: to_numpy(v) for k, v in run_eager(name, inputs).items()}


def save_case(folder: Path, inputs: Arrays, expected: Arrays) -> None:
    """Write a folder as `example` is."""
    for place, arrays in ((folder, inputs), (folder / "expected", expected)):
        place.mkdir()
        for name, array in arrays.items():
            np.save(place / f"{name}.npy", array)


def check_pins(kit: Path, runtime: str) -> None:
    """Check that the kit pins the newest runtime, and its lock file what is installed."""
    assert json.loads((kit / "package.json").read_text())["dependencies"][runtime] == NEWEST
    lock = (kit / "package-lock.json").read_text()
    assert "resolved" not in lock  # no registry's address
    installed = json.loads((kit / "node_modules" / ".package-lock.json").read_text())["packages"]
    assert installed == {k: v for k, v in json.loads(lock)["packages"].items() if k}


def run_node(target: str, kit: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    """Run Node.js in a kit."""
    require(target)
    command = [str(require("node") / "node"), *map(str, words)]
    return subprocess.run(
        command, cwd=kit, capture_output=True, text=True, check=False, timeout=240
    )
