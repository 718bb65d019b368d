"""`.pt`: TorchScript of aten ops only; it loads in any libtorch, with nothing to register.

This is the one file that calls `torch.jit.trace`. TorchScript is deprecated from torch 2.13 on;
its successor is the `.pt2` program.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from rotary_export.exporters.graphs import Graph


def export_torchscript(graph: Graph, example: tuple[Tensor, ...], path: Path) -> None:
    """Write one graph as a `.pt` file.

    Args:
        graph: What to export.
        example: Inputs to trace with; shapes stay dynamic.
        path: The file to write.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)
        traced = torch.jit.trace(graph.module.eval(), example, check_trace=False)
        torch.jit.save(traced, path)
    _strip_debug(path)


def _strip_debug(path: Path) -> None:
    """Leave out source paths, stack traces and the traced inputs; loaders don't need them."""
    whole = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(path, "w") as stripped:
        for entry in source.infolist():
            if ".debug_pkl" not in entry.filename and "/traced_inputs" not in entry.filename:
                stripped.writestr(entry, source.read(entry))
