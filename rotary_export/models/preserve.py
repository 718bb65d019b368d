"""A model as it was: modes, buffers and the attributes that its modules keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.models.calls import is_rotary_name

_OF_TORCH = vars(nn.Module()).keys()  # modes, parameters, buffers, modules and hooks
_MAX_COPIED = 2**22  # elements of a buffer that is kept as a copy; larger ones only by reference


class Snapshot:
    """What a run or a trace may change in a model; its parameters are not copied.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._buffers: list[tuple[dict[str, Any], str, Any, Tensor | None]] = []
        self._attributes: list[tuple[nn.Module, dict[str, Any]]] = []
        for module in model.modules():
            for name, buffer in module._buffers.items():
                copy = None
                if buffer is not None and buffer.numel() <= _MAX_COPIED:
                    copy = buffer.detach().clone()
                self._buffers.append((module._buffers, name, buffer, copy))
            plain = {name: v for name, v in vars(module).items() if name not in _OF_TORCH}
            self._attributes.append((module, plain))

    def restore_state(self) -> None:
        """Put buffers and attributes back: some rotary modules remember the longest input."""
        for buffers, name, buffer, copy in self._buffers:
            buffers[name] = buffer
            if copy is not None and not torch.equal(buffer, copy):
                with torch.no_grad():
                    buffer.copy_(copy)
        for module, plain in self._attributes:
            for name in vars(module).keys() - _OF_TORCH - plain.keys():
                del vars(module)[name]
            vars(module).update(plain)

    def restore(self) -> None:
        """Put everything back."""
        self.restore_state()
        for module, training in self._modes:
            module.training = training


@contextmanager
def preserve(model: nn.Module) -> Iterator[Snapshot]:
    """Leave a model as it was, after an error too; meanwhile it is in eval mode.

    Args:
        model: Any module.

    Yields:
        The snapshot; `restore_state` makes modules forget earlier inputs.
    """
    snapshot = Snapshot(model)
    try:
        model.eval()
        yield snapshot
    finally:
        snapshot.restore()


def copy_as(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a model into another floating type; the tables' frequencies stay float32.

    Args:
        model: Any module.
        dtype: The type of its parameters and activations.
    """
    from copy import deepcopy

    copied = deepcopy(model)
    kept = [
        (module, name, buffer)
        for module in copied.modules()
        if is_rotary_name(type(module).__name__)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dtype == torch.float32
    ]
    copied.to(dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer
    return copied
