"""einx: elementwise operations, which turn sizes into numbers before torch.export sees them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "where": torch.where,
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "true_divide": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "less": torch.lt,
    "less_equal": torch.le,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
}


@contextmanager
def broadcast_with_symbols() -> Iterator[None]:
    """Replace einx's elementwise functions, if it is imported, by broadcasting.

    A pattern such as "b n, b n d, -> b n d" needs no size. Other patterns go to einx itself.
    """
    module = sys.modules.get("einx")
    names = [name for name in _ELEMENTWISE if module is not None and hasattr(module, name)]
    originals = {name: getattr(module, name) for name in names}
    try:
        for name in names:
            setattr(module, name, _make_function(_ELEMENTWISE[name], originals[name]))
        yield
    finally:
        for name in names:
            setattr(module, name, originals[name])


def _make_function(
    function: Callable[..., Tensor], original: Callable[..., Any]
) -> Callable[..., Any]:
    def call(pattern: Any, *operands: Any, **options: Any) -> Any:
        names = None if options else _read_pattern(pattern, len(operands))
        if names is None:
            return original(pattern, *operands, **options)
        *inputs, output = names
        return function(*(_align(x, own, output) for x, own in zip(operands, inputs, strict=True)))

    return call


def _read_pattern(pattern: Any, count: int) -> list[list[str]] | None:
    """Return the axes of each operand and of the result; None: it is another kind of pattern."""
    if not isinstance(pattern, str) or pattern.count("->") != 1:
        return None
    left, right = pattern.split("->")
    names = [part.split() for part in (*left.split(","), right)]
    *inputs, output = names
    simple = all(name.isidentifier() for own in inputs for name in own)
    known = all(set(own) <= set(output) and len({*own}) == len(own) for own in inputs)
    fits = all(name.isidentifier() or name == "1" for name in output)
    made = {name for own in inputs for name in own} == set(output) - {"1"}
    return names if simple and known and fits and made and len(inputs) == count else None


def _align(x: Any, names: Sequence[str], output: Sequence[str]) -> Any:
    """Bring a tensor's axes into the order of the result, with axes of size 1 for the others."""
    if not isinstance(x, Tensor) or not names:
        return x
    x = x.permute([names.index(name) for name in output if name in names])
    return x[tuple(slice(None) if name in names else None for name in output)]
