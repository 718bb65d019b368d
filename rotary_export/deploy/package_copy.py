"""A copy of this package, for servers: it is on no index, and they may not have it installed."""

from __future__ import annotations

from pathlib import Path

from rotary_export.bundle.copy_files import copy_tree
from rotary_export.bundle.manifest import Manifest
from rotary_export.package import package_folders

# Files that a server does not need.
NOT_COPIED = ("csrc", "kits", "__pycache__", "librotary_export.so.*")


def copy_package(to: Path) -> None:
    """Copy this package, with its op library, into a new folder."""
    # More than one folder: an editable install keeps built files and sources apart.
    for folder in package_folders():
        copy_tree(folder, to, NOT_COPIED)


def prepare_ray(staging: Path, manifest: Manifest, graph: str) -> None:
    """Copy the package beside the application."""
    del manifest, graph  # The package does not depend on the bundle.
    copy_package(staging / "rotary_export")
