"""The functions of a model that may apply a rotary embedding.

Names only select what is looked at: functions and classes with "rotary", "rotate", "rope" or the
word "rot" in their name, in the Python modules of the model's classes and of the objects that the
model holds. What a function computes is found by calling it, in `probe`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from rotary_export.compat.script import ScriptFunction, get_name, get_source
from rotary_export.errors import RotaryExportError
from rotary_export.models.find.names import is_own, is_rotary_name
from rotary_export.models.find.reachable import find_classes, list_held, list_module_values
from rotary_export.models.find.redirect import Place, can_redirect

Function = Callable[..., Any]
_registered: list[Function] = []


def register_rotary(function: Function) -> Function:
    """Register a function or method by which models apply a rotary embedding.

    Only needed for a name that does not contain "rotary", "rotate", "rope" or the word "rot";
    usable as a decorator, also above or below torch.jit.script. The function is called with small
    tensors to find out what it computes. It is replaced only where the op computes the same.

    Args:
        function: A plain function, a method of a class, or a function compiled by
            torch.jit.script. Its arguments contain the tensors that it rotates, and it returns
            them rotated.

    Returns:
        The function, unchanged.

    Raises:
        RotaryExportError: It is not a Python function.
    """
    if _resolve(function) is None:
        raise RotaryExportError(
            f"register_rotary requires a function or a method of a class, got {function!r}"
        )
    if not any(_is_same(function, other) for other in _registered):
        _registered.append(function)
    return function


def _is_same(function: Any, other: Any) -> bool:
    """Return whether functions are one, or one that is defined anew in each call of another."""
    names = [(each.__module__, each.__qualname__) for each in (function, other)]
    return function is other or ("<locals>" in names[0][1] and names[0] == names[1])


@dataclass(frozen=True, eq=False)
class Candidate:
    """A function that may apply a rotary embedding.

    Attributes:
        name: Module and qualified name, human-readable.
        place: Where it is defined; the first argument of a method is self.
    """

    name: str
    place: Place


def find_candidates(model: nn.Module) -> list[Candidate]:
    """List the functions by which a model's modules may apply a rotary embedding.

    Args:
        model: Any module.

    Returns:
        Functions and methods with such a name, functions with such a name that are defined inside
        others, and the registered ones.
    """
    found: dict[tuple[int, int], Candidate] = {}

    def add(function: Any, code: CodeType | None) -> None:
        if code is None or can_redirect(code):
            found.setdefault((id(function), id(code)), _make_candidate(function, code))

    registered = [_resolve(value) for value in _registered]
    codes = {id(function.__code__) for function in registered if isinstance(function, FunctionType)}
    for name, value in _list_named_values(model):
        outermost = _resolve(value)
        if outermost is None or not is_own(_get_module(outermost)):
            continue
        named = is_rotary_name(name) or is_rotary_name(get_name(outermost))
        if named or get_source(outermost) in registered:
            add(outermost, getattr(outermost, "__code__", None))
        for function in _list_functions(outermost):
            for code in _list_nested(function.__code__):
                if is_rotary_name(code.co_name) or id(code) in codes:
                    add(function, code)
    for function in registered:
        add(function, getattr(function, "__code__", None))
    return list(found.values())


def _make_candidate(function: Any, code: CodeType | None) -> Candidate:
    name = get_name(function)
    if code is not None:  # a decorator's code has the decorator's name
        name = function.__qualname__ if code is function.__code__ else code.co_qualname
    return Candidate(f"{_get_module(function)}.{name}", Place(function, code))


def _list_named_values(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what may be a function, with its name: of modules, of classes, of what modules hold."""
    classes = find_classes(model)
    for name, value in list_module_values(model, classes):
        yield name, value
        if isinstance(value, type) and is_rotary_name(name) and is_own(value.__module__):
            classes.add(value)  # as a torch.autograd.Function
    for cls in sorted(classes, key=lambda c: c.__qualname__):
        for name, value in vars(cls).items():
            if name in ("forward", "__call__"):
                yield cls.__name__, value
            else:
                yield name, value
    yield from list_held(model)


def _resolve(value: Any) -> Any:
    """Return the function that is called in the end; None: none whose calls can be redirected."""
    while True:
        if isinstance(value, (FunctionType, ScriptFunction)):
            return value
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, functools.partial):
            value = value.func
        elif callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
            value = vars(value).get("__wrapped__")  # a cache, or another decorator
        else:
            return None


def _list_functions(function: Any) -> Iterator[FunctionType]:
    """Yield a function and those that its decorators wrap."""
    seen: set[int] = set()
    while isinstance(function, FunctionType) and id(function) not in seen:
        seen.add(id(function))
        yield function
        function = getattr(function, "__wrapped__", None)


def _list_nested(code: CodeType) -> Iterator[CodeType]:
    """Yield the codes of the functions that a function defines."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield each
            yield from _list_nested(each)


def _get_module(function: Any) -> str:
    return str((get_source(function) or function).__module__)
