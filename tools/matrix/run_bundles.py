"""Run every bundle of a folder with the ONNX Runtime that is installed; needs no torch.

Writes the outputs beside each graph, and prints as JSON what went wrong: {"BUNDLE, KERNEL": ""}.
"""

import json
import sys
from pathlib import Path

import numpy as np

from rotary_export.errors import RotaryExportError
from rotary_export.runtime.load import load

KERNELS = {"op library": True, "function body": False}


def run(bundle: Path, kernel: str) -> str:
    """Run each graph of a bundle; return "", or why it can't be run."""
    for file in sorted(bundle.glob("*.in.npz")):
        graph = file.name.removesuffix(".in.npz")
        try:
            session = load(bundle, graph, use_op_library=KERNELS[kernel])
            outputs = session(**np.load(file))
        except RotaryExportError as error:
            return f"refused: {error}"
        np.savez(bundle / f"{graph}.{kernel.split()[0]}.npz", **outputs)
    return ""


bundles = sorted(Path(sys.argv[1]).iterdir())
print(json.dumps({f"{b.name}, {kernel}": run(b, kernel) for b in bundles for kernel in KERNELS}))
