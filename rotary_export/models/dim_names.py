"""Names for the sizes of a model's inputs that stay dynamic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rotary_export.bundle.dims import BATCH, PAST, SEQ, TOTAL, is_past
from rotary_export.errors import RotaryExportError

Dims = tuple[int | str, ...]


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
        RotaryExportError: It names a tensor or an axis that does not exist, its value is not a
            name, or one name has two sizes.
    """
    if dynamic_shapes == "auto":
        named = _name_dims_auto(tensors)
    elif dynamic_shapes is None:
        named = {name: tuple(value.shape) for name, value in tensors.items()}
    elif isinstance(dynamic_shapes, Mapping):
        named = _name_dims_given(tensors, dynamic_shapes)
    else:
        raise RotaryExportError(
            "dynamic_shapes must be 'auto', None or a dict by tensor name, got "
            f"{type(dynamic_shapes).__name__} {dynamic_shapes!r}"
        )
    sizes = read_sizes(tensors, named)
    for name, dims in named.items():
        for term in (term for dim in dims if isinstance(dim, str) for term in _split(dim)):
            if term not in sizes:
                raise RotaryExportError(
                    f"dynamic_shapes[{name!r}] has a sum with {term!r}, which no dimension is alone"
                )
    return named


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


def _name_dims_given(
    tensors: Mapping[str, Tensor], dynamic_shapes: Mapping[str, Any]
) -> dict[str, Dims]:
    for name in dynamic_shapes:
        if name not in tensors:
            raise RotaryExportError(
                f"dynamic_shapes names {name!r}, which is not one of the example's tensors: "
                f"{', '.join(tensors)}"
            )
    named: dict[str, Dims] = {}
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
                    f"dynamic_shapes[{name!r}] must have axes in [0, {value.dim()}), got {axis!r}"
                )
            if not isinstance(dim, str) or not all(p.isidentifier() for p in _split(dim)):
                raise RotaryExportError(
                    f"dynamic_shapes[{name!r}][{axis}] must be a name, or a sum 'a + b' of "
                    f"names, got {dim!r}"
                )
            dims[axis] = dim
        named[name] = tuple(dims)
    return named


def _split(dim: str) -> list[str]:
    """Return the terms of a sum of names."""
    return dim.split(" + ")


def _name_dims_auto(tensors: Mapping[str, Tensor]) -> dict[str, Dims]:
    first = next((v for v in tensors.values() if v.dim()), None)
    batch = first.shape[0] if first is not None else 0
    past = next((v.shape[2] for n, v in tensors.items() if is_past(n)), 0)
    lengths = [v.shape[1] for n, v in tensors.items() if _is_sequence(n, v) and "mask" not in n]
    seq = lengths[0] if lengths else None
    named: dict[str, Dims] = {}
    for name, value in tensors.items():
        dims: list[int | str] = list(value.shape)
        own = "decoder_" if name.startswith("decoder_") else ""
        if is_past(name):
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
                    dims[1] = TOTAL
        named[name] = tuple(dims)
    return named


def _is_sequence(name: str, value: Tensor) -> bool:
    """Return whether dimension 1 is a sequence: of ids (B, S), masks, or features (B, S, C)."""
    if is_past(name) or "pixel" in name or "grid" in name:
        return False
    return value.dim() == (3 if value.is_floating_point() else 2)
