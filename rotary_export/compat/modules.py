"""The registries of torch.nn.Module: buffers, and the attributes that torch itself keeps."""

from __future__ import annotations

from torch import Tensor, nn

# Modes, parameters, buffers, submodules and hooks.
ATTRIBUTES_OF_TORCH = frozenset(vars(nn.Module()))


def get_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own registry of buffers by name; changing it changes the module."""
    return module._buffers
