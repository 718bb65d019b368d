"""What the kit for C++ with ONNX Runtime needs besides: the sources of the op library."""

from __future__ import annotations

import shutil
from pathlib import Path

from rotary_export.bundle.manifest import Manifest
from rotary_export.package import package_folders


def copy_op_library(staging: Path, manifest: Manifest, graph: str) -> None:
    """Copy the op library's sources: the kit builds it for the machine that it stands on."""
    del manifest, graph  # The library is the same for all.
    # More than one folder: an editable install keeps built files and sources apart.
    folders = [folder / "csrc" for folder in package_folders()]
    shutil.copytree(next(f for f in folders if f.is_dir()), staging / "csrc")
