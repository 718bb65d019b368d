"""The inputs of a model as its manifest describes them, and the sizes that they are traced at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from rotary_export.bundle.dims import PAST, list_names, read_bounded
from rotary_export.bundle.manifest import TensorInfo
from rotary_export.models.dim_names import NamedDims
from rotary_export.proof.models.input_values import (
    InputValues,
    choose_static,
    choose_values,
    find_offsets,
    find_tables,
)
from rotary_export.proof.models.plan import TRACED
from rotary_export.types import name_dtype


def describe_inputs(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    named: NamedDims,
    max_cache_len: int | None = None,
) -> tuple[tuple[TensorInfo, ...], dict[str, InputValues]]:
    """Return the inputs, and where their values come from at other sizes.

    Args:
        model: Its embedding limits token ids.
        tensors: The example inputs, by name.
        named: Their sizes.
        max_cache_len: How many positions a static cache holds; None: there is none.
    """
    limits = {name: _find_id_limits(model, name) for name in tensors}
    if max_cache_len is not None:
        limits["position_ids"] = 0, max_cache_len - 1
    inputs = tuple(
        TensorInfo(name, name_dtype(v.dtype), named.dims[name], limits[name])
        for name, v in tensors.items()
    )
    tables, offsets = find_tables(tensors), find_offsets(tensors, named.dims)
    values = {
        i.name: choose_values(
            i.name,
            tensors[i.name],
            i.shape,
            i.limits,
            i.name in tables,
            offsets.get(i.name, ()),
        )
        for i in inputs
    }
    if max_cache_len is not None:
        values = {name: choose_static(each) for name, each in values.items()}
    return inputs, values


def _find_id_limits(model: nn.Module, name: str) -> tuple[int, int] | None:
    """Return the smallest and largest token id."""
    if not name.endswith("input_ids") or not hasattr(model, "get_input_embeddings"):
        return None
    try:
        rows = cast(Any, model).get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None
    return 0, int(rows) - 1


def choose_traced_sizes(
    example: Mapping[str, int],
    inputs: Sequence[TensorInfo],
    input_values: Mapping[str, InputValues],
    named: NamedDims,
    wanted: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Choose small sizes, all different; the example's own where values may depend on them.

    Those that are wanted are taken as they are.

    Args:
        example: The sizes of the example, by name.
        inputs: The inputs.
        input_values: Where their values come from.
        named: The sizes of their dimensions.
        wanted: Sizes that are given.
    """
    sizes = dict(wanted or {})
    kept = [bounded[1] for i in inputs for d in map(str, i.shape) if (bounded := read_bounded(d))]
    for name, size in example.items():
        if name in sizes:
            continue
        held = [i for i in inputs if name in list_names(i.shape)]
        free = all(input_values[i.name].role not in ("values", "rows") for i in held)
        chosen = TRACED.get(name, max(size, 2)) if free or size < 2 else size
        chosen = max(chosen, named.min_size.get(name, 2))
        if name == PAST and kept:  # of a window, other sizes than of all positions
            chosen = max(kept) + 3
        while chosen in sizes.values():
            chosen += 1
        sizes[name] = min(chosen, named.max_size.get(name, chosen))
    return sizes
