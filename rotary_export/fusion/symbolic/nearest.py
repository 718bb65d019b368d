"""Describe the nearest rotation that a value could have been, for `--why`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rotary_export.fusion.symbolic.pairs import (
    Layout,
    Term,
    Terms,
    find_difference,
    is_paired,
    list_layouts,
    split_terms,
)

_MAX_NAMED = 3  # pairs that differ are named up to here, and counted


@dataclass(frozen=True)
class _Fit:
    """How well channels fit a layout.

    Attributes:
        layout: Its pairs are channels of x.
        channels: Terms, in the order of x.
        rotated: Channels that the layout covers.
        differing: Pairs that are not a rotation.
    """

    layout: Layout
    channels: list[Terms]
    rotated: list[int]
    differing: list[tuple[int, int]]

    @property
    def score(self) -> tuple[int, int]:
        """Channels that fit; channels that are at least sums of the right products."""
        paired = sum(is_paired(self.channels[c], pair) for pair in self.layout.pairs for c in pair)
        return len(self.rotated) - 2 * len(self.differing), paired


def describe_nearest(channels: Sequence[Terms]) -> str:
    """Describe the layout that the most channels fit, and those that do not.

    Args:
        channels: Terms of each channel of a value.

    Returns:
        "half layout, 62 of 64 channels fit; channels 5 and 37 differ: ..."; empty if no channel
        is a sum of the products of any layout.
    """
    fits = [_try_layout(channels, rotated, layout) for rotated, layout in _list_tries(channels)]
    best = max(fits, key=lambda fit: fit.score, default=None)
    if best is None or not any(best.score):
        return ""
    first, last, count = best.rotated[0], best.rotated[-1], len(best.rotated)
    where = f" of channels {first} to {last}" if first else ""
    if not best.differing:
        return f"{best.layout.name}{where}, all {count} channels fit"
    pairs = [f"{a} and {b}" for a, b in best.differing]
    named = ", ".join(pairs[:_MAX_NAMED])
    more = f" (and {len(pairs) - _MAX_NAMED} more pairs)" if len(pairs) > _MAX_NAMED else ""
    return (
        f"{best.layout.name}{where}, {best.score[0]} of {count} channels fit; channels "
        f"{named}{more} differ: {_describe_difference(best)}"
        f"{_describe_tiling(best)}"
    )


def _describe_difference(fit: _Fit) -> str:
    """Return what differs; the reason of the refusal shows the terms of a pair already."""
    difference = find_difference(fit.channels, *fit.differing[0])
    assert difference is not None
    return str(difference) if len(difference.found) == 1 else difference.what


def _list_tries(channels: Sequence[Terms]) -> Iterator[tuple[list[int], Layout]]:
    every = list(range(len(channels)))
    rotated = [i for i in every if channels[i] != [Term(i, (), 1.0)]]
    for covered in (rotated, every) if rotated != every else (every,):
        size = len(covered)
        if size < 2 or size % 2:
            continue
        layouts = list_layouts(size, len(channels))
        if size % 4 == 0:
            layouts.append(_make_blocks(size))
        for layout in layouts:
            yield covered, layout


def _make_blocks(size: int) -> Layout:
    """2-D rotations of images: each half of the channels is rotated by itself."""
    quarter = size // 4
    first = [(i, i + quarter) for i in range(quarter)]
    second = [(a + size // 2, b + size // 2) for a, b in first]
    name = f"half layout in two blocks of {size // 2} channels (the op has one block)"
    return Layout(name, (*first, *second))


def _try_layout(channels: Sequence[Terms], rotated: list[int], layout: Layout) -> _Fit:
    pairs = tuple((rotated[a], rotated[b]) for a, b in layout.pairs)
    arranged = layout.arrange(channels)
    differing = [pair for pair in pairs if find_difference(arranged, *pair)]
    return _Fit(Layout(layout.name, pairs, layout.order), arranged, rotated, differing)


def _describe_tiling(fit: _Fit) -> str:
    """Return for which other layout the cosines are tiled, if they are."""
    if 2 * len(fit.differing) != len(fit.rotated):
        return ""
    if not all(is_paired(fit.channels[c], pair) for pair in fit.layout.pairs for c in pair):
        return ""
    own = {c: split_terms(fit.channels[c], c)[0].table for pair in fit.layout.pairs for c in pair}
    for other in list_layouts(len(fit.rotated), 0):
        pairs = [(fit.rotated[a], fit.rotated[b]) for a, b in other.pairs]
        if other.name != fit.layout.name and all(own[a] == own[b] for a, b in pairs):
            return f"; the tables are tiled for the {other.name}"
    return ""
