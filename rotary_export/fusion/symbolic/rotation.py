"""Recognise a rotation: what is rotated, in which layout, by which tables.

The checks run in this order, and the first one that fails decides (`refusal.CHECKS`):

1. `check_terms`: each channel is a sum of products with a channel of x.
2. `find_rotary_dim`: the leading channels are sums of two products, the others are copied.
3. `find_layout`: the products join the channels in pairs that the op has.
4. `match_pairs`: both channels of a pair have the same cosine and the same sine.
5. `find_table`: one value of the graph contains all cosines, and one all sines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from onnxscript import ir

from rotary_export.fusion.symbolic.channels import Tracer
from rotary_export.fusion.symbolic.pairs import (
    Half,
    Layout,
    Term,
    Terms,
    find_difference,
    format_terms,
    is_paired,
    list_layouts,
    read_terms,
    split_terms,
)
from rotary_export.fusion.symbolic.polynomials import (
    Channels,
    Product,
    UnknownShapeError,
    format_polynomial,
)
from rotary_export.fusion.symbolic.refusal import NotARotationError, Refusal, make_refusal
from rotary_export.fusion.values import Dims, read_dims

_CHANNEL_OPS = frozenset(
    "Add Sub Mul Neg Identity Slice Split Concat Gather Reshape Squeeze Unsqueeze Flatten "
    "Transpose Cast".split()
)
_MAX_SOURCES = 24
_MAX_VISITED = 80


@dataclass(frozen=True)
class Table:
    """Half-width cosines or sines, as channels of a value in the graph.

    Attributes:
        value: What the model multiplies with.
        rank: How many of its trailing axes are channels.
        channels: For each pair, the flat index among these.
        factor: A number that the channels are multiplied with, too.
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
        layout: Pairs of channels, and the order in which they come out.
        rotary_dim: R.
        cos: Table of cosines.
        sin: Table of sines.
        channels: Terms of out, for messages.
    """

    x: ir.Value
    out: ir.Value
    layout: Layout
    rotary_dim: int
    cos: Table
    sin: Table
    channels: tuple[Terms, ...] = field(repr=False, compare=False)

    @property
    def interleaved(self) -> bool:
        """Whether the pairs are (2i, 2i + 1), not (i, i + rotary_dim / 2)."""
        return self.layout.pairs[0] == (0, 1)


def find_rotation(out: ir.Value) -> Rotation | Refusal:
    """Find the value of which `out` is the rotation.

    Args:
        out: Any value.

    Returns:
        The rotation; or why it is none, for the source that got furthest.
    """
    dims = read_dims(out)
    best = None
    try:
        if not dims or not isinstance(dims[-1], int):
            raise NotARotationError("its number of channels is not static")
        for x in _list_sources(out, dims):
            found = _try_source(out, x)
            if isinstance(found, Rotation):
                return found
            if best is None or found.rank > best.rank:
                best = found
        if best is None:
            raise NotARotationError(f"no value above it has its shape {dims}")
    except NotARotationError as error:
        return make_refusal(error)
    return best


def _list_sources(out: ir.Value, wanted: Dims) -> Iterator[ir.Value]:
    """Go up from `out` through what moves channels; yield values of its shape, nearest first."""
    queue, seen, found = [out], {out}, 0
    while queue and len(seen) < _MAX_VISITED and found < _MAX_SOURCES:
        value = queue.pop(0)
        if value is not out and _has_same_sizes(value, wanted) and value.const_value is None:
            found += 1
            yield value
        node = value.producer()
        if node is None or node.domain or node.op_type not in _CHANNEL_OPS:
            continue
        for above in node.inputs:
            if above is not None and above not in seen:
                seen.add(above)
                queue.append(above)


def _has_same_sizes(value: ir.Value, wanted: Dims) -> bool:
    """Return whether shapes agree as far as they are known; two names may stand for one size."""
    dims = read_dims(value)
    if dims is None or len(dims) != len(wanted):
        return False
    return all(a == b for a, b in zip(dims, wanted, strict=True) if int in (type(a), type(b)))


def _try_source(out: ir.Value, x: ir.Value) -> Rotation | Refusal:
    try:
        return _recognise(out, x)
    except (UnknownShapeError, NotARotationError) as error:
        return make_refusal(error)


def _recognise(out: ir.Value, x: ir.Value) -> Rotation:
    tracer = Tracer(source=x)
    traced = tracer.trace(out, 1)
    channels = check_terms(traced)
    rotary_dim = find_rotary_dim(channels)
    layout = find_layout(channels, rotary_dim)
    cosines, sines = match_pairs(channels, layout)
    cos = find_table("cosines", cosines, tracer.multipliers, channels)
    sin = find_table("sines", sines, tracer.multipliers, channels)
    return Rotation(x, out, layout, rotary_dim, cos, sin, tuple(channels))


def check_terms(traced: Channels) -> list[Terms]:
    """Read each channel as a sum of products with a channel of x."""
    channels = read_terms(traced)
    if not any(terms is not None and len(terms) == 2 for terms in channels):
        raise NotARotationError(
            "no channel is a sum of two products with x: channel 0 is "
            f"{format_polynomial(traced[0])}"
        )
    for i, terms in enumerate(channels):
        if terms is None:
            raise NotARotationError(
                f"channel {i} is not a sum of products with x: it is "
                f"{format_polynomial(traced[i])}",
                channels,
            )
    return channels


def find_rotary_dim(channels: Sequence[Terms]) -> int:
    """Count the leading channels that are sums of two products; the others must be copied."""
    rotated = [i for i, terms in enumerate(channels) if terms != [Term(i, (), 1.0)]]
    rotary_dim = len(rotated)
    if rotated != list(range(rotary_dim)):
        raise NotARotationError(
            f"the rotated channels are not the leading ones: channel {rotated[-1]} is rotated, "
            f"channel {next(i for i in range(len(channels)) if i not in rotated)} is not",
            channels,
        )
    for i in rotated:
        if len(channels[i] or ()) != 2:
            raise NotARotationError(
                f"channel {i} is not the sum of two products with x: it is "
                f"{format_terms(channels[i])}",
                channels,
            )
    if rotary_dim % 2:
        raise NotARotationError(f"{rotary_dim} channels are rotated, an odd number", channels)
    return rotary_dim


def find_layout(channels: Sequence[Terms], rotary_dim: int) -> Layout:
    """Find out which channels are rotated together, and in which order they come out."""
    for layout in list_layouts(rotary_dim, len(channels)):
        arranged = layout.arrange(channels)
        if all(is_paired(arranged[c], pair) for pair in layout.pairs for c in pair):
            return layout
    raise NotARotationError(
        "the pairs are neither (i, i + rotary_dim / 2) nor (2i, 2i + 1) of the channels: "
        f"channel 0 is {format_terms(channels[0])}",
        channels,
    )


def match_pairs(channels: Sequence[Terms], layout: Layout) -> tuple[list[Half], list[Half]]:
    """Return the cosine and the sine of each pair."""
    cosines, sines = [], []
    arranged = layout.arrange(channels)
    for a, b in layout.pairs:
        difference = find_difference(arranged, a, b)
        if difference:
            raise NotARotationError(f"channels {a} and {b}: {difference}", channels)
        own, _ = split_terms(arranged[a], a)
        _, cross = split_terms(arranged[b], b)
        cosines.append((own.table, own.coefficient))
        sines.append((cross.table, cross.coefficient))
    return cosines, sines


def find_table(
    what: str,
    wanted: Sequence[Half],
    multipliers: Sequence[tuple[ir.Value, Channels, int]],
    channels: Sequence[Terms],
) -> Table:
    """Find a value that contains the wanted channels, but for a common factor."""
    for value, traced, rank in multipliers:
        place: dict[Product, tuple[int, float]] = {}
        for i, channel in enumerate(traced.flat):
            if len(channel) == 1:
                ((product, coefficient),) = channel
                place.setdefault(product, (i, coefficient))
        if all(product in place for product, _ in wanted):
            found = [place[product] for product, _ in wanted]
            factors = {factor / own[1] for own, (_, factor) in zip(found, wanted, strict=True)}
            if len(factors) == 1:
                return Table(value, rank, tuple(i for i, _ in found), factors.pop())
    raise NotARotationError(
        f"no one value of the graph contains the {what}: the first is "
        f"{format_polynomial([wanted[0]])}",
        channels,
    )
