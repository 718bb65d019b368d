"""Sessions that torch runs: TorchScript files, torch.export programs, compiled ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rotary_export.bundle.manifest import GraphInfo
from rotary_export.errors import RotaryExportError, first_line
from rotary_export.runtime.session import Session, Tensors
from rotary_export.runtime.tensors import to_numpy, to_torch
from rotary_export.runtime.torch_files import open_torch_file, torch


class TorchSession(Session):
    """A `.pt`, `.pt2` or `.aoti.pt2` file, run by torch on the CPU."""

    def __init__(self, file: Path, graph_name: str, graph: GraphInfo, runtime: str) -> None:
        super().__init__(graph_name, graph, ("CPU (torch)",), "primitive")
        opened = open_torch_file(file, runtime)
        self._module: Any = opened.module() if runtime == "program" else opened

    def _run(self, inputs: Tensors, sizes: Mapping[str, int], wants_torch: bool) -> dict[str, Any]:
        tensors = [to_torch(inputs[info.name]) for info in self.graph.inputs]
        try:
            with torch.no_grad():
                outputs = [*self._module(*tensors)]
            # A scale of 1.0 is a constant of a TorchScript module; outputs are the caller's.
            outputs = [value.clone() if value.dim() == 0 else value for value in outputs]
        except Exception as error:  # whatever an operator of torch raises
            raise RotaryExportError(f"torch, {self.graph_name}: {first_line(error)}") from error
        if len(outputs) != len(self.graph.outputs):
            raise RotaryExportError(
                f"torch, {self.graph_name}: the file has {len(outputs)} outputs, the manifest "
                f"{len(self.graph.outputs)}"
            )
        names = [info.name for info in self.graph.outputs]
        if wants_torch:
            return dict(zip(names, outputs, strict=True))
        return {name: to_numpy(value) for name, value in zip(names, outputs, strict=True)}
