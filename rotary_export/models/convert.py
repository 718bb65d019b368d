"""A copy of a model, and of its example inputs, in another floating-point type."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.compat import pytree
from rotary_export.compat.modules import get_buffers
from rotary_export.errors import RotaryExportError
from rotary_export.models.arguments import read_arguments
from rotary_export.models.error_text import describe_error
from rotary_export.models.find.names import is_rotary_name


def convert_model(
    model: nn.Module, example_inputs: Mapping[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """Copy a model into another type, unless it has that type; and its example inputs.

    Args:
        model: Any module; it is not changed.
        example_inputs: By argument name; tensors that are not floating-point stay as they are.
        dtype: The floating-point type of the copy.

    Raises:
        RotaryExportError: The model can't be copied, or converted.
    """
    if any(p.is_floating_point() and p.dtype != dtype for p in model.parameters()):
        try:
            model = _copy_as(model, dtype)
        except Exception as error:  # what deepcopy raises, and the model's own conversion
            raise RotaryExportError(
                f"{type(model).__name__} can't be copied as {dtype}: {describe_error(error)}"
            ) from error

    def convert(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    inputs = {}
    for name, value in example_inputs.items():
        if hasattr(value, "layers"):  # a cache: convert its tensors, in a copy
            arguments, tensors = read_arguments({name: value})
            inputs[name] = arguments[0].rebuild([convert(t) for t in tensors.values()])
        else:
            inputs[name] = pytree.map_leaves(convert, value)
    return model, inputs


def _copy_as(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a model into another floating-point type; rotary frequencies stay float32."""
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
        get_buffers(module)[name] = buffer
    return copied
