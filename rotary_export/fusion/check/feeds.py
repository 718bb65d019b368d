"""Inputs to run a model with: random, but such that they mean something to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnxscript import ir

from rotary_export.errors import RotaryExportError
from rotary_export.fusion.values import Dims, read_dims, read_int_attribute
from rotary_export.runtime.tensors import make_bfloat16
from rotary_export.types import Array

_PAST = re.compile(r"past|cache")
_TOTAL = re.compile(r"total|past.*(\+|plus|and)")
_IDS = re.compile(r"^(decoder_)?input_ids$|^tokens?$|^token_ids$")


@dataclass(frozen=True)
class Shape:
    """Sizes of one run.

    Attributes:
        batch: Of every axis whose name contains "batch", or that is an input's first.
        length: New tokens.
        past: Tokens in a key/value cache.
    """

    batch: int
    length: int
    past: int


# Batches and lengths that no exporter traces at, one of them a decoded token.
SHAPES = (Shape(1, 7, 0), Shape(3, 13, 5), Shape(2, 1, 19))


def make_feeds(
    graph: ir.Graph, shape: Shape, seed: int = 0, given: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """Make inputs of a graph.

    Symbolic axes get their sizes by their names: an equal name is an equal size. Token ids stay
    within the smallest embedding that they select from, position ids count on from the past,
    masks let everything pass, all else is normal.

    Args:
        graph: The model's.
        shape: Which sizes.
        seed: Of the random numbers.
        given: Inputs to use as they are; the names of their axes bind the sizes.

    Returns:
        Arrays by name.

    Raises:
        RotaryExportError: An input has no shape, or is not a tensor.
    """
    rng = np.random.default_rng(seed)
    given = dict(given or {})
    sizes: dict[str, int] = {}
    inputs = [v for v in graph.inputs if v.name not in graph.initializers]
    for value in inputs:
        dims = _read_input(value)
        if value.name in given:
            for dim, size in zip(dims, given[value.name].shape, strict=False):
                if isinstance(dim, str):
                    sizes[dim] = size
    for value in inputs:
        dims = _read_input(value)
        head_dim = _find_head_dim(value)
        if head_dim is not None and isinstance(dims[-1], str):
            sizes.setdefault(dims[-1], head_dim)
        for axis, dim in enumerate(dims):
            if isinstance(dim, str) and dim.isidentifier():
                sizes.setdefault(dim, _choose_size(value.name or "", axis, dim, shape))
    feeds = {}
    for value in inputs:
        name = value.name or ""
        if name in given:
            feeds[name] = given[name]
            continue
        dims = _read_input(value)
        concrete = [_resolve(name, axis, dim, shape, sizes, value) for axis, dim in enumerate(dims)]
        feeds[name] = _draw(rng, value, concrete, shape)
    return feeds


def _find_head_dim(value: ir.Value) -> int | None:
    """Return the channels of a key/value cache that one of ONNX Runtime's attention nodes reads.

    onnxruntime-genai leaves them open (`kv_cache_dim`).
    """
    for user, index in value.uses():
        if user.op_type != "GroupQueryAttention" or index not in (3, 4) or user.inputs[0] is None:
            continue
        heads = read_int_attribute(user, "num_heads")
        if user.inputs[1] is None:  # query, key and value in one
            heads += 2 * read_int_attribute(user, "kv_num_heads")
        dims = read_dims(user.inputs[0])
        if dims is not None and isinstance(dims[-1], int):
            return dims[-1] // heads
    return None


def _read_input(value: ir.Value) -> Dims:
    dims = read_dims(value)
    if dims is None or value.dtype is None:
        raise RotaryExportError(f"the input {value.name} must be a tensor of known rank")
    return dims


def _choose_size(name: str, axis: int, dim: str, shape: Shape) -> int:
    """Choose the size of a named axis, by its name or by its place."""
    low = dim.lower()
    if "batch" in low:
        return shape.batch
    if _TOTAL.search(low) or ("mask" in name and axis > 0):
        return shape.past + shape.length
    if "past" in low:
        return shape.past
    if _PAST.search(name):
        return shape.batch if axis == 0 else shape.past
    if "seq" in low or "len" in low:
        return shape.length
    return shape.batch if axis == 0 else shape.length


def _resolve(
    name: str,
    axis: int,
    dim: int | str | None,
    shape: Shape,
    sizes: dict[str, int],
    value: ir.Value,
) -> int:
    if isinstance(dim, int):
        return dim
    if dim is None:
        return _choose_size(name, axis, "", shape)
    if dim in sizes:
        return sizes[dim]
    assert value.shape is not None
    symbol: Any = value.shape[axis]
    try:  # an expression: past_sequence_length + 1
        size = symbol.evaluate(sizes)
    except (ValueError, TypeError, KeyError):
        size = None
    return size if isinstance(size, int) else _choose_size(name, axis, dim, shape)


def _draw(rng: np.random.Generator, value: ir.Value, dims: list[int], shape: Shape) -> Array:
    name, dtype = value.name or "", value.dtype
    assert dtype is not None
    if dtype == ir.DataType.BOOL:
        return np.ones(dims, bool)
    if dtype.is_floating_point():
        if "mask" in name:
            return np.zeros(dims, dtype.numpy())
        kind = make_bfloat16() if dtype == ir.DataType.BFLOAT16 else dtype.numpy()
        return rng.normal(size=dims).astype(kind)
    kind = dtype.numpy()
    if "mask" in name:
        return np.ones(dims, kind)
    if "position" in name and dims:
        steps = np.arange(shape.past, shape.past + dims[-1], dtype=kind)
        return np.broadcast_to(steps, dims).copy()
    limit = count_rows(value)
    if limit is None:
        return (
            np.zeros(dims, kind) if not _IDS.search(name) else rng.integers(0, 2, dims).astype(kind)
        )
    return rng.integers(0, limit, dims).astype(kind)


def count_rows(value: ir.Value) -> int | None:
    """Return the rows of the smallest table that these ids select from."""
    rows = []
    queue = [value]
    while queue:
        for user, index in queue.pop().uses():
            if user.op_type == "Gather" and index == 1 and user.inputs[0] is not None:
                dims, axis = read_dims(user.inputs[0]), read_int_attribute(user, "axis")
                if dims and axis == 0 and isinstance(dims[0], int):
                    rows.append(dims[0])
            elif user.op_type in ("Reshape", "Cast", "Identity", "Unsqueeze", "Flatten", "Squeeze"):
                queue.extend(user.outputs)
    return min(rows, default=None)
