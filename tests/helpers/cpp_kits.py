"""How the tests of the C++ targets build a kit and run its program."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.bundles import to_numpy

VERSION = torch.__version__.partition("+")[0]


def build_kit(kit: Path) -> Path:
    """Build a kit as its page says, and return the program."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-B", "build", prefix], ["cmake", "--build", "build"]):
        done = subprocess.run(command, cwd=kit, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return kit / "build" / "run"


def run_kit(program: Path, kit: Path, file: str, *folders: Path, **environment: str) -> Any:
    """Run a program where its kit is."""
    command = [program, f"bundle/{file}", "signature.txt", *folders]
    return subprocess.run(
        command, cwd=kit, capture_output=True, text=True, check=False, env=environment or None
    )


def write_folder(folder: Path, arrays: Mapping[str, Any]) -> Path:
    """Write inputs for the program."""
    folder.mkdir()
    for name, value in arrays.items():
        np.save(folder / f"{name}.npy", value)
    return folder


def read_folder(folder: Path, want: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read what the program wrote; numpy knows no bfloat16, so `want` says where it is."""
    arrays = {file.stem: np.load(file) for file in (folder / "out").glob("*.npy")}
    return {
        name: value.view(want[name].dtype) if value.dtype.kind == "V" else value
        for name, value in arrays.items()
    }


def to_arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return eager's outputs in numpy."""
    return {name: to_numpy(value) for name, value in tensors.items()}
