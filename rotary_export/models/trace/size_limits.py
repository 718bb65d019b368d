"""Where a graph is the model: limits of sizes, and sizes at which that has to be proven.

Where a condition that a trace took for granted does not hold, the model itself takes another path
than the graph. Past a size from which on it never holds again, the graph is not legal. Elsewhere
the paths mostly give the same values (padding by nothing, another memory layout): some of these
sizes are proven.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rotary_export.bundle.dims import PAST, SEQ, TOTAL
from rotary_export.errors import RotaryExportError
from rotary_export.models.trace.guards import Condition
from rotary_export.proof.model_cases import LONGEST_CASE

_DENSE = 1 << 14  # every size up to that is looked at
_SIZES: tuple[int, ...] = (
    *range(2, _DENSE + 1),
    *((1 << power) + step for power in range(15, 21) for step in (-1, 0, 1)),
)
# Of conditions on several sizes.
_GRID = (2, 3, 4, 5, 7, 8, 16, 17, 32, 33, 51, 64, 100, 128, 256, 512, 1024, 4096)
_LARGEST_CASE = 2 * LONGEST_CASE  # product of the sizes in a condition


@dataclass
class SizeConstraints:
    """The sizes at which a graph is the model.

    Attributes:
        max_size: By name of a size, the largest that it may have.
        points: Sizes at which the model itself takes another path, to be proven.
        texts: The conditions that they are of.
        unverified: Conditions that fail only where it takes too long to prove.
        bounds: By name of a size, the one up to which a minimum or maximum is as it was traced,
            and the condition.
        mismatched: Conditions of which it turned out that the graph is not the model past them.
    """

    max_size: dict[str, int] = field(default_factory=dict)
    points: list[dict[str, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    bounds: dict[str, tuple[int, str]] = field(default_factory=dict)
    mismatched: list[str] = field(default_factory=list)

    def add(self, text: str, points: Sequence[dict[str, int]]) -> None:
        """Note what is to be proven for a condition."""
        self.points += [point for point in points if point not in self.points]
        self.texts.append(text)

    def tighten(self) -> bool:
        """Limit sizes to what bounds say; return whether there was anything to do."""
        bounds, self.bounds = self.bounds, {}
        for name, (limit, text) in bounds.items():
            self.max_size[name] = min(limit, self.max_size.get(name, limit))
            self.points = [p for p in self.points if p.get(name, 0) <= limit]
            self.texts.remove(text)
            self.mismatched.append(text)
        return bool(bounds)


def find_size_constraints(
    conditions: Sequence[Condition], longest: Mapping[str, int]
) -> SizeConstraints:
    """Find the sizes at which a model takes the path that was traced.

    Args:
        conditions: As `read_conditions`.
        longest: By name of a size, or TOTAL, what the model runs at, at most, where it is known.

    Raises:
        RotaryExportError: A condition fails at most sizes; the message names the place.
    """
    paths = SizeConstraints()
    failing: list[tuple[Condition, list[int]]] = []
    for condition in conditions:
        if len(condition.names) != 1:
            continue
        (name,) = condition.names
        fails = [size for size in _SIZES if not condition.holds(size)]
        if not fails:
            continue
        if not condition.is_guard:
            failing.append((condition, fails))
            continue
        limit = _find_limit(condition.holds, fails, min(LONGEST_CASE, longest.get(name, 1 << 30)))
        below = [size for size in fails if size <= min(limit, _DENSE)]
        if limit < 2 or 2 * len(below) > min(limit, _DENSE):
            raise RotaryExportError(
                f"the model takes another path where not {condition.text}; give {name} a fixed "
                "size with dynamic_shapes, or change the model there"
            )
        if limit < _SIZES[-1]:
            paths.max_size[name] = min(limit, paths.max_size.get(name, limit))
        if below:
            failing.append((condition, below))
    for condition, sizes in failing:
        (name,) = condition.names
        most = min([LONGEST_CASE, *(m[name] for m in (paths.max_size, longest) if name in m)])
        tried = _choose_sizes([size for size in sizes if size <= most])
        if not tried:
            continue
        paths.add(condition.text, [{name: size} for size in tried])
        if not condition.is_guard and sizes[-1] == _SIZES[-1]:
            limit = _find_limit(condition.holds, sizes, most)
            if 2 <= limit < paths.bounds.get(name, (limit + 1, ""))[0]:
                paths.bounds[name] = limit, condition.text
    for condition in conditions:
        if len(condition.names) > 1:
            _try_several(condition, paths, longest)
    return paths


def _find_limit(holds: Callable[[int], bool], fails: Sequence[int], most: int) -> int:
    """Find the size before those at which a condition fails for good, or can't be proven."""
    failing = set(fails)
    end = len(_SIZES)
    while end and _SIZES[end - 1] in failing:
        end -= 1
    if fails[0] > most:
        end = _SIZES.index(fails[0])
    if end in (0, len(_SIZES)):
        return 0 if end == 0 else _SIZES[-1]
    low, high = _SIZES[end - 1], _SIZES[end]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _choose_sizes(sizes: Sequence[int]) -> list[int]:
    """Choose some of a condition's sizes: two starts, the first end, and the last that is quick."""
    known = set(sizes)
    starts = [size for size in sizes if size - 1 not in known]
    ends = [size for size in sizes if size + 1 not in known]
    quick = [size for size in sizes if size <= 128]
    return sorted({*starts[:2], *ends[:1], *quick[-1:]})


def _try_several(condition: Condition, paths: SizeConstraints, longest: Mapping[str, int]) -> None:
    """Find where a condition on several sizes fails, within the limits of each."""

    def list_sizes(name: str) -> list[int]:
        most = min(paths.max_size.get(name, 1 << 30), longest.get(name, 1 << 30))
        return [size for size in _GRID if size <= most]

    def is_quick(point: dict[str, int]) -> bool:
        total = point.get(SEQ, 0) + point.get(PAST, 0)
        return (
            math.prod(point.values()) <= _LARGEST_CASE
            and max(point.values()) <= LONGEST_CASE
            and total <= longest.get(TOTAL, total)
        )

    grid = itertools.islice(itertools.product(*map(list_sizes, condition.names)), 1 << 16)
    fails = [
        dict(zip(condition.names, sizes, strict=True))
        for sizes in grid
        if not condition.holds(*sizes)
    ]
    quick = sorted(filter(is_quick, fails), key=lambda point: math.prod(point.values()))
    if quick:
        paths.add(condition.text, [quick[0], quick[len(quick) // 2]])
    elif fails and condition.is_guard:
        paths.unverified.append(condition.text)
