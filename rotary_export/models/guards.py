"""The conditions on sizes that a trace took for granted, and what they allow.

Where a condition does not hold, the model itself takes another path than the graph. Past a size
from which on it never holds again, the graph is not legal. Elsewhere the paths mostly give the
same values (padding by nothing, another memory layout), which has to be proven there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._sympy.printers import PythonPrinter

from rotary_export.errors import RotaryExportError
from rotary_export.models.cases import LONGEST_CASE

_DENSE = 2048  # every size up to that is looked at
_SIZES: tuple[int, ...] = (
    *range(2, _DENSE + 1),
    *((1 << power) + step for power in range(12, 21) for step in (-1, 0, 1)),
)


@dataclass(frozen=True)
class Detour:
    """A condition that does not hold at some sizes within the limits.

    Attributes:
        name: Of the size.
        sizes: Where to prove it: the starts of the first two ranges at which it does not hold.
        text: The condition and its place, for people.
    """

    name: str
    sizes: tuple[int, ...]
    text: str


def list_sizes(detours: Sequence[Detour]) -> dict[str, list[int]]:
    """Return by name, in order and each once, the sizes at which detours are to be proven."""
    sizes: dict[str, set[int]] = {}
    for detour in detours:
        sizes.setdefault(detour.name, set()).update(detour.sizes)
    return {name: sorted(found) for name, found in sizes.items()}


def find_paths(
    guards: Sequence[Any], names: Mapping[str, str]
) -> tuple[dict[str, int], list[Detour]]:
    """Find the sizes at which a model takes the path that was traced.

    Args:
        guards: Of torch.export's shape environment.
        names: By symbol, the name of a size.

    Returns:
        By name of a size, the largest that it may have, nothing for those without a limit; and
        the conditions that fail at smaller sizes.

    Raises:
        RotaryExportError: A condition fails at most sizes; the message names the place.
    """
    limits: dict[str, int] = {}
    failing: dict[tuple[str, str], list[int]] = {}
    for guard in guards:
        symbols = {str(symbol) for symbol in guard.expr.free_symbols}
        if len(symbols) != 1 or not symbols <= names.keys():
            continue  # sizes that are equal, or sums of others
        (symbol,) = symbols
        name, holds = names[symbol], _compile(guard.expr, symbol)
        fails = [size for size in _SIZES if not holds(size)]
        if not fails:
            continue
        text = re.sub(rf"\b{symbol}\b", name, str(guard.expr)) + say_place(guard)
        limit = _find_limit(holds, fails)
        below = [size for size in fails if size <= min(limit, _DENSE)]
        if limit < 2 or 2 * len(below) > min(limit, _DENSE):
            raise RotaryExportError(
                f"the model takes another path where not {text}; give {name} a fixed size with "
                "dynamic_shapes, or change the model there"
            )
        if limit < _SIZES[-1]:
            limits[name] = min(limit, limits.get(name, limit))
        if below:
            failing[name, text] = below
    detours = []
    for (name, text), sizes in failing.items():
        starts = [size for size in sizes if size - 1 not in sizes][:2]
        tried = tuple(s for s in starts if s <= min(LONGEST_CASE, limits.get(name, s)))
        if tried:
            detours.append(Detour(name, tried, text))
    return limits, detours


def _compile(expression: Any, symbol: str) -> Callable[[int], bool]:
    """Make a function of a condition; sympy's own substitution takes a thousand times as long."""
    code = PythonPrinter().doprint(expression)
    return eval(f"lambda {symbol}: {code}", {"math": math})  # type: ignore[no-any-return]


def _find_limit(holds: Callable[[int], bool], fails: Sequence[int]) -> int:
    """Find the size before those at which a condition fails for good, or is too long to prove."""
    failing = set(fails)
    end = len(_SIZES)
    while end and _SIZES[end - 1] in failing:
        end -= 1
    if fails[0] > LONGEST_CASE:
        end = _SIZES.index(fails[0])
    if end in (0, len(_SIZES)):
        return 0 if end == 0 else _SIZES[-1]
    low, high = _SIZES[end - 1], _SIZES[end]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def say_place(guard: Any) -> str:
    """Say where in the model a condition stands."""
    place = str(guard.sloc.maybe_user_loc or guard.sloc.framework_loc or "")
    place = place.removeprefix("<FrameSummary file ").removesuffix(">")
    return f", at {place.rpartition('site-packages/')[2]}" if place else ""


def list_guards(inputs: Sequence[Tensor]) -> list[Any]:
    """Return the guards of the fake tensors that are a program's inputs."""
    for value in inputs:
        mode = getattr(value, "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return list(mode.shape_env.guards)
    return []
