"""Sessions that torch runs: TorchScript files, torch.export programs, compiled ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rotary_export.bundle.manifest import GraphInfo
from rotary_export.compat.quiet import quiet_loaders
from rotary_export.errors import RotaryExportError, first_line
from rotary_export.runtime.session import Session, Tensors
from rotary_export.runtime.tensors import to_numpy, to_torch

try:
    import torch
except ImportError:
    raise RotaryExportError(
        "the runtimes 'torchscript', 'program' and 'aoti' need torch: pip install torch"
    ) from None


class TorchSession(Session):
    """A `.pt`, `.pt2` or `.aoti.pt2` file, run by torch on the CPU."""

    def __init__(self, file: Path, graph_name: str, graph: GraphInfo, runtime: str) -> None:
        super().__init__(graph_name, graph, ("CPU (torch)",), "primitive")
        try:
            with quiet_loaders():
                if runtime == "torchscript":
                    self._module: Any = torch.jit.load(file)
                elif runtime == "program":
                    self._module = torch.export.load(file).module()
                else:
                    from rotary_export.compat.inductor import load_package

                    self._module = load_package(file)
        except Exception as error:  # torch's loaders let through what their parsers raise
            raise RotaryExportError(
                f"torch {torch.__version__} can't load {file.name}: {first_line(error)}"
            ) from None

    def _run(self, inputs: Tensors, sizes: Mapping[str, int], wants_torch: bool) -> dict[str, Any]:
        tensors = [to_torch(inputs[info.name]) for info in self.graph.inputs]
        with torch.no_grad():
            outputs = self._module(*tensors)
        # A scale of 1.0 is a constant of a TorchScript module; outputs are the caller's to change.
        outputs = [value.clone() if value.dim() == 0 else value for value in outputs]
        names = [info.name for info in self.graph.outputs]
        if wants_torch:
            return dict(zip(names, outputs, strict=True))
        return {name: to_numpy(value) for name, value in zip(names, outputs, strict=True)}
