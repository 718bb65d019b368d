"""Conditions on sizes that hold for a traced graph only: torch.export's guards, read out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._sympy.functions import Max, Min
from torch.utils._sympy.printers import PythonPrinter

from rotary_export.bundle.manifest import TensorInfo


@dataclass(frozen=True)
class Condition:
    """A condition on sizes under which the model takes the branch that was traced.

    Attributes:
        names: Of the sizes in it.
        holds: Returns whether it holds, for such sizes in that order.
        text: The condition and its location, human-readable.
        is_guard: False: the graph contains both branches; only TorchScript keeps one of them.
    """

    names: tuple[str, ...]
    holds: Callable[..., bool]
    text: str
    is_guard: bool = True


def read_conditions(
    program: Any, inputs: Sequence[Tensor], infos: Sequence[TensorInfo]
) -> list[Condition]:
    """Read the conditions on the inputs' sizes that a trace relies on.

    Args:
        program: The `torch.export.ExportedProgram`.
        inputs: The fake tensors of its inputs.
        infos: The inputs, with names for their dynamic sizes.

    Returns:
        Conditions, each once: guards, and which argument of a min or max was the result.
    """
    environment = _find_environment(inputs)
    if environment is None:
        return []
    names: dict[str, sympy.Symbol] = {}
    symbols: dict[sympy.Symbol, sympy.Expr] = {}
    for info, value in zip(infos, inputs, strict=True):
        for dim, size in zip(info.shape, value.shape, strict=True):
            if not isinstance(dim, str) or not isinstance(size, torch.SymInt):
                continue
            parts = [
                names.setdefault(
                    part, sympy.Symbol(f"size{len(names)}", integer=True, positive=True)
                )
                for part in dim.split(" + ")
            ]
            symbols.setdefault(environment.replace(size.node.expr), sum(parts))
    found: dict[Any, Condition] = {}

    def note(expression: Any, location: str, is_guard: bool) -> None:
        expression = environment.replace(expression).xreplace(symbols)
        known = [name for name, symbol in names.items() if symbol in expression.free_symbols]
        if not known or len(known) != len(expression.free_symbols):
            return  # always true, or of sizes that depend on values
        text = str(expression)
        for name in known:
            text = re.sub(rf"\b{names[name]}\b", name, text)
        holds = _compile(expression, [names[name] for name in known])
        found.setdefault(expression, Condition(tuple(known), holds, text + location, is_guard))

    for guard in environment.guards:
        note(guard.expr, format_location(guard), True)
    traced = dict(environment.backed_var_to_val)
    for bound in _list_bounds(program):
        values = [argument.xreplace(traced) for argument in bound.args]
        choose = max if isinstance(bound, Max) else min
        if all(value.is_number for value in values):
            taken = bound.args[values.index(choose(values))]
            note(sympy.Eq(bound, taken), "", False)
    return list(found.values())


def _list_bounds(program: Any) -> set[Any]:
    """Return the minima and maxima of sizes in a graph."""
    found: set[Any] = set()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else [value]
        for size in sizes:
            if isinstance(size, torch.SymInt):
                found |= size.node.expr.atoms(Max, Min)
    return found


def _compile(expression: Any, symbols: Sequence[sympy.Symbol]) -> Callable[..., bool]:
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


def format_location(guard: Any) -> str:
    """Return the line of the model that a guard is from, as the end of a sentence."""
    location = str(guard.sloc.maybe_user_loc or guard.sloc.framework_loc or "")
    location = location.removeprefix("<FrameSummary file ").removesuffix(">")
    return f", at {location.rpartition('site-packages/')[2]}" if location else ""


def list_guards(inputs: Sequence[Tensor]) -> list[Any]:
    """Return the guards of the fake tensors that are a program's inputs."""
    environment = _find_environment(inputs)
    return [] if environment is None else list(environment.guards)


def _find_environment(inputs: Sequence[Tensor]) -> Any:
    for value in inputs:
        mode = getattr(value, "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return mode.shape_env
    return None
