"""Which channels are rotated together, and whether two of them are one rotation.

In a rotation, the channels of each pair (a, b) are

    y_a = x_a cos - x_b sin
    y_b = x_b cos + x_a sin

with the same cos and the same sin in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rotary_export.fusion.symbolic.polynomials import (
    Channels,
    Polynomial,
    Product,
    format_polynomial,
)


@dataclass(frozen=True)
class Term:
    """coefficient * x[channel] * table."""

    channel: int
    table: Product
    coefficient: float


Terms = list[Term] | None  # of one channel; None: it is not a sum of products with x
Half = tuple[Product, float]  # the cosine, or the sine, of a pair: a product and its coefficient


@dataclass(frozen=True)
class Layout:
    """Pairs of channels.

    Attributes:
        name: For messages.
        pairs: Channels of x.
        order: Channels of the rotated x that make the result; None: all, in order.
    """

    name: str
    pairs: tuple[tuple[int, int], ...]
    order: tuple[int, ...] | None = None

    def arrange(self, channels: Sequence[Terms]) -> list[Terms]:
        """Return the result's channels in the order of x."""
        if self.order is None:
            return list(channels)
        return [channels[self.order.index(i)] for i in range(len(self.order))]


def list_layouts(rotary_dim: int, head_dim: int) -> list[Layout]:
    """Return the layouts that the op computes.

    The last one is DeepSeek's: pairs (2i, 2i + 1) are rotated, and come out as two halves.
    """
    half = rotary_dim // 2
    halves = tuple((i, i + half) for i in range(half))
    interleaved_pairs = tuple((2 * i, 2 * i + 1) for i in range(half))
    layouts = [
        Layout("half layout", halves),
        Layout("interleaved layout", interleaved_pairs),
    ]
    if rotary_dim == head_dim:
        deinterleaved_order = (*range(0, rotary_dim, 2), *range(1, rotary_dim, 2))
        name = "interleaved layout that comes out as halves"
        layouts.append(Layout(name, interleaved_pairs, deinterleaved_order))
    return layouts


def read_terms(channels: Channels) -> list[Terms]:
    """Read each channel as a sum of products with one channel of x."""
    return [_read_channel(channel) for channel in channels]


def _read_channel(channel: Polynomial) -> Terms:
    terms = []
    for product, coefficient in channel:
        from_x = [symbol for symbol in product if symbol[0] == "source"]
        if len(from_x) != 1:
            return None
        table = tuple(symbol for symbol in product if symbol[0] != "source")
        terms.append(Term(from_x[0][1], table, coefficient))
    return terms


def format_terms(terms: Terms) -> str:
    """Write a channel for a message."""
    if terms is None:
        return "no sum of products with x"
    return format_polynomial(
        ((("source", term.channel), *term.table), term.coefficient) for term in terms
    )


def is_paired(terms: Terms, pair: tuple[int, int]) -> bool:
    """Return whether a channel is the sum of one product with each channel of a pair."""
    return terms is not None and len(terms) == 2 and {t.channel for t in terms} == {*pair}


def split_terms(terms: Terms, channel: int) -> tuple[Term, Term]:
    """Return the term with x[channel], and the other one, of a channel that is paired."""
    own, cross = sorted(terms or (), key=lambda term: term.channel != channel)
    return own, cross


@dataclass(frozen=True)
class Difference:
    """What keeps two channels from being one rotation; a message only once it is formatted.

    Attributes:
        what: Without what was found.
        found: Polynomials that show it.
    """

    what: str
    found: tuple[Terms, ...]

    def __str__(self) -> str:
        return f"{self.what}: {' and '.join(map(format_terms, self.found))}"


def find_difference(channels: Sequence[Terms], a: int, b: int) -> Difference | None:
    """Find what keeps two channels from being one rotation.

    Args:
        channels: In the order of x.
        a: Its first channel.
        b: Its second.
    """
    for mine, other in ((a, b), (b, a)):
        if not is_paired(channels[mine], (a, b)):
            sign = "-" if mine == a else "+"
            what = f"channel {mine} is not x[{mine}]*cos {sign} x[{other}]*sin"
            return Difference(what, (channels[mine],))
    own, cross = split_terms(channels[a], a)
    own_b, cross_b = split_terms(channels[b], b)
    if (own.table, own.coefficient) != (own_b.table, own_b.coefficient):
        what = "the cosines of a pair differ, or are not known to be equal"
        return Difference(what, (channels[a], channels[b]))
    if cross.table != cross_b.table or abs(cross.coefficient) != abs(cross_b.coefficient):
        what = "the sines of a pair differ, or are not known to be equal"
        return Difference(what, (channels[a], channels[b]))
    if cross.coefficient != -cross_b.coefficient:
        what = "the two sines of a pair must have opposite signs"
        return Difference(what, (channels[a], channels[b]))
    return None
