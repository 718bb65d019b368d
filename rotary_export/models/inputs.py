"""A model's arguments and results as named tensors, with names for the sizes that may vary."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rotary_export.bundle.dims import BATCH, PAST, SEQ
from rotary_export.errors import RotaryExportError

Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class Argument:
    """One argument of the model.

    Attributes:
        name: As the model's forward has it.
        names: Of the tensors in it; none for a constant.
        rebuild: Makes the argument from these tensors.
    """

    name: str
    names: tuple[str, ...]
    rebuild: Callable[[Sequence[Tensor]], Any]


class FlatModel(nn.Module):
    """A model that takes its tensors one by one, in order, and returns a flat tuple.

    Args:
        model: The model; it is called with keyword arguments.
        arguments: What they are made of.
        extra: Keyword arguments that are no tensors.
    """

    def __init__(
        self, model: nn.Module, arguments: Sequence[Argument], extra: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.arguments = tuple(arguments)
        self.extra = dict(extra)
        self.taken = {name for argument in arguments for name in argument.names}
        self.has_past = any(name.startswith("past.") for a in arguments for name in a.names)

    def run_named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run the model; return its results by name."""
        kwargs = dict(self.extra)
        given = list(tensors)
        for argument in self.arguments:
            kwargs[argument.name] = argument.rebuild(given[: len(argument.names)])
            del given[: len(argument.names)]
        results = _name_results(self.model(**kwargs), "", self.has_past)
        return {f"output.{n}" if n in self.taken else n: value for n, value in results}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model on its tensors, in order."""
        return tuple(self.run_named(tensors).values())


def read_arguments(example_inputs: Mapping[str, Any]) -> tuple[list[Argument], dict[str, Tensor]]:
    """Take example inputs apart.

    Args:
        example_inputs: By argument name: tensors, nested tuples, lists and dicts of them, a
            key/value cache of transformers, constants.

    Returns:
        The arguments, and the tensors by name: `past.N.key`, `past.N.value` for a cache, `NAME.0`
        for a nested one.

    Raises:
        RotaryExportError: There is no tensor, or a cache of a kind that is not known.
    """
    arguments: list[Argument] = []
    tensors: dict[str, Tensor] = {}
    for name, value in example_inputs.items():
        if _is_cache(value):
            found = _read_cache(name, value)
            rebuild: Callable[[Sequence[Tensor]], Any] = _rebuild_cache
        elif isinstance(value, Tensor):
            found, rebuild = {name: value}, lambda given: given[0]
        else:
            paths, tree = pytree.tree_flatten_with_path(value)
            leaves = [leaf for _, leaf in paths]
            found = {
                name + "".join(f".{_name_key(key)}" for key in path): leaf
                for path, leaf in paths
                if isinstance(leaf, Tensor)
            }
            rebuild = _Rebuild(leaves, tree)
        arguments.append(Argument(name, tuple(found), rebuild))
        tensors |= found
    if not tensors:
        raise RotaryExportError(
            f"example_inputs must hold at least one tensor, got {', '.join(example_inputs) or '{}'}"
        )
    return arguments, tensors


def _name_key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", key)))


@dataclass(frozen=True)
class _Rebuild:
    """Puts tensors back where they were nested."""

    leaves: list[Any]
    tree: Any

    def __call__(self, given: Sequence[Tensor]) -> Any:
        tensors = iter(given)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.tree)


def _is_cache(value: Any) -> bool:
    module = sys.modules.get("transformers.cache_utils")
    return module is not None and isinstance(value, module.Cache)


def _read_cache(name: str, cache: Any) -> dict[str, Tensor]:
    """Return the keys and values of a cache that holds all positions.

    Layers with a sliding window are read as if they had none, until they drop a position: the model
    masks what is outside the window.
    """
    from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

    wanted = f"{name} must be a DynamicCache that holds every position, filled, got"
    if isinstance(cache, EncoderDecoderCache):
        raise RotaryExportError(f"{wanted} an EncoderDecoderCache")
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(getattr(cache, "layers", [])):
        whole = isinstance(layer, DynamicLayer) and layer.keys is not None and layer.keys.dim() == 4
        if not whole:
            raise RotaryExportError(f"{wanted} layer {index} of {type(layer).__name__}")
        kept, length = layer.keys.shape[-2], layer.get_seq_length()
        if kept != length:
            raise RotaryExportError(
                f"{wanted} {kept} of {length} in layer {index} ({type(layer).__name__}); "
                "DynamicCache() without a config keeps them all"
            )
        found |= {f"past.{index}.key": layer.keys, f"past.{index}.value": layer.values}
    if not found:
        raise RotaryExportError(
            f"{name} must hold keys and values (an export traces them), got an empty "
            f"{type(cache).__name__}"
        )
    return found


def _rebuild_cache(given: Sequence[Tensor]) -> Any:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache, make_layer = DynamicCache(), cast(Any, DynamicLayer)
    for keys, values in zip(given[0::2], given[1::2], strict=True):
        layer = make_layer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _name_results(value: Any, name: str, has_past: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's result by name; a cache only where one came in."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif _is_cache(value):
        for index, layer in enumerate(value.layers if has_past else []):
            yield f"present.{index}.key", layer.keys
            yield f"present.{index}.value", layer.values
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _name_results(item, f"{name}.{key}" if name else str(key), has_past)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _name_results(item, f"{name or 'output'}.{index}", has_past)


def name_dims(
    tensors: Mapping[str, Tensor], dynamic_shapes: str | Mapping[str, Any] | None
) -> dict[str, Dims]:
    """Name the sizes that may vary.

    Args:
        tensors: The example inputs, by name.
        dynamic_shapes: "auto": batch and sequence, found by name, type and rank; None: none; or
            by tensor name, axis to name ({} or a missing tensor: all fixed).

    Returns:
        By tensor, a name or a size per dimension. A sum of names is "a + b".

    Raises:
        RotaryExportError: It names a tensor or an axis that is not there, what it gives is no name,
            or one name has two sizes.
    """
    if dynamic_shapes == "auto":
        named = _name_dims_auto(tensors)
    elif dynamic_shapes is None:
        named = {name: tuple(value.shape) for name, value in tensors.items()}
    elif isinstance(dynamic_shapes, Mapping):
        named = {}
        for name in dynamic_shapes:
            if name not in tensors:
                raise RotaryExportError(
                    f"dynamic_shapes names {name!r}, which is none of the example's tensors: "
                    f"{', '.join(tensors)}"
                )
        for name, value in tensors.items():
            dims: list[int | str] = list(value.shape)
            given = dynamic_shapes.get(name) or {}
            if not isinstance(given, Mapping):
                raise RotaryExportError(
                    f"dynamic_shapes[{name!r}] must be a dict of axis to name, got {given!r}"
                )
            for axis, dim in given.items():
                if not isinstance(axis, int) or not 0 <= axis < value.dim():
                    raise RotaryExportError(
                        f"dynamic_shapes[{name!r}] must have axes in [0, {value.dim()}), "
                        f"got {axis!r}"
                    )
                if not isinstance(dim, str) or not all(p.isidentifier() for p in _split(dim)):
                    raise RotaryExportError(
                        f"dynamic_shapes[{name!r}][{axis}] must be a name, or a sum 'a + b' of "
                        f"names, got {dim!r}"
                    )
                dims[axis] = dim
            named[name] = tuple(dims)
    else:
        raise RotaryExportError(
            "dynamic_shapes must be 'auto', None or a dict by tensor name, got "
            f"{type(dynamic_shapes).__name__} {dynamic_shapes!r}"
        )
    sizes = read_sizes(tensors, named)
    for name, dims_of in named.items():
        for term in (term for dim in dims_of if isinstance(dim, str) for term in _split(dim)):
            if term not in sizes:
                raise RotaryExportError(
                    f"dynamic_shapes[{name!r}] has a sum with {term!r}, which no dimension is alone"
                )
    return named


def _split(dim: str) -> list[str]:
    """Return the terms of a sum of names."""
    return dim.split(" + ")


def read_sizes(tensors: Mapping[str, Tensor], named: Mapping[str, Dims]) -> dict[str, int]:
    """Return the size of each name, as tensors have it.

    Raises:
        RotaryExportError: One name has two sizes.
    """
    sizes: dict[str, int] = {}
    for name, value in tensors.items():
        for dim, size in zip(named[name], value.shape, strict=True):
            if isinstance(dim, str) and " + " not in dim and sizes.setdefault(dim, size) != size:
                raise RotaryExportError(
                    f"{name} must have {dim}={sizes[dim]}, as the tensors before it, got shape "
                    f"{tuple(value.shape)}"
                )
    return sizes


def _name_dims_auto(tensors: Mapping[str, Tensor]) -> dict[str, Dims]:
    first = next((v for v in tensors.values() if v.dim()), None)
    batch = first.shape[0] if first is not None else 0
    past = next((v.shape[2] for n, v in tensors.items() if n.startswith("past.")), 0)
    lengths = [v.shape[1] for n, v in tensors.items() if _is_sequence(n, v) and "mask" not in n]
    seq = lengths[0] if lengths else None
    named: dict[str, Dims] = {}
    for name, value in tensors.items():
        dims: list[int | str] = list(value.shape)
        own = "decoder_" if name.startswith("decoder_") else ""
        if name.startswith("past."):
            dims[0], dims[2] = BATCH, PAST
        elif name == "position_ids" and value.dim() == 3:
            dims[1:] = [BATCH, SEQ]
        elif name == "cache_position":
            dims[0] = SEQ
        elif name == "position_ids" and value.dim() == 2:
            dims = [BATCH if dims[0] == batch else dims[0], SEQ]
        elif value.dim() and dims[0] == batch:
            dims[0] = BATCH
            if _is_sequence(name, value):
                dims[1] = own + SEQ
                if past and seq is not None and value.shape[1] == past + seq:
                    dims[1] = f"{PAST} + {SEQ}"
        named[name] = tuple(dims)
    return named


def _is_sequence(name: str, value: Tensor) -> bool:
    """Whether dimension 1 of a tensor is a sequence: ids and masks, and features (B, S, C)."""
    if name.startswith("past.") or "pixel" in name or "grid" in name:
        return False
    return value.dim() == (3 if value.is_floating_point() else 2)
