"""`.pt`: TorchScript of aten ops only; it loads in any libtorch, with nothing to register.

This is the one file that calls `torch.jit.trace`. TorchScript is deprecated from torch 2.13 on;
its successor is the `.pt2` program.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from rotary_export.graphs.graph import Graph


def export_torchscript(graph: Graph, example: tuple[Tensor, ...], path: Path) -> None:
    """Write one graph as a `.pt` file.

    Args:
        graph: What to export.
        example: Inputs to trace with; shapes stay dynamic.
        path: The file to write.
    """
    save_traced(graph.module.eval(), example, path)


def save_traced(module: nn.Module, example: tuple[Tensor, ...], path: Path) -> None:
    """Trace a module and write it as a `.pt` file.

    Args:
        module: In eval mode.
        example: Inputs to trace with; shapes stay dynamic.
        path: The file to write.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)
        traced = torch.jit.trace(module, example, check_trace=False)
        torch.jit.save(traced, path)
    _strip_debug(path)


def _strip_debug(path: Path) -> None:
    """Leave out source paths, stack traces and the traced inputs; loaders don't need them."""
    whole = path.with_name(f".{path.name}.whole")
    path.rename(whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as stripped:
        for entry in source.infolist():
            if ".debug_pkl" not in entry.filename and "/traced_inputs" not in entry.filename:
                stripped.writestr(entry, source.read(entry))
    whole.unlink()
