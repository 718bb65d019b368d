"""A snapshot of a model: its modes, buffers, submodules and attributes, to be restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.compat.modules import ATTRIBUTES_OF_TORCH, get_buffers

_MAX_COPIED = 2**22  # elements of a buffer that is copied; larger ones are kept by reference


class Snapshot:
    """The state that a run or a trace may change in a model; parameters are not copied.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._attributes: list[tuple[nn.Module, dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []  # of dicts, lists and sets, one level deep
        self._registries: list[tuple[Any, Any]] = []
        for module in model.modules():
            buffers = [b for b in get_buffers(module).values() if b is not None and _can_copy(b)]
            self._buffers += [(buffer, buffer.detach().clone()) for buffer in buffers]
            plain = {name: v for name, v in vars(module).items() if name not in ATTRIBUTES_OF_TORCH}
            self._attributes.append((module, plain))
            kept = [v for v in plain.values() if type(v) in (dict, list, set)]
            if not isinstance(module, torch.jit.ScriptModule):  # its registry is not in Python
                kept.append(get_buffers(module))
            self._contents += [(v, v.copy()) for v in kept]
            registries = [v for name, v in vars(module).items() if name in ATTRIBUTES_OF_TORCH]
            self._registries += [(v, v.copy()) for v in registries if isinstance(v, (dict, set))]

    def restore_state(self) -> None:
        """Restore buffers and attributes: some rotary modules remember the longest input."""
        with torch.no_grad():
            for buffer, copy in self._buffers:
                if buffer.shape != copy.shape:
                    buffer.resize_(copy.shape)
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)
        for module, plain in self._attributes:
            for name in vars(module).keys() - ATTRIBUTES_OF_TORCH - plain.keys():
                del vars(module)[name]
            vars(module).update(plain)
        for value, copy in self._contents:
            _refill(value, copy)

    def restore(self) -> None:
        """Restore everything; submodules, parameters and hooks by reference."""
        self.restore_state()
        for value, copy in self._registries:
            _refill(value, copy)


def _can_copy(buffer: Tensor) -> bool:
    return buffer.layout == torch.strided and not buffer.is_meta and buffer.numel() <= _MAX_COPIED


def _refill(value: Any, copy: Any) -> None:
    """Fill a container with what it held."""
    value.clear()
    (value.extend if isinstance(value, list) else value.update)(copy)


@contextmanager
def take_snapshot(model: nn.Module) -> Iterator[Snapshot]:
    """Restore a model when the context ends, after an error too; until then it is in eval mode.

    Args:
        model: Any module.

    Yields:
        The snapshot; `restore_state` makes modules forget earlier inputs.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()  # may do more than set a mode, which `train` then undoes
        snapshot = Snapshot(model)
        try:
            yield snapshot
        finally:
            snapshot.restore()
    finally:
        for module, training in modes:
            if module.training != training:
                module.train(training)  # its children too, which are set later
