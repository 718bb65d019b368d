"""A model's arguments and results as named tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.bundle.dims import is_past
from rotary_export.compat import pytree
from rotary_export.errors import RotaryExportError
from rotary_export.models.decoder.cache import (
    arrange,
    choose_rebuild,
    is_cache,
    name_present,
    read_cache,
)
from rotary_export.models.trace.float32_tables import Float32Tables

CACHES = ("past_key_values", "cache")  # arguments of transformers


@dataclass(frozen=True)
class Argument:
    """One argument of the model.

    Attributes:
        name: The parameter of the model's forward.
        names: Of the tensors in it; none for a constant.
        rebuild: Makes the argument from these tensors.
    """

    name: str
    names: tuple[str, ...]
    rebuild: Callable[[Sequence[Tensor]], Any]


class FlatModel(nn.Module):
    """A model whose forward accepts its tensors in order and returns a flat tuple.

    Args:
        model: The model; it is called with keyword arguments.
        arguments: How they are made from tensors.
        extra: Keyword arguments that are not tensors.
        float32_tables: Compute in float32 what is computed from positions.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: Sequence[Argument],
        extra: Mapping[str, Any],
        float32_tables: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.arguments = tuple(arguments)
        self.extra = dict(extra)
        self.float32_tables = float32_tables
        self.input_names = {name for argument in arguments for name in argument.names}
        self.has_past = any(is_past(name) for name in self.input_names)

    def run_named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run the model; return its results by name."""
        kwargs = dict(self.extra)
        given = list(tensors)
        for argument in self.arguments:
            kwargs[argument.name] = argument.rebuild(given[: len(argument.names)])
            del given[: len(argument.names)]
        arrange(kwargs)
        with Float32Tables(tensors) if self.float32_tables else nullcontext():
            value = self.model(**kwargs)
        results = _name_results(value, "", self.has_past)
        return {f"output.{n}" if n in self.input_names else n: value for n, value in results}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model on its tensors, in order."""
        return tuple(self.run_named(tensors).values())


def check_arguments(model: object, example_inputs: object) -> None:
    """Check that a model is a module, and that its forward accepts the example's arguments.

    Raises:
        RotaryExportError: It is not; the message names what was given, or the argument.
    """
    if not isinstance(model, nn.Module):
        raise RotaryExportError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise RotaryExportError(
            f"model must be a torch.nn.Module with Python code, got a ScriptModule "
            f"({model.original_name}), which torch.export can't trace: pass the module that it was "
            "scripted or traced from"
        )
    if not isinstance(example_inputs, Mapping):
        raise RotaryExportError(
            f"example_inputs must be a dict by argument name, got {type(example_inputs).__name__}"
        )
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in example_inputs:
        if name not in parameters:
            raise RotaryExportError(
                f"{type(model).__name__}.forward accepts {', '.join(parameters)}, "
                f"example_inputs has {name!r}"
            )


def read_arguments(example_inputs: Mapping[str, Any]) -> tuple[list[Argument], dict[str, Tensor]]:
    """Flatten example inputs.

    Args:
        example_inputs: By argument name: tensors, nested tuples, lists and dicts of them, a
            key/value cache of transformers, constants.

    Returns:
        The arguments, and the tensors by name: `past_key_values.N.key`, `past_key_values.N.value`
        for a cache, `NAME.0` for a nested one.

    Raises:
        RotaryExportError: There is no tensor, a complex one, or a cache of an unsupported kind.
    """
    arguments: list[Argument] = []
    tensors: dict[str, Tensor] = {}
    for name, value in example_inputs.items():
        if is_cache(value):
            found = read_cache(name, value)
            rebuild: Callable[[Sequence[Tensor]], Any] = choose_rebuild(value)
        elif isinstance(value, Tensor):
            found, rebuild = {name: value}, lambda given: given[0]
        else:
            keyed, tree = pytree.flatten_with_path(value)
            found = {
                name + "".join(f".{_name_key(key)}" for key in keys): leaf
                for keys, leaf in keyed
                if isinstance(leaf, Tensor)
            }
            rebuild = _Rebuild([leaf for _, leaf in keyed], tree)
        arguments.append(Argument(name, tuple(found), rebuild))
        tensors |= found
    if not tensors:
        raise RotaryExportError(
            f"example_inputs must hold at least one tensor, got {', '.join(example_inputs) or '{}'}"
        )
    for name, value in tensors.items():
        if value.is_complex():
            raise RotaryExportError(
                f"input {name} is complex, a bundle has real inputs only: pass "
                "torch.view_as_real of it, and use torch.view_as_complex in the model"
            )
    return arguments, tensors


def _name_key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", key)))


@dataclass(frozen=True)
class _Rebuild:
    """Nests tensors as an argument had them."""

    leaves: list[Any]
    tree: Any

    def __call__(self, given: Sequence[Tensor]) -> Any:
        tensors = iter(given)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return pytree.unflatten(leaves, self.tree)


def _name_results(value: Any, name: str, has_past: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's result by name; a cache only if one is an input."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif is_cache(value):
        if has_past:
            yield from name_present(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _name_results(item, f"{name}.{key}" if name else str(key), has_past)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _name_results(item, f"{name or 'output'}.{index}", has_past)


def find_extra_arguments(model: nn.Module, example_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that an export adds: no cache unless one is an input."""
    parameters = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if "use_cache" in parameters:
        given = [name in CACHES or is_cache(value) for name, value in example_inputs.items()]
        extra["use_cache"] = any(given)
    if "return_dict" in parameters and hasattr(model, "config"):
        extra["return_dict"] = True
    return {name: value for name, value in extra.items() if name not in example_inputs}
