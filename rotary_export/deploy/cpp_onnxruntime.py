"""The kit for C++ with ONNX Runtime also contains the sources of the op library."""

from __future__ import annotations

from pathlib import Path

from rotary_export.bundle.copy_files import copy_tree
from rotary_export.bundle.manifest import Manifest
from rotary_export.package import package_folders


def copy_op_library(staging: Path, manifest: Manifest, graph: str) -> None:
    """Copy the sources of the op library, which the kit builds for its own machine."""
    del manifest, graph  # The library does not depend on the bundle.
    # More than one folder: an editable install keeps built files and sources apart.
    folders = [folder / "csrc" for folder in package_folders()]
    copy_tree(next(f for f in folders if f.is_dir()), staging / "csrc")
