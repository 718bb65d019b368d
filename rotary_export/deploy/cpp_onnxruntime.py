"""What the kit for C++ with ONNX Runtime also contains."""

from __future__ import annotations

from pathlib import Path

from rotary_export.bundle.copy_files import copy_tree
from rotary_export.bundle.manifest import Manifest
from rotary_export.deploy.signature import write_decoder
from rotary_export.package import package_folders


def prepare_cpp_onnxruntime(staging: Path, manifest: Manifest, graph: str) -> None:
    """Copy the sources of the op library, which the kit builds for its own machine.

    A decoder also gets decoder.txt.
    """
    # More than one folder: an editable install keeps built files and sources apart.
    folders = [folder / "csrc" for folder in package_folders()]
    copy_tree(next(f for f in folders if f.is_dir()), staging / "csrc")
    write_decoder(staging, manifest, graph)
