"""The symbolic sizes of a program that torch.export traced: expressions, guards and ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.experimental import _config as experimental_config
from torch.fx.experimental import symbolic_shapes
from torch.utils._sympy.functions import Max, Min
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.value_ranges import ValueRanges


@dataclass(frozen=True)
class Guard:
    """A condition on sizes that a trace took for granted.

    Attributes:
        expression: In the symbols of the trace.
        location: The line of the model that it comes from, "" if unknown.
    """

    expression: Any
    location: str


@dataclass(frozen=True)
class Environment:
    """The shape environment of a trace."""

    _environment: Any

    @classmethod
    def find(cls, inputs: Sequence[Tensor]) -> Environment | None:
        """Return the environment of the fake tensors that are a program's inputs."""
        for value in inputs:
            mode = getattr(value, "fake_mode", None)
            if mode is not None and mode.shape_env is not None:
                return cls(mode.shape_env)
        return None

    def simplify(self, expression: Any) -> Any:
        """Return an expression in symbols that no other symbol replaces."""
        return self._environment.replace(expression)

    def list_guards(self) -> list[Guard]:
        """Return the conditions that the trace took for granted."""
        return [Guard(g.expr, _format_location(g.sloc)) for g in self._environment.guards]

    def get_traced_sizes(self) -> dict[Any, Any]:
        """Return the size that each symbol had in the trace."""
        return dict(self._environment.backed_var_to_val)


def _format_location(location: Any) -> str:
    place = str(location.maybe_user_loc or location.framework_loc or "")
    place = place.removeprefix("<FrameSummary file ").removesuffix(">")
    return place.rpartition("site-packages/")[2]


class _Files(frozenset[str]):
    """The files that torch skips when it looks for the line of a guard, and others."""

    skip: Callable[[str], bool]

    def __contains__(self, file: object) -> bool:
        return super().__contains__(file) or self.skip(str(file))


@contextmanager
def locate_guards(skip: Callable[[str], bool]) -> Iterator[None]:
    """Let guards name the innermost line whose file is not to be skipped."""
    listed = symbolic_shapes.uninteresting_files
    files = _Files(listed())
    files.skip = skip
    symbolic_shapes.uninteresting_files = lambda: files  # type: ignore[assignment]
    try:
        yield
    finally:
        symbolic_shapes.uninteresting_files = listed


def get_expression(size: torch.SymInt | torch.SymFloat) -> Any:
    """Return a size, or what is computed from sizes, as a sympy expression."""
    return size.node.expr


def find_expression(number: Any) -> Any:
    """Return a size or an integer as a sympy expression; None: it is neither."""
    if isinstance(number, torch.SymInt):
        return get_expression(number)
    return sympy.Integer(number) if type(number) is int else None


def get_constant(size: int | torch.SymInt) -> int | None:
    """Return a size that the trace specialised to a constant; None: it is open."""
    constant: int | None = size if isinstance(size, int) else size.node.maybe_as_int()
    return constant


def tells_apart(expression: Any, size: int, other: int) -> bool:
    """Whether a condition is an equation of one size that holds for one number, not the other."""
    if not isinstance(expression, sympy.Eq) or len(expression.free_symbols) != 1:
        return False
    (symbol,) = expression.free_symbols
    values = [expression.subs(symbol, number) for number in (size, other)]
    return values == [sympy.true, sympy.false]


def list_bounds(program: Any) -> dict[Any, Any]:
    """Return the minima and maxima of sizes in a program's graph, each with its first node.

    They are sympy expressions.
    """
    found: dict[Any, Any] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else [value]
        for size in sizes:
            if isinstance(size, (torch.SymInt, torch.SymFloat)):
                for bound in get_expression(size).atoms(Max, Min):
                    found.setdefault(bound, node)
    return found


def is_maximum(bound: Any) -> bool:
    """Whether an element of `list_bounds` is a maximum."""
    return isinstance(bound, Max)


def get_lower_bound(program: Any, size: torch.SymInt) -> int | None:
    """Return the smallest legal value of a size, as the program checks it; None: any."""
    bounds = program.range_constraints.get(get_expression(size))
    return None if bounds is None else int(bounds.lower)


def set_lower_bound(program: Any, size: torch.SymInt, lower: int) -> None:
    """Set the smallest legal value of a size."""
    expression = get_expression(size)
    upper = program.range_constraints[expression].upper
    program.range_constraints[expression] = ValueRanges(lower, upper)


def compile_condition(expression: Any, symbols: Sequence[sympy.Symbol]) -> Callable[..., bool]:
    """Make a function of a condition; sympy's own substitution is a thousand times slower."""
    code = PythonPrinter().doprint(expression)
    arguments = ", ".join(map(str, symbols))
    function = eval(f"lambda {arguments}: {code}", {"math": math, "torch": torch})

    def holds(*sizes: int) -> bool:
        try:
            return bool(function(*sizes))
        except ArithmeticError:  # as the model itself would raise there
            return False

    return holds


def allow_sizes_of_one() -> AbstractContextManager[Any]:
    """Let operators on fake tensors take a size for dynamic where it may be 0 or 1, too."""
    config: Any = experimental_config
    patched: AbstractContextManager[Any] = config.patch(backed_size_oblivious=True)
    return patched
