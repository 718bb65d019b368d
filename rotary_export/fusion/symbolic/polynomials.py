"""Channels as polynomials of symbols: exact arithmetic on names instead of numbers.

A polynomial maps products of symbols to coefficients. Two channels with the same polynomial
contain the same numbers.

    x cos + rotate_half(x) sin, channel 0 of 4:   {(x0, cos0): 1, (x2, sin0): -1}

Symbols, each a tuple that starts with its kind:

    ("source", i)               channel i of the value at which tracing stops (x)
    ("value", value, i)         channel i of a value that no handler understands
    ("function", head, *args)   an elementwise function of polynomials, or of None
    ("leading", head, p)        an operator on the leading axes, applied to the polynomial p
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from onnxscript import ir

from rotary_export.fusion.values import read_dims

Symbol = tuple[Any, ...]
Product = tuple[Symbol, ...]
Polynomial = frozenset[tuple[Product, float]]  # products of symbols, each with a coefficient
Channels = np.ndarray[Any, np.dtype[Any]]  # of Polynomial, in the shape of the trailing axes

MAX_CHANNELS = 2**14
_MAX_TEXT = 80  # characters of a polynomial in a message


class UnknownShapeError(Exception):
    """The trailing axes of a value are not static."""


def number(value: float) -> Polynomial:
    """Return a channel that is one number."""
    return frozenset({((), float(value))}) if value else frozenset()


def symbol(kind: str, *parts: Any) -> Polynomial:
    """Return a channel that is one symbol."""
    return frozenset({(((kind, *parts),), 1.0)})


def add(a: Polynomial, b: Polynomial, sign: float = 1.0) -> Polynomial:
    """Return a + sign * b."""
    terms = dict(a)
    for product, coefficient in b:
        terms[product] = terms.get(product, 0.0) + sign * coefficient
    return frozenset((product, number) for product, number in terms.items() if number)


def multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    """Return a * b."""
    terms: dict[Product, float] = {}
    for one, x in a:
        for other, y in b:
            product = tuple(sorted(one + other, key=hash))
            terms[product] = terms.get(product, 0.0) + x * y
    return frozenset((product, number) for product, number in terms.items() if number)


def scale(a: Polynomial, factor: float) -> Polynomial:
    """Return factor * a."""
    return frozenset((product, factor * x) for product, x in a)


def has_symbol(channel: Polynomial, kind: str) -> bool:
    """Return whether a channel has a symbol of this kind, at its top level."""
    return any(symbol[0] == kind for product, _ in channel for symbol in product)


def trailing_shape(value: ir.Value, rank: int) -> tuple[int, ...]:
    """Return the sizes of a value's last `rank` axes.

    Raises:
        UnknownShapeError: One is not static, there are fewer axes, or too many channels.
    """
    dims = read_dims(value)
    if dims is None or len(dims) < rank:
        raise UnknownShapeError(value.name)
    shape = tuple(d for d in dims[len(dims) - rank :] if isinstance(d, int))
    if len(shape) != rank or math.prod(shape) > MAX_CHANNELS:
        raise UnknownShapeError(value.name)
    return shape


def symbols(kind: str, shape: tuple[int, ...], *source: Any) -> Channels:
    """Return channels that are symbols of their own."""
    channels = np.empty(shape, object)
    flat = channels.reshape(-1)
    for i in range(flat.size):
        flat[i] = symbol(kind, *source, i)
    return channels


def fill(shape: tuple[int, ...], make: Callable[[tuple[int, ...]], Polynomial]) -> Channels:
    """Make channels one by one, by their index."""
    channels = np.empty(shape, object)
    for index in np.ndindex(shape):
        channels[index] = make(index)
    return channels


def trace_constant(
    value: ir.Value, constant: np.ndarray[Any, Any], rank: int, shape: tuple[int, ...]
) -> Channels:
    """Return numbers where a channel is one number; otherwise equal columns get one symbol."""
    columns = constant.reshape(-1, math.prod(shape)) if constant.size else constant.reshape(0, 0)
    if not constant.size:
        return symbols("value", shape, value)
    if len(columns) == 1:
        return fill(
            shape,
            lambda index: number(columns[0, np.ravel_multi_index(index, shape) if shape else 0]),
        )
    first: dict[bytes, int] = {}
    flat = [first.setdefault(columns[:, i].tobytes(), i) for i in range(columns.shape[1])]
    return fill(
        shape,
        lambda index: symbol(
            "value", value, flat[int(np.ravel_multi_index(index, shape)) if shape else 0]
        ),
    )


def wrap_leading(head: tuple[Any, ...], channels: Channels) -> Channels:
    """Return what an operator on the leading axes makes of each channel alike."""
    return fill(channels.shape, lambda index: symbol("leading", head, channels[index]))


def format_polynomial(channel: Polynomial | Iterable[tuple[Product, float]], depth: int = 2) -> str:
    """Write a polynomial for a message: x[3]*Cos(angles[3]) - x[7]*Sin(angles[3]).

    Args:
        channel: The polynomial.
        depth: How deep functions are written; "..." below.
    """
    terms = [(_format_product(product, depth), number) for product, number in channel]
    text = ""
    for product, coefficient in sorted(terms, key=lambda term: (term[1] < 0, term[0])):
        size = abs(coefficient)
        written = f"{size:g}*{product}" if product and size != 1 else product or f"{size:g}"
        if text:
            text += f" {'-' if coefficient < 0 else '+'} {written}"
        else:
            text = f"-{written}" if coefficient < 0 else written
    text = text or "0"
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 3]}..."


def _format_product(product: Product, depth: int) -> str:
    """Write the source first."""
    written = [(item[0] != "source", _format_symbol(item, depth)) for item in product]
    return "*".join(text for _, text in sorted(written))


def _format_symbol(item: Symbol, depth: int) -> str:
    kind = item[0]
    if kind == "source":
        return f"x[{item[1]}]"
    if kind == "value":
        return f"{item[1].name}[{item[2]}]"
    if kind == "leading":  # it is the same in every channel
        return format_polynomial(item[2], depth)
    if not depth:
        return f"{item[1][0]}(...)"
    arguments = (format_polynomial(each, depth - 1) for each in item[2:] if each is not None)
    return f"{item[1][0]}({', '.join(arguments)})"
