"""The smallest size, and the multiple, that a model accepts: found by running it.

A convolution needs as many samples as its kernel has; an image consists of whole patches. A model
raises an error at other sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Sizes = Mapping[str, int]  # by name
Runs = Callable[[Sizes], bool]


@dataclass(frozen=True)
class LegalSize:
    """The sizes of one name at which a model runs.

    Attributes:
        smallest: The first of them.
        multiple: They are multiples of it.
    """

    smallest: int
    multiple: int


def find_legal_sizes(runs: Runs, known: Sizes, names: Iterable[str]) -> dict[str, LegalSize]:
    """Find where a model runs, name by name; the other sizes stay as they are.

    Args:
        runs: Returns whether the model runs at such sizes.
        known: Sizes at which it does.
        names: Which of them are tried.

    Returns:
        By name; a name is missing if every size is legal, or no other size was found to be.
    """
    found = {}
    for name in names:

        def runs_at(size: int, name: str = name) -> bool:
            return runs({**known, name: size})

        multiple = _find_multiple(runs_at, known[name])
        if multiple is None:
            continue
        smallest = _find_smallest(runs_at, known[name], multiple)
        if (smallest, multiple) != (1, 1):
            found[name] = LegalSize(smallest, multiple)
    return found


def _find_multiple(runs: Callable[[int], bool], size: int) -> int | None:
    """Return the smallest divisor of a legal size by which it may grow, twice."""
    divisors = (step for step in range(1, size + 1) if size % step == 0)
    return next((step for step in divisors if runs(size + step) and runs(size + 2 * step)), None)


def _find_smallest(runs: Callable[[int], bool], size: int, multiple: int) -> int:
    """Return the smallest legal multiple, by bisection: larger ones are legal, too."""
    low, high = 0, size // multiple  # in multiples: `low` is not legal, `high` is
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if runs(middle * multiple) else (middle, high)
    return high * multiple
