"""Names for the sizes of a model's inputs that stay dynamic, and the limits of these sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rotary_export.bundle.dims import (
    BATCH,
    PAST,
    SEQ,
    TOTAL,
    compute_dim,
    is_encoder_past,
    is_past,
    list_names,
    read_bounded,
    read_terms,
    solve_dim,
)
from rotary_export.compat.export_dims import GivenDim, read_dim
from rotary_export.errors import RotaryExportError
from rotary_export.models.trace.legal_sizes import LegalSize
from rotary_export.proof.models.input_values import find_offsets, find_tables, is_positions

Dims = tuple[int | str, ...]
_CACHES = re.compile(r"(^|_)(past|cache|caches|kv|kvs)($|[_.])")
_SAMPLES = re.compile(r"(^|_)(input_values|wav|wave|waveform|audio|speech|signal|samples)s?($|_)")
SEQUENCES = "num_sequences"  # that are packed in one
_KEYS = ("name", "min", "max", "multiple")  # of a size that is given as a dict


@dataclass
class NamedDims:
    """The sizes of a model's inputs.

    Attributes:
        dims: By tensor, a name or a size per dimension; see `bundle.dims`.
        min_size: By name, the smallest size, where one was given.
        max_size: By name, the largest.
    """

    dims: dict[str, Dims]
    min_size: dict[str, int] = field(default_factory=dict)
    max_size: dict[str, int] = field(default_factory=dict)

    def limit(self, name: str, smallest: int | None, largest: int | None) -> None:
        """Narrow the sizes of a name."""
        if smallest is not None and smallest > 1:
            self.min_size[name] = max(smallest, self.min_size.get(name, smallest))
        if largest is not None:
            self.max_size[name] = min(largest, self.max_size.get(name, largest))

    def narrow(self, legal: Mapping[str, LegalSize]) -> NamedDims:
        """Return these sizes, narrowed to legal ones: "height" to "8 * height_div_8"."""
        multiples = {name: size.multiple for name, size in legal.items()}

        def rename(dim: int | str) -> int | str:
            if not isinstance(dim, str):
                return dim
            terms = [
                str(factor) if not name else _write_term(factor, name, multiples.get(name, 1))
                for factor, name in read_terms(dim)
            ]
            return " + ".join(terms)

        dims = {name: tuple(map(rename, shape)) for name, shape in self.dims.items()}
        narrowed = NamedDims(dims, dict(self.min_size), {})
        for name, largest in self.max_size.items():
            multiple = multiples.get(name, 1)
            narrowed.limit(_divide(name, multiple), None, largest // multiple)
        for name, size in legal.items():
            smallest = -(-size.smallest // size.multiple)
            narrowed.limit(_divide(name, size.multiple), smallest, None)
        return narrowed


def name_dims(
    tensors: Mapping[str, Tensor],
    dynamic_shapes: str | Mapping[str, Any] | None,
    cache_axis: int | None = None,
    cache_dims: Mapping[str, int | str] | None = None,
) -> NamedDims:
    """Name the sizes that may vary.

    Args:
        tensors: The example inputs, by name.
        dynamic_shapes: "auto": batch and sequence, found by name, type and rank; None: none; or
            by tensor name, sizes by axis ({} or a missing tensor: all fixed). A size is a name,
            "a + b", "8 * a"; a `torch.export.Dim`, also a derived one; None for a fixed one; or a
            dict of "name", "min", "max", "multiple", all optional.
        cache_axis: By "auto", the axis of positions of a cache of the model's own; None: fixed.
        cache_dims: By name of cached keys or values, the size of their axis of positions.

    Raises:
        RotaryExportError: It names a tensor or an axis that does not exist, its value is not a
            size, the example does not have such a size, or one name has two sizes.
    """
    if dynamic_shapes == "auto":
        named = NamedDims(_name_dims_auto(tensors, cache_axis, cache_dims))
    elif dynamic_shapes is None:
        named = NamedDims({name: tuple(value.shape) for name, value in tensors.items()})
    elif isinstance(dynamic_shapes, Mapping):
        named = _name_dims_given(tensors, dynamic_shapes, cache_dims)
    else:
        raise RotaryExportError(
            "dynamic_shapes must be 'auto', None or a dict by tensor name, got "
            f"{type(dynamic_shapes).__name__} {dynamic_shapes!r}"
        )
    sizes = read_sizes(tensors, named.dims)
    for name, dims in named.dims.items():
        for term in list_names(dims):
            if term not in sizes:
                raise RotaryExportError(
                    f"dynamic_shapes[{name!r}] has a sum with {term!r}, which no dimension is alone"
                )
    for name in find_offsets(tensors, named.dims):  # from 0 to the number of tokens: two at least
        if named.dims[name][0] in sizes:
            named.limit(str(named.dims[name][0]), 2, None)
    for name, size in sizes.items():
        low, high = named.min_size.get(name, 0), named.max_size.get(name)
        if size < low or (high is not None and size > high):
            upper = "" if high is None else f" <= {high}"
            raise RotaryExportError(
                f"dynamic_shapes limits {name} to {low} <= {name}{upper}, the example has {size}"
            )
    return named


def read_sizes(tensors: Mapping[str, Tensor], named: Mapping[str, Dims]) -> dict[str, int]:
    """Return the size of each name, as tensors have it.

    Raises:
        RotaryExportError: One name has two sizes, or a size is not such a multiple.
    """
    sizes: dict[str, int] = {}
    for name, value in tensors.items():
        for dim, size in zip(named[name], value.shape, strict=True):
            if not isinstance(dim, str) or len(list_names([dim])) > 1:
                continue
            if (bounded := read_bounded(dim)) and size == bounded[1]:
                continue  # any number of positions, that or more
            if (solved := solve_dim(dim, size)) is None:
                raise RotaryExportError(f"{name} must have a size {dim}, got {tuple(value.shape)}")
            term, found = solved
            if sizes.setdefault(term, found) != found:
                raise RotaryExportError(
                    f"{name} must have {dim}={compute_dim(dim, sizes)}, as the tensors before it, "
                    f"got shape {tuple(value.shape)}"
                )
    return sizes


def _name_dims_given(
    tensors: Mapping[str, Tensor],
    dynamic_shapes: Mapping[str, Any],
    cache_dims: Mapping[str, int | str] | None,
) -> NamedDims:
    for name in dynamic_shapes:
        if name not in tensors:
            raise RotaryExportError(
                f"dynamic_shapes names {name!r}, which is not one of the example's tensors: "
                f"{', '.join(tensors)}"
            )
    named, found = NamedDims({}), _name_dims_auto(tensors, None, cache_dims)
    for name, value in tensors.items():
        dims: list[int | str] = list(value.shape)
        given = dynamic_shapes.get(name) or {}
        if isinstance(given, (tuple, list)):
            given = dict(enumerate(given))
        if not isinstance(given, Mapping):
            raise RotaryExportError(
                f"dynamic_shapes[{name!r}] must be a dict of axis to name, got {given!r}"
            )
        for axis, dim in given.items():
            if not isinstance(axis, int) or not 0 <= axis < value.dim():
                raise RotaryExportError(
                    f"dynamic_shapes[{name!r}] must have axes in [0, {value.dim()}), got {axis!r}"
                )
            usual = found[name][axis]
            default = usual if isinstance(usual, str) else f"{name.replace('.', '_')}_{axis}"
            size = _read_size(f"dynamic_shapes[{name!r}][{axis}]", dim, default, named)
            dims[axis] = dims[axis] if size is None else size
        named.dims[name] = tuple(dims)
    return named


def _read_size(where: str, given: Any, default: str, named: NamedDims) -> str | None:
    """Read a size that may vary, and its limits; None: it is fixed."""
    if isinstance(given, Mapping):
        return _read_limits(where, given, default, named)
    if given is None:
        return None
    dim = GivenDim(given) if isinstance(given, str) else read_dim(given)
    if dim is not None and dim.is_fixed:
        return None
    text = (dim.text or default) if dim is not None else ""
    names = list_names([text])
    is_size = all(factor > 0 for factor, name in read_terms(text) if name)
    if dim is None or not names or not is_size or not all(map(str.isidentifier, names)):
        raise RotaryExportError(
            f"{where} must be a name, a sum 'a + b' or a multiple '8 * a' of names, a "
            f"torch.export.Dim or a dict of {', '.join(_KEYS)}, got {given!r}"
        )
    for name in names:
        named.limit(name, dim.smallest, dim.largest)
    return text


def _read_limits(where: str, given: Mapping[Any, Any], default: str, named: NamedDims) -> str:
    """Read a size that is given as a dict of `_KEYS`."""
    name, multiple = given.get("name", default), given.get("multiple", 1)
    numbers = {key: given[key] for key in ("min", "max", "multiple") if key in given}
    legal = isinstance(name, str) and name.isidentifier() and given.keys() <= {*_KEYS}
    if not legal or any(type(value) is not int or value < 1 for value in numbers.values()):
        raise RotaryExportError(
            f"{where} must be a dict of {', '.join(_KEYS)}: a name and numbers >= 1, got {given!r}"
        )
    low, high = given.get("min"), given.get("max")
    named.limit(
        _divide(name, multiple),
        None if low is None else -(-low // multiple),
        None if high is None else high // multiple,
    )
    return _write_term(1, name, multiple)


def _divide(name: str, multiple: int) -> str:
    """Name a size that is counted in multiples: "height_div_8"."""
    return name if multiple == 1 else f"{name}_div_{multiple}"


def _write_term(factor: int, name: str, multiple: int) -> str:
    """Write a size that is counted in multiples: "8 * height_div_8"."""
    factor *= multiple
    return f"{factor} * {_divide(name, multiple)}" if factor > 1 else name


def _name_dims_auto(
    tensors: Mapping[str, Tensor],
    cache_axis: int | None = None,
    cache_dims: Mapping[str, int | str] | None = None,
) -> dict[str, Dims]:
    first = next((v for v in tensors.values() if v.dim()), None)
    batch = first.shape[0] if first is not None else 0
    caches = _find_caches(tensors, batch, cache_axis)
    has_past = bool(caches)
    is_static = any(isinstance(dim, int) for dim in (cache_dims or {}).values())
    past = next((tensors[name].shape[axis] for name, axis in caches.items()), 0)
    lengths = [v.shape[1] for n, v in tensors.items() if _find_sequence(n, v) and "mask" not in n]
    seq = lengths[0] if lengths else None
    sequences = {} if seq is None else {seq: SEQ}  # by length
    tables = find_tables(tensors)
    offsets = find_offsets(tensors, {name: tuple(value.shape) for name, value in tensors.items()})
    counts: dict[int, str] = {}  # of packed sequences, by the length of their offsets
    named: dict[str, Dims] = {}
    for name, value in tensors.items():
        dims: list[int | str] = list(value.shape)
        if is_encoder_past(name):
            dims[0], dims[2] = BATCH, f"encoder_{SEQ}"
        elif name in caches:
            dims[0], dims[caches[name]] = BATCH, (cache_dims or {}).get(name, PAST)
        elif name == "position_ids" and value.dim() == 3:
            dims[1:] = [BATCH, SEQ]
        elif name in offsets:
            is_batch = len(offsets[name]) > 1 and dims[0] == batch + 1
            new = f"{name.replace('.', '_')}_{SEQUENCES}" if counts else SEQUENCES
            dims[0] = f"{BATCH if is_batch else counts.setdefault(value.shape[0], new)} + 1"
        elif name == "cache_position" or (
            is_positions(name, value) and value.dim() == 1 and dims[0] == seq != batch
        ):
            dims[0] = SEQ
        elif name == "position_ids" and value.dim() == 2:
            dims = [BATCH if dims[0] == batch else dims[0], SEQ]
        elif seq is not None and _is_square_mask(name, value, batch, seq, past):
            dims[0] = BATCH if dims[0] == batch and value.dim() > 2 else dims[0]
            dims[-2:] = [SEQ, TOTAL if has_past else SEQ]
        elif name in tables and dims[-2] == seq and (value.dim() > 2 or seq != batch):
            dims[0] = BATCH if dims[0] == batch and value.dim() > 2 else dims[0]
            dims[-2] = SEQ
        elif value.dim() and dims[0] == batch:
            dims[0] = BATCH
            axis = None if is_static and "mask" in name else _find_sequence(name, value)
            grows = (past > 0 or (has_past and "mask" in name)) and not name.startswith("encoder_")
            if axis is None:
                pass
            elif grows and seq is not None and value.shape[axis] == past + seq:
                dims[axis] = TOTAL
            elif name.startswith("decoder_"):
                dims[axis] = f"decoder_{SEQ}"
            else:
                part = "encoder" if name.startswith("encoder_") else name.replace(".", "_")
                new = f"{part}_{SEQ}" if sequences else SEQ
                dims[axis] = sequences.setdefault(value.shape[axis], new)
        named[name] = tuple(dims)
    return named


def has_samples(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether an input contains samples of audio, of which a position has many."""
    return any(
        value.dim() == 2 and value.is_floating_point() and bool(_SAMPLES.search(name))
        for name, value in tensors.items()
    )


def has_own_cache(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether there are keys and values of earlier tokens, as a model of its own has them.

    They are named so, (B, N, S, H) or (B, S, N, H).
    """
    return any(_is_own_cache(name, value) for name, value in tensors.items())


def _is_own_cache(name: str, value: Tensor) -> bool:
    is_named = not (is_past(name) or is_encoder_past(name)) and bool(_CACHES.search(name))
    return is_named and value.dim() == 4 and value.is_floating_point()


def _find_caches(
    tensors: Mapping[str, Tensor], batch: int, cache_axis: int | None
) -> dict[str, int]:
    """Find the keys and values of earlier tokens, and their axis of positions."""
    found = {}
    for name, value in tensors.items():
        if is_past(name):
            found[name] = 2
        elif cache_axis and _is_own_cache(name, value) and value.shape[0] == batch:
            found[name] = cache_axis
    return found


def _find_sequence(name: str, value: Tensor) -> int | None:
    """Find the dimension that is a sequence; None: there is none.

    - Of ids and of masks (B, S), of samples (B, S), of features (B, S, C), it is the second one.
    - Of masks (B, ..., 1, S) that all tokens share, it is the last one.
    """
    if is_past(name) or "pixel" in name or "grid" in name:
        return None
    if "mask" in name and value.dim() > 2 and value.shape[-2] == 1:
        return value.dim() - 1
    is_features = value.is_floating_point() and value.dim() == 3
    is_row = not value.is_floating_point() or "mask" in name or bool(_SAMPLES.search(name))
    is_ids = value.dim() == 2 and is_row
    return 1 if is_features or is_ids else None


def _is_square_mask(name: str, value: Tensor, batch: int, seq: int, past: int) -> bool:
    """Return whether a mask is (..., S, T): what each new token sees of all tokens.

    With as many rows as tokens, a mask of two dimensions could be (B, T), too: those of integers
    are, and those of the name that transformers has for them.
    """
    if "mask" not in name or value.dim() < 2 or tuple(value.shape[-2:]) != (seq, past + seq):
        return False
    is_padding = name == "attention_mask" or value.dtype in (torch.int64, torch.int32)
    return not (value.dim() == 2 and batch == seq and is_padding)
