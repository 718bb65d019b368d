"""Run in an environment that has the package installed: a bundle, on our kernel and without it.

    python -P smoke.py BUNDLE EXAMPLE

Prints what it found as JSON. `build_wheel.py` starts it as a user who may write nothing.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import rotary_export

PACKAGES = ("rotary_export", "numpy", "onnxruntime")
LIMIT = 8 * np.finfo(np.float32).eps  # of the function body, as tools/measure_minimum_ort allows


def compare(bundle: Path, example: Path, use_op_library: bool) -> dict[str, str]:
    """Run `rotate` on the example.

    Returns:
        What computed the rotation, and "bits", "equal" or what is wrong.
    """
    session = rotary_export.load(
        bundle, "rotate", use_op_library=use_op_library, require_fused=use_op_library
    )
    names = ("query", "key", "position_ids")
    got = session(**{name: np.load(example / f"{name}.npy") for name in names})
    outcome = "bits"
    for file in sorted((example / "expected").glob("*.npy")):
        want = np.load(file)
        error = np.abs(got[file.stem] - want).max() / np.abs(want).max()
        if not error <= LIMIT:
            outcome = f"WRONG: {file.stem} is off by {error:.2g} of its largest"
            break
        if not np.array_equal(got[file.stem], want):
            outcome = "equal"
    return {"kernel": session.kernel_path, "outcome": outcome}


def find_tags(package: str) -> list[str]:
    """Return the tags of the wheel that a package was installed from."""
    lines = (distribution(package).read_text("WHEEL") or "").splitlines()
    return [line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: ")]


def main() -> None:
    bundle, example = map(Path, sys.argv[1:])
    (folder,) = rotary_export.__path__
    found: dict[str, Any] = {
        "writable": os.access(folder, os.W_OK),
        "torch": find_spec("torch") is not None,
        "versions": {name: distribution(name).version for name in PACKAGES},
        "tags": {name: find_tags(name) for name in PACKAGES},
        "op library": compare(bundle, example, True),
        "function body": compare(bundle, example, False),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
