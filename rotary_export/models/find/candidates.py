"""The functions of a model that may apply a rotary embedding.

Names only select what is looked at: functions and classes with "rotary", "rotate" or "rope" in
their name, in the Python modules of the model's classes. What a function computes is found by
calling it, in `probe`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from rotary_export.errors import RotaryExportError

_NAME = re.compile(r"rotar|rotat|rope(?!r)", re.IGNORECASE)  # but not "property"
_FOREIGN = ("torch", "builtins", "typing", "abc", "collections")

Function = Callable[..., Any]
Binding = tuple[Any, str]  # a module or class, and the name of its attribute
_registered: list[Function] = []


def register_rotary(function: Function) -> Function:
    """Register a function or method by which models apply a rotary embedding.

    Only needed for a name that does not contain "rotary", "rotate" or "rope"; usable as a
    decorator. The function is called with small tensors to find out what it computes. It is
    replaced only where the op computes the same.

    Args:
        function: A plain function or a method of a class. Its arguments contain the tensors that
            it rotates, and it returns them rotated.

    Returns:
        The function, unchanged.

    Raises:
        RotaryExportError: It is not a Python function.
    """
    if not isinstance(function, FunctionType):
        raise RotaryExportError(
            f"register_rotary requires a function or a method of a class, got {function!r}"
        )
    if function not in _registered:
        _registered.append(function)
    return function


@dataclass(frozen=True, eq=False)
class Candidate:
    """A function that may apply a rotary embedding.

    Attributes:
        name: Module and qualified name, human-readable.
        function: What is called; the first argument of a method is self.
        bindings: The attributes that hold it.
    """

    name: str
    function: Function
    bindings: tuple[Binding, ...]


def find_candidates(model: nn.Module) -> list[Candidate]:
    """List the functions by which a model's modules may apply a rotary embedding.

    Args:
        model: Any module.

    Returns:
        Functions, methods and static methods with such a name, and the registered ones.
    """
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    classes = {cls for cls in classes if _is_own(cls.__module__)}
    found: dict[Function, list[Binding]] = {}
    for module in _find_modules(classes):
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and is_rotary_name(name):
                found.setdefault(value, []).append((module, name))
    for cls in sorted(classes, key=lambda c: c.__qualname__):
        for name, value in vars(cls).items():
            function = value.__func__ if isinstance(value, staticmethod) else value
            named = is_rotary_name(cls.__name__ if name == "forward" else name)
            if isinstance(function, FunctionType) and named and not name.startswith("__"):
                found.setdefault(function, []).append((cls, name))
    for function in _registered:
        bindings = _find_bindings(function)
        found.setdefault(function, []).extend(b for b in bindings if b not in found[function])
    return [
        Candidate(f"{function.__module__}.{function.__qualname__}", function, tuple(bindings))
        for function, bindings in found.items()
    ]


def is_rotary_name(name: str) -> bool:
    """Return whether the name of a function or class suggests a rotary embedding."""
    return bool(_NAME.search(name))


def _is_own(module_name: str) -> bool:
    return module_name.partition(".")[0] not in _FOREIGN


def _find_modules(classes: set[type]) -> list[ModuleType]:
    """Return the Python modules of classes, and of their package's functions that they use."""
    names = {cls.__module__ for cls in classes if cls.__module__ in sys.modules}
    for name in tuple(names):
        package = name.partition(".")[0]
        for value in vars(sys.modules[name]).values():
            module = value.__module__ if isinstance(value, FunctionType) else None
            if module and (module.partition(".")[0] == package or is_rotary_name(value.__name__)):
                names.add(module)
    return [sys.modules[name] for name in sorted(names) if name in sys.modules and _is_own(name)]


def _find_bindings(function: Function) -> list[Binding]:
    """Find the attributes that hold a registered function: its class's, or those of modules."""
    path = function.__qualname__.split(".")
    owner: Any = sys.modules.get(function.__module__)
    for name in path[:-1]:
        owner = getattr(owner, name, None)
    if isinstance(owner, type):
        return [(owner, path[-1])]
    return [
        (module, name)
        for module in tuple(sys.modules.values())
        if isinstance(module, ModuleType)
        for name, value in tuple(vars(module).items())
        if value is function
    ]
