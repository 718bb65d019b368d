"""Recognise a rotation: what is rotated, in which layout, by which tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnxscript import ir

from rotary_export.fusion.symbolic.channels import Tracer
from rotary_export.fusion.symbolic.polynomials import (
    Atom,
    Channels,
    Sum,
    UnknownShapeError,
    read_dims,
)

_CHANNEL_OPS = {
    "Add", "Sub", "Mul", "Neg", "Identity", "Slice", "Split", "Concat", "Gather", "Reshape",
    "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Cast",
}  # fmt: skip
_MAX_CANDIDATES = 24
_MAX_VISITED = 80


@dataclass(frozen=True)
class Table:
    """Half-width cosines or sines, as channels of a value in the graph.

    Attributes:
        value: What the model multiplies with.
        rank: How many of its trailing axes are channels.
        channels: For each pair, the flat index among these.
        factor: What the channels are to be multiplied with, too.
    """

    value: ir.Value
    rank: int
    channels: tuple[int, ...]
    factor: float


@dataclass(frozen=True)
class Rotation:
    """`out` is `x` with its leading `rotary_dim` channels rotated.

    Attributes:
        x: Of the shape of out.
        out: What the model computes with primitives.
        interleaved: Pairs (2i, 2i + 1), else (i, i + rotary_dim / 2).
        rotary_dim: R.
        cos: Table of cosines.
        sin: Table of sines.
        order: Channels of the rotated x that make out; None: all, in order. DeepSeek's takes pairs
            (2i, 2i + 1) and gives halves.
    """

    x: ir.Value
    out: ir.Value
    interleaved: bool
    rotary_dim: int
    cos: Table
    sin: Table
    order: tuple[int, ...] | None = None


class NotARotationError(Exception):
    """Why a value is not a rotation; empty where nothing looks like one."""


def find_rotation(out: ir.Value) -> Rotation:
    """Find the value of which `out` is the rotation.

    Args:
        out: Any value.

    Returns:
        The rotation.

    Raises:
        NotARotationError: There is none; the message says why the best candidate was refused.
    """
    reason = ""
    dims = read_dims(out)
    if dims is None or not isinstance(dims[-1] if dims else None, int):
        raise NotARotationError("its number of channels is not static")
    for x in _find_candidates(out):
        try:
            return _recognise(out, x)
        except NotARotationError as error:
            reason = max(reason, str(error), key=len)
        except UnknownShapeError as error:
            reason = reason or f"the shape of {error} is not known"
    raise NotARotationError(reason)


def _find_candidates(out: ir.Value) -> Iterator[ir.Value]:
    """Go up from `out` through what moves channels; yield values of its shape, nearest first."""
    wanted = read_dims(out)
    queue, seen, found = [out], {out}, 0
    while queue and len(seen) < _MAX_VISITED and found < _MAX_CANDIDATES:
        value = queue.pop(0)
        if value is not out and _same_sizes(value, wanted) and value.const_value is None:
            found += 1
            yield value
        node = value.producer()
        if node is None or node.domain or node.op_type not in _CHANNEL_OPS:
            continue
        for above in node.inputs:
            if above is not None and above not in seen:
                seen.add(above)
                queue.append(above)


def _same_sizes(value: ir.Value, wanted: list[int | str | None] | None) -> bool:
    """Whether shapes agree as far as they are known; two names may stand for one size."""
    dims = read_dims(value)
    if dims is None or wanted is None or len(dims) != len(wanted):
        return False
    return all(a == b for a, b in zip(dims, wanted, strict=True) if int in (type(a), type(b)))


@dataclass(frozen=True)
class _Term:
    """coefficient * x[channel] * table."""

    channel: int
    table: tuple[object, ...]
    factor: float


def _read_terms(channel: Sum) -> list[_Term] | None:
    """Read a channel as a sum of products with one channel of x each."""
    terms = []
    for product, factor in channel:
        mine = [atom for atom in product if atom[0] == "x"]
        if len(mine) != 1:
            return None
        rest = tuple(atom for atom in product if atom[0] != "x")
        terms.append(_Term(mine[0][1], rest, factor))
    return terms


def _recognise(out: ir.Value, x: ir.Value) -> Rotation:
    tracer = Tracer(leaf=x)
    channels = tracer.trace(out, 1)
    terms = [_read_terms(channel) for channel in channels]
    if any(t is None for t in terms) or not any(t and len(t) == 2 for t in terms):
        raise NotARotationError("")
    rotated = [i for i, t in enumerate(terms) if t != [_Term(i, (), 1.0)]]
    rotary_dim = len(rotated)
    if rotated != list(range(rotary_dim)):
        raise NotARotationError("the rotated channels are not the leading ones")
    if rotary_dim % 2 or any(len(t or ()) != 2 for t in terms[:rotary_dim]):
        raise NotARotationError("a channel is not the sum of two products with x")
    pairs, order = _find_pairs([t or [] for t in terms], rotary_dim)
    if order is not None:
        terms = [terms[order.index(i)] for i in range(rotary_dim)]
    cos, sin = [], []
    for a, b in pairs:
        own, cross = sorted(terms[a] or (), key=lambda t: t.channel != a)
        own_b, cross_b = sorted(terms[b] or (), key=lambda t: t.channel != b)
        if {cross.channel, own_b.channel} != {b} or cross_b.channel != a:
            raise NotARotationError("the channels of a pair are not turned into each other")
        if (own.table, own.factor) != (own_b.table, own_b.factor):
            raise NotARotationError("the cosines of a pair differ, or are not known to be equal")
        if cross.table != cross_b.table:
            raise NotARotationError("the sines of a pair differ, or are not known to be equal")
        if cross.factor != -cross_b.factor:
            raise NotARotationError("the two sines of a pair must have opposite signs")
        cos.append((own.table, own.factor))
        sin.append((cross_b.table, cross_b.factor))
    cosines, sines = (_find_table(wanted, tracer.factors) for wanted in (cos, sin))
    return Rotation(x, out, pairs[0] == (0, 1), rotary_dim, cosines, sines, order)


def _find_pairs(
    terms: list[list[_Term]], rotary_dim: int
) -> tuple[list[tuple[int, int]], tuple[int, ...] | None]:
    """Find out which channels are turned into each other, and in which order they come out."""
    half = rotary_dim // 2
    halves = [(i, i + half) for i in range(half)]
    twos = [(2 * i, 2 * i + 1) for i in range(half)]
    apart = tuple(i for pair in zip(*twos, strict=True) for i in pair) if half else ()
    for pairs, order in ((halves, None), (twos, None), (twos, apart)):
        if order is not None and len(terms) != rotary_dim:
            continue
        places = order or range(rotary_dim)
        place = [places.index(i) for i in range(rotary_dim)]
        if all({t.channel for t in terms[place[c]]} == {*pair} for pair in pairs for c in pair):
            return pairs, order
    raise NotARotationError(
        "the pairs are neither (i, i + rotary_dim / 2) nor (2i, 2i + 1) of the channels"
    )


def _find_table(
    wanted: list[tuple[tuple[object, ...], float]], factors: list[tuple[ir.Value, Channels, int]]
) -> Table:
    """Find a value that holds the wanted channels, but for a common factor."""
    for value, channels, rank in factors:
        place: dict[tuple[object, ...], tuple[int, float]] = {}
        for i, channel in enumerate(channels.flat):
            if len(channel) == 1:
                ((product, factor),) = channel
                place.setdefault(product, (i, factor))
        if all(product in place for product, _ in wanted):
            found = [place[product] for product, _ in wanted]
            ratios = {factor / own[1] for own, (_, factor) in zip(found, wanted, strict=True)}
            if len(ratios) == 1:
                return Table(value, rank, tuple(i for i, _ in found), ratios.pop())
    raise NotARotationError("no one value of the graph holds the cosines, or the sines")


def looks_rotary(node: ir.Node) -> tuple[object, frozenset[int]] | None:
    """Say whether an Add or Sub adds two different channels of one value, each times something.

    Args:
        node: An Add or Sub of two Mul.

    Returns:
        What identifies the call: the value and its channels; None: it is something else.
    """
    tracer = Tracer()
    try:
        channels = tracer.trace(node.outputs[0], 1)
    except UnknownShapeError:
        return None
    bases: set[object] = set()
    touched: set[int] = set()
    for channel in channels.flat:
        if len(channel) != 2:
            return None
        (one, _), (two, _) = channel
        shared = dict(map(_split_atom, one))
        crossed = {
            base: (shared[base], index)
            for base, index in map(_split_atom, two)
            if base in shared and index != shared[base]
        }
        if len(crossed) != 1 or len(one) < 2 or len(two) < 2:
            return None
        ((base, pair),) = crossed.items()
        bases.add(base)
        touched.update(pair)
    return (bases.pop(), frozenset(touched)) if len(bases) == 1 else None


def _split_atom(atom: Atom) -> tuple[object, int]:
    """Return what an atom is a channel of, and which."""
    if atom[0] == "v":
        return atom[1], atom[2]
    inner = atom[-1]
    if atom[0] in ("l", "o", "e") and len(inner) == 1:
        ((product, factor),) = inner
        if len(product) == 1:
            base, index = _split_atom(product[0])
            return (*atom[:-1], base, factor), index
    return atom, 0
