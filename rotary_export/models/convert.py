"""A copy of a model, and of its example inputs, in another floating-point type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.compat import pytree
from rotary_export.compat.modules import get_buffers
from rotary_export.errors import RotaryExportError
from rotary_export.models.arguments import FlatModel, find_extra_arguments, read_arguments
from rotary_export.models.error_text import describe_error
from rotary_export.models.find.names import is_rotary_name
from rotary_export.models.trace.snapshot import take_snapshot


def convert_model(
    model: nn.Module, example_inputs: Mapping[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """Copy a model into another type, unless it has that type; and its example inputs.

    Args:
        model: Any module; it is not changed.
        example_inputs: By argument name; tensors that are not floating-point stay as they are.
        dtype: The floating-point type of the copy. Frequencies of its rotary modules stay float32;
            if the model then fails, their tables are rounded to that type, once.

    Raises:
        RotaryExportError: The model can't be copied, or converted, or runs in its own type only.
    """
    own = model
    kept: list[nn.Module] = []
    if any(p.is_floating_point() and p.dtype != dtype for p in model.parameters()):
        try:
            model, kept = _copy_as(model, dtype)
        except Exception as error:  # what deepcopy raises, and the model's own conversion
            raise RotaryExportError(
                f"{type(model).__name__} can't be copied as {dtype}: {describe_error(error)}; "
                "convert it, and export it without dtype"
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
    failure = None if model is own else _find_failure(model, inputs)
    if failure and kept:
        failure = _round_tables(model, inputs, kept, dtype)
    if failure and not _find_failure(own, example_inputs):
        raise RotaryExportError(
            f"{type(model).__name__} runs on its example inputs in its own type, but not as {dtype}"
            f": {describe_error(failure)}; make tensors that it keeps buffers, or convert it, and "
            "export it without dtype"
        ) from failure
    return model, inputs


def _find_failure(model: nn.Module, inputs: Mapping[str, Any]) -> Exception | None:
    """Run a model; return what it raises."""
    arguments, tensors = read_arguments(inputs)
    flat = FlatModel(model, arguments, find_extra_arguments(model, inputs))
    with take_snapshot(model), torch.no_grad():
        try:
            flat(*tensors.values())
        except Exception as error:  # whatever the model raises
            return error
    return None


def _round_tables(
    model: nn.Module, inputs: Mapping[str, Any], kept: Sequence[nn.Module], dtype: torch.dtype
) -> Exception | None:
    """Round what modules with float32 frequencies return to the model's type, if it then runs.

    Most such modules do so themselves. Tables that stay float32 would make queries and keys
    float32, and values not.

    Returns:
        What the model raises all the same.
    """

    def round_leaf(leaf: Any) -> Any:
        wide = isinstance(leaf, Tensor) and leaf.dtype == torch.float32
        return leaf.to(dtype) if wide else leaf

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return pytree.map_leaves(round_leaf, output)

    handles = [module.register_forward_hook(hook) for module in kept]
    failure = _find_failure(model, inputs)
    if failure:
        for handle in handles:
            handle.remove()
    return failure


def _copy_as(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, list[nn.Module]]:
    """Copy a model into another floating-point type; rotary frequencies stay float32.

    Returns:
        The copy, and its modules with such frequencies.
    """
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
    return copied, list({id(module): module for module, _, _ in kept}.values())
