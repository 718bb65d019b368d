"""Computes in float32 what a model computes from positions in a half type, and rounds it once.

Positions, angles and tables in float16 or bfloat16 are wrong from a few hundred positions on, and
no two runtimes agree on them. Under `Float32Tables` the same Python code runs, and each tensor is
one of three kinds:

1. *positions*: integers, `arange`, and what is computed from them and from constants. Half types
   are widened to float32; the type that the model would have is kept beside.
2. *activations*: what comes from the model's floating-point inputs or from a layer. Positions that
   meet one are rounded to the type that the model would have, once.
3. *constants*: everything else, such as frequencies. They are widened where positions meet them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rotary_export.compat import pytree

HALF_TYPES = (torch.float16, torch.bfloat16)
_FACTORIES = (torch.arange, torch.linspace)
_LAYERS = (torch.nn.functional.embedding, torch.nn.functional.linear)
_WRITES = (torch.Tensor.__setitem__, torch.Tensor.copy_)  # what they write to keeps its type
_CASTS = {
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
    torch.Tensor.float: torch.float32,
    torch.Tensor.double: torch.float64,
}
_AS_OTHER = (torch.Tensor.to, torch.Tensor.type_as)
_KIND, _DTYPE = "_rotary_export_kind", "_rotary_export_dtype"
_POSITIONS, _ACTIVATION = "positions", "activation"


class Float32Tables(TorchFunctionMode):
    """Widens what is computed from positions.

    Args:
        inputs: Of the model; the floating-point ones are activations.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._activations = [value for value in inputs if value.is_floating_point()]

    def __enter__(self) -> Float32Tables:
        """Mark the inputs."""
        for value in self._activations:
            setattr(value, _KIND, _ACTIVATION)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        """Unmark them: they are the caller's."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for value in self._activations:
            vars(value).pop(_KIND, None)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function == torch.Tensor.dtype.__get__:  # type: ignore[attr-defined]
            return getattr(args[0], _DTYPE, None) or function(*args, **kwargs)
        leaves = pytree.list_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if function in _AS_OTHER and len(tensors) > 1:
            tensors = tensors[:1]  # the other one only names a type
        if function in _WRITES and not _is_positions(tensors[0]):
            return _call(function, args, kwargs, _round)
        if any(map(_is_activation, tensors)) or function in _LAYERS:
            return _mark_activations(_call(function, args, kwargs, _round))
        if not (any(map(_is_positions, tensors)) or function in _FACTORIES):
            return function(*args, **kwargs)
        dtype = _find_dtype(function, leaves, tensors)
        return _mark_positions(_call(function, args, kwargs, _widen), dtype)


def _call(function: Any, args: Any, kwargs: Any, change: Any) -> Any:
    args, kwargs = pytree.map_leaves(change, (args, kwargs))
    if change is _widen and _CASTS.get(function) in HALF_TYPES:
        function = torch.Tensor.float
    return function(*args, **kwargs)


def _widen(leaf: Any) -> Any:
    """Replace a half type, or a constant of one, by float32."""
    if isinstance(leaf, torch.dtype):
        return torch.float32 if leaf in HALF_TYPES else leaf
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in HALF_TYPES else leaf


def _round(leaf: Any) -> Any:
    """Round widened positions to the type that the model would have."""
    dtype = getattr(leaf, _DTYPE, None) if isinstance(leaf, Tensor) else None
    return leaf if dtype is None else leaf.to(dtype)


def _find_dtype(
    function: Any, leaves: Sequence[Any], tensors: Sequence[Tensor]
) -> torch.dtype | None:
    """Return the half type that a result of positions would have in the model; None: no half."""
    named = [leaf for leaf in leaves if isinstance(leaf, torch.dtype)]
    if function in _CASTS:
        named = [_CASTS[function]]
    elif function in _AS_OTHER:
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor)][1:]
        named += [getattr(other, _DTYPE, None) or other.dtype for other in others]
    if named:
        return named[-1] if named[-1] in HALF_TYPES else None
    found = [getattr(tensor, _DTYPE, None) or tensor.dtype for tensor in tensors]
    floating = [dtype for dtype in found if dtype.is_floating_point]
    if not floating or any(dtype not in HALF_TYPES for dtype in floating):
        return None
    return floating[0]


def _is_positions(tensor: Tensor) -> bool:
    kind = getattr(tensor, _KIND, None)
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return kind == _POSITIONS or (whole and kind is None)


def _is_activation(tensor: Tensor) -> bool:
    return getattr(tensor, _KIND, None) == _ACTIVATION


def _mark_positions(output: Any, dtype: torch.dtype | None) -> Any:
    for leaf in pytree.list_leaves(output):
        if isinstance(leaf, Tensor):
            setattr(leaf, _KIND, _POSITIONS)
            setattr(leaf, _DTYPE, dtype if leaf.dtype == torch.float32 else None)
    return output


def _mark_activations(output: Any) -> Any:
    for leaf in pytree.list_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            setattr(leaf, _KIND, _ACTIVATION)
            setattr(leaf, _DTYPE, None)
    return output
