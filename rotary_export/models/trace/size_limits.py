"""The sizes at which a graph equals its model: limits, and sizes to verify.

A trace follows one branch of the model. Where a condition on sizes does not hold, the model takes
another branch than the graph. If the condition holds only up to some size, that size becomes a
limit. If it fails at single sizes, both branches mostly compute the same (padding by nothing,
another memory layout): some of these sizes are verified.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rotary_export.bundle.dims import PAST, SEQ, TOTAL
from rotary_export.errors import RotaryExportError
from rotary_export.models.trace.guards import Condition
from rotary_export.proof.models.plan import LONGEST_CASE

_DENSE = 1 << 14  # every size up to that is looked at
_SIZES: tuple[int, ...] = (
    *range(2, _DENSE + 1),
    *((1 << power) + step for power in range(15, 21) for step in (-1, 0, 1)),
)
# Of conditions on several sizes.
_GRID = (2, 3, 4, 5, 7, 8, 16, 17, 32, 33, 51, 64, 100, 128, 256, 512, 1024, 4096)
_LARGEST_CASE = 2 * LONGEST_CASE  # product of the sizes in a condition
_UNLIMITED = 1 << 30

Sizes = dict[str, int]  # by name


class OtherBranchError(RotaryExportError):
    """The model takes another branch than the traced one, where the graph must equal it.

    Attributes:
        sizes: Where it takes the other branch: a trace there may cover more sizes.
    """

    def __init__(self, message: str, sizes: Sizes) -> None:
        super().__init__(message)
        self.sizes = sizes


@dataclass
class SizeConstraints:
    """The sizes at which a graph equals its model.

    Attributes:
        max_size: By name of a size, the largest that the graph accepts.
        sizes_to_verify: Sizes at which the model takes another branch than the graph.
        conditions: The conditions that fail at these sizes, human-readable.
        unverified: Conditions that fail only at sizes too large to be run.
        bounds: By name of a size, the largest at which a minimum or maximum is as traced, and the
            condition.
        lower_bounds: The smallest from which on a branch is the traced one, and the condition.
        mismatched: Conditions past which the graph differs from the model; their bounds are limits.
        min_size: By name of a size, the smallest that the graph accepts.
        reasons: By limit, such as "seq_len <= 8", the condition that it comes from.
    """

    max_size: Sizes = field(default_factory=dict)
    sizes_to_verify: list[Sizes] = field(default_factory=list)
    conditions: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    bounds: dict[str, tuple[int, str]] = field(default_factory=dict)
    lower_bounds: dict[str, tuple[int, str]] = field(default_factory=dict)
    mismatched: list[str] = field(default_factory=list)
    min_size: Sizes = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, condition: str, sizes: Sequence[Sizes]) -> None:
        """Note the sizes to verify for a condition."""
        self.sizes_to_verify += [each for each in sizes if each not in self.sizes_to_verify]
        self.conditions.append(condition)

    def limit(self, name: str, size: int, condition: str) -> None:
        """Lower the largest size of a name, unless it is lower."""
        known = self.max_size.get(name, _UNLIMITED)
        if size < known:
            self.reasons.pop(f"{name} <= {known}", None)
            self.reasons[f"{name} <= {size}"] = condition
            self.max_size[name] = size

    def tighten(self, example: Mapping[str, int], failed: Mapping[str, int] | None = None) -> bool:
        """Limit sizes to their bounds; return whether there was one, and none excludes these.

        Args:
            example: Sizes that must stay legal.
            failed: Those at which the graph differs. If they are below a bound, that alone becomes
                a limit.
        """
        lower = {
            name: (least, condition)
            for name, (least, condition) in self.lower_bounds.items()
            if (failed or {}).get(name, least) < least
        }
        if lower:
            return self._raise_smallest(lower, example)
        if any(largest < example.get(name, 0) for name, (largest, _) in self.bounds.items()):
            return False
        bounds, self.bounds = self.bounds, {}
        for name, (largest, condition) in bounds.items():
            self.limit(name, largest, condition)
            self._drop(condition, name, 0, largest)
        return bool(bounds)

    def _raise_smallest(
        self, bounds: Mapping[str, tuple[int, str]], example: Mapping[str, int]
    ) -> bool:
        if any(least > example.get(name, least) for name, (least, _) in bounds.items()):
            return False
        for name, (least, condition) in bounds.items():
            del self.lower_bounds[name]
            self.min_size[name] = least
            self.reasons[f"{name} >= {least}"] = condition
            self._drop(condition, name, least, _UNLIMITED)
        return True

    def _drop(self, condition: str, name: str, least: int, most: int) -> None:
        """Verify legal sizes only, as a limit takes the place of a condition."""
        self.sizes_to_verify = [
            sizes for sizes in self.sizes_to_verify if least <= sizes.get(name, least) <= most
        ]
        self.conditions.remove(condition)
        self.mismatched.append(condition)


def find_size_constraints(
    conditions: Sequence[Condition],
    max_run_size: Mapping[str, int],
    min_size: Mapping[str, int] | None = None,
    max_size: Mapping[str, int] | None = None,
    example: Mapping[str, int] | None = None,
    traced: Mapping[str, int] | None = None,
) -> SizeConstraints:
    """Find the sizes at which a model takes the branch that was traced.

    Args:
        conditions: As `read_conditions`.
        max_run_size: By name of a size, or TOTAL, the largest that the model itself runs at, where
            it is known.
        min_size: By name of a size, the smallest that is legal.
        max_size: The largest.
        example: By name of a size, that of the example inputs.
        traced: The one that was traced.

    Raises:
        OtherBranchError: A condition fails at most sizes, or at the example's; the message names
            the source line.
    """
    known = dict(example or {}), dict(traced or {})
    constraints = SizeConstraints(dict(max_size or {}), min_size=dict(min_size or {}))
    failing: list[tuple[Condition, list[int]]] = []
    for condition in conditions:
        if len(condition.names) == 1:
            failing += _limit_size(condition, constraints, max_run_size, *known)
    for condition, sizes in failing:
        _verify_size(condition, sizes, constraints, max_run_size)
    for condition in conditions:
        if len(condition.names) > 1 and not condition.raises:
            _verify_several(condition, constraints, max_run_size)
    return constraints


def _limit_size(
    condition: Condition,
    constraints: SizeConstraints,
    max_run_size: Mapping[str, int],
    example: Sizes,
    traced: Sizes,
) -> list[tuple[Condition, list[int]]]:
    """Limit a size to where a guard can hold; return the sizes below at which it fails, if any."""
    (name,) = condition.names
    low, high = constraints.min_size.get(name, 0), constraints.max_size.get(name, _UNLIMITED)
    fails = [size for size in _SIZES if low <= size and not condition.holds(size)]
    if not fails or fails[0] > high:
        return []
    if not condition.is_guard:
        return [(condition, fails)]
    longest = min(LONGEST_CASE, max_run_size.get(name, _UNLIMITED))
    limit = _find_limit(condition.holds, fails, longest)
    largest = min(limit, high, _DENSE)
    below = [size for size in fails if size <= largest]
    if limit < 2 or 2 * len(below) > largest:
        after = [size for size in fails if size > traced.get(name, 0)]
        raise OtherBranchError(
            f"the model takes the traced branch only where {condition.text}; give {name} a fixed "
            "size with dynamic_shapes, or change the model there",
            {name: after[0]} if after and after[0] <= longest else {},
        )
    if limit < (own := example.get(name, 0)):
        raise OtherBranchError(
            f"the model takes the traced branch only where {condition.text}: that limits {name} to "
            f"{limit}, and the example has {own}; give {name} a fixed size with dynamic_shapes, "
            "or change the model there",
            {name: own},
        )
    if limit < _SIZES[-1]:
        constraints.limit(name, limit, condition.text)
    if below and below == [size for size in _SIZES if low <= size <= below[-1]]:
        constraints.lower_bounds[name] = below[-1] + 1, condition.text
    return [(condition, below)] if below else []


def _verify_size(
    condition: Condition,
    fails: Sequence[int],
    constraints: SizeConstraints,
    max_run_size: Mapping[str, int],
) -> None:
    """Choose sizes to verify of those at which a condition on one size fails."""
    (name,) = condition.names
    most = min(
        [LONGEST_CASE, *(m[name] for m in (constraints.max_size, max_run_size) if name in m)]
    )
    chosen = _choose_sizes([size for size in fails if size <= most])
    if not chosen:
        return
    constraints.add(condition.text, [{name: size} for size in chosen])
    if not condition.is_guard and fails[-1] == _SIZES[-1]:
        limit = _find_limit(condition.holds, fails, most)
        if 2 <= limit < constraints.bounds.get(name, (limit + 1, ""))[0]:
            constraints.bounds[name] = limit, condition.text


def _find_limit(holds: Callable[[int], bool], fails: Sequence[int], most: int) -> int:
    """Find the size before those at which a condition fails for good, or can't be verified."""
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
    """Choose two starts of ranges, the end of the first, and the last size that is quick to run."""
    known = set(sizes)
    starts = [size for size in sizes if size - 1 not in known]
    ends = [size for size in sizes if size + 1 not in known]
    quick = [size for size in sizes if size <= 128]
    return sorted({*starts[:2], *ends[:1], *quick[-1:]})


def _verify_several(
    condition: Condition, constraints: SizeConstraints, max_run_size: Mapping[str, int]
) -> None:
    """Choose sizes to verify of those at which a condition on several sizes fails."""

    def list_sizes(name: str) -> list[int]:
        most = min(m.get(name, _UNLIMITED) for m in (constraints.max_size, max_run_size))
        return [size for size in _GRID if constraints.min_size.get(name, 0) <= size <= most]

    def is_quick(sizes: Sizes) -> bool:
        total = sizes.get(SEQ, 0) + sizes.get(PAST, 0)
        return (
            math.prod(sizes.values()) <= _LARGEST_CASE
            and max(sizes.values()) <= LONGEST_CASE
            and total <= max_run_size.get(TOTAL, total)
        )

    grid = itertools.islice(itertools.product(*map(list_sizes, condition.names)), 1 << 16)
    fails = [
        dict(zip(condition.names, sizes, strict=True))
        for sizes in grid
        if not condition.holds(*sizes)
    ]
    quick = sorted(filter(is_quick, fails), key=lambda sizes: math.prod(sizes.values()))
    if quick:
        constraints.add(condition.text, [quick[0], quick[len(quick) // 2]])
    elif fails and condition.is_guard:
        constraints.unverified.append(condition.text)
