"""Conditions on sizes that hold for a traced graph only: torch.export's guards, read out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor

from rotary_export.bundle.dims import list_names, read_bounded, read_terms
from rotary_export.bundle.manifest import TensorInfo
from rotary_export.compat.sizes import (
    Environment,
    Guard,
    compile_condition,
    get_expression,
    is_maximum,
    list_bounds,
)
from rotary_export.models.error_text import locate
from rotary_export.models.trace.condition_text import describe_condition
from rotary_export.models.trace.row_limits import list_row_limits

# What torch.export itself assumes has no line of the model; this is the caller's.
_TRACER = str(Path(__file__).with_name("program.py")).rpartition("site-packages/")[2]


@dataclass(frozen=True)
class Condition:
    """A condition on sizes under which the model takes the branch that was traced.

    Attributes:
        names: Of the sizes in it.
        holds: Returns whether it holds, for such sizes in that order.
        text: The condition and its location, human-readable.
        is_guard: False: the graph contains both branches; only TorchScript keeps one of them.
        raises: Where it does not hold, the model raises an error.
    """

    names: tuple[str, ...]
    holds: Callable[..., bool]
    text: str
    is_guard: bool = True
    raises: bool = False


def read_conditions(
    program: Any, inputs: Sequence[Tensor], infos: Sequence[TensorInfo]
) -> list[Condition]:
    """Read the conditions on the inputs' sizes that a trace relies on.

    Args:
        program: The `torch.export.ExportedProgram`.
        inputs: The fake tensors of its inputs.
        infos: The inputs, with names for their dynamic sizes.

    Returns:
        Conditions, each once: guards, the rows of tables, and which argument of a min or max was
        the result.
    """
    environment = Environment.find(inputs)
    if environment is None:
        return []
    names: dict[str, sympy.Symbol] = {}
    symbols: dict[sympy.Symbol, sympy.Expr] = {}
    for info, value in zip(infos, inputs, strict=True):
        for dim, size in zip(info.shape, value.shape, strict=True):
            if not isinstance(dim, str) or not isinstance(size, torch.SymInt):
                continue
            for name in list_names([dim]):
                names.setdefault(
                    name, sympy.Symbol(f"size{len(names)}", integer=True, positive=True)
                )
            if bounded := read_bounded(dim):
                total = sympy.Min(names[bounded[0]], bounded[1])
            else:
                total = sum(factor * names.get(name, 1) for factor, name in read_terms(dim))
            symbols.setdefault(environment.simplify(get_expression(size)), total)
    found: dict[Any, Condition] = {}

    def note(expression: Any, location: str, is_guard: bool, raises: bool = False) -> None:
        expression = environment.simplify(expression).xreplace(symbols)
        known = [name for name, symbol in names.items() if symbol in expression.free_symbols]
        if not known or len(known) != len(expression.free_symbols):
            return  # always true, or of sizes that depend on values
        text = describe_condition(expression, {symbol: name for name, symbol in names.items()})
        holds = compile_condition(expression, [names[name] for name in known])
        condition = Condition(tuple(known), holds, text + location, is_guard, raises)
        found.setdefault(expression, condition)

    for guard in environment.list_guards():
        note(guard.expression, format_location(guard), True)
    for expression, location in list_row_limits(program):
        note(expression, location, True, raises=True)
    traced = environment.get_traced_sizes()
    for bound, node in list_bounds(program).items():
        values = [argument.xreplace(traced) for argument in bound.args]
        choose = max if is_maximum(bound) else min
        if all(value.is_number for value in values):
            taken = bound.args[values.index(choose(values))]
            note(sympy.Eq(bound, taken), locate(node), False)
    return list(found.values())


def format_location(guard: Guard) -> str:
    """Return the line of the model that a guard is from, as the end of a sentence."""
    known = guard.location and not guard.location.startswith(_TRACER)
    return f", at {guard.location}" if known else ""
