"""Sessions that torch runs: TorchScript files, torch.export programs, compiled ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rotary_export.bundle.manifest import GraphInfo
from rotary_export.compat.quiet import quiet_loaders
from rotary_export.errors import RotaryExportError
from rotary_export.runtime.session import Session, Tensors, is_torch, make_bfloat16

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
                    self._module = _load_compiled(file)
        except Exception as error:  # torch's loaders let through what their parsers raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise RotaryExportError(
                f"torch {torch.__version__} can't load {file.name}: {reason}"
            ) from None

    def _run(self, inputs: Tensors, sizes: Mapping[str, int], wants_torch: bool) -> dict[str, Any]:
        tensors = [_to_torch(inputs[info.name]) for info in self.graph.inputs]
        with torch.no_grad():
            outputs = self._module(*tensors)
        # A scale of 1.0 is a constant of a TorchScript module; outputs are the caller's to change.
        outputs = [value.clone() if value.dim() == 0 else value for value in outputs]
        names = [info.name for info in self.graph.outputs]
        if wants_torch:
            return dict(zip(names, outputs, strict=True))
        return {name: _to_numpy(value) for name, value in zip(names, outputs, strict=True)}


def _load_compiled(file: Path) -> Callable[..., list[torch.Tensor]]:
    """Load what AOTInductor compiled, by the class that C++ programs use.

    `torch._inductor.aoti_load_package` compiles probes first, to warn of another machine.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1)

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = loader.boxed_run(list(tensors))
        return outputs

    return run


def _to_torch(value: Any) -> torch.Tensor:
    if is_torch(value):
        tensor: torch.Tensor = value.contiguous()  # a program may see it as flat
        return tensor
    # Contiguous, since torch knows no negative strides; writeable, or it warns of what we don't do.
    value = np.require(value, requirements=("C", "W"))
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(make_bfloat16())
    return tensor.numpy()
