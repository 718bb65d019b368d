"""The functions by which a model may apply a rotary embedding, and the calls it makes of them.

Names only choose what is looked at (whatever has "rotary", "rotate" or "rope" in its name, among
the modules of the model's classes); what a function computes is found out by calling it, in
`probe`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rotary_export.errors import RotaryExportError

_NAME = re.compile(r"rotar|rotat|rope(?!r)", re.IGNORECASE)  # but not "property"
_FOREIGN = ("torch", "builtins", "typing", "abc", "collections")

Function = Callable[..., Any]
_registered: list[Function] = []


def register_rotary(function: Function) -> Function:
    """Name a function or method by which models apply a rotary embedding.

    Only needed where the name says nothing of it; usable as a decorator. It is called with small
    tensors to find out what it computes, and replaced only where ours gives the same.

    Args:
        function: A plain function or a method of a class, with the tensors that it rotates among
            its arguments and as its results.

    Returns:
        The function, unchanged.

    Raises:
        RotaryExportError: It is not a Python function.
    """
    if not isinstance(function, FunctionType):
        raise RotaryExportError(
            f"register_rotary takes a function or a method of a class, got {function!r}"
        )
    if function not in _registered:
        _registered.append(function)
    return function


@dataclass(frozen=True, eq=False)
class Target:
    """A function that may apply a rotary embedding.

    Attributes:
        name: Module and name, for people.
        function: What is called; a method takes self as its first argument.
        places: Where it stands: (module or class, attribute name).
    """

    name: str
    function: Function
    places: tuple[tuple[Any, str], ...]


@dataclass(eq=False)
class Call:
    """One call of a target, as the model made it.

    Attributes:
        target: What was called.
        leaves: The arguments, flattened: tensors, modules, numbers, None.
        tree: How they were nested.
        output: What came back, flattened.
        output_tree: How it was nested.
        children: Calls of other targets that it made.
    """

    target: Target
    leaves: list[Any]
    tree: pytree.TreeSpec
    output: list[Any] = field(default_factory=list)
    output_tree: Any = None
    children: list[Call] = field(default_factory=list)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What calls with the same rotation have in common."""
        return make_signature(self.leaves)


def make_signature(leaves: list[Any]) -> tuple[Any, ...]:
    """Describe flattened arguments but for the sizes that may vary."""

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            width = leaf.shape[-1] if leaf.dim() else 0
            if isinstance(width, torch.Tensor):  # as sizes are while torch.jit traces
                width = int(width)
            return "tensor", leaf.dim(), width if type(width) is int else None
        if leaf is None or isinstance(leaf, (bool, str)):
            return leaf
        if isinstance(leaf, torch.SymInt):  # as a size is while torch.export traces
            return "int"
        return type(leaf).__name__

    return tuple(describe(leaf) for leaf in leaves)


def find_targets(model: nn.Module) -> list[Target]:
    """List what the model's modules may apply a rotary embedding with.

    Args:
        model: Any module.

    Returns:
        The functions, methods and static methods that are named so, and the registered ones.
    """
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    classes = {cls for cls in classes if _is_own(cls.__module__)}
    modules = _find_modules(classes)
    found: dict[Function, list[tuple[Any, str]]] = {}
    for module in modules:
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
        places = _find_places(function)
        found.setdefault(function, []).extend(p for p in places if p not in found[function])
    return [
        Target(f"{function.__module__}.{function.__qualname__}", function, tuple(places))
        for function, places in found.items()
    ]


def is_rotary_name(name: str) -> bool:
    """Whether a function or class is named as if it had to do with rotary embeddings."""
    return bool(_NAME.search(name))


def _is_own(module_name: str) -> bool:
    return module_name.partition(".")[0] not in _FOREIGN


def _find_modules(classes: set[type]) -> list[ModuleType]:
    """Return the Python modules of classes, and of their package's functions that they use."""
    names = {cls.__module__ for cls in classes if cls.__module__ in sys.modules}
    for name in tuple(names):
        package = name.partition(".")[0]
        for value in vars(sys.modules[name]).values():
            home = value.__module__ if isinstance(value, FunctionType) else None
            if home and (home.partition(".")[0] == package or is_rotary_name(value.__name__)):
                names.add(home)
    return [sys.modules[name] for name in sorted(names) if name in sys.modules and _is_own(name)]


def _find_places(function: Function) -> list[tuple[Any, str]]:
    """Find where a registered function stands: its class, or every module that has it."""
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


@contextmanager
def patch_targets(
    targets: list[Target], make_wrapper: Callable[[Target], Function]
) -> Iterator[None]:
    """Put wrappers in the places of targets; what was there comes back whatever happens."""
    originals: list[tuple[Any, str, Any]] = []
    try:
        for target in targets:
            wrapper = make_wrapper(target)
            for owner, name in target.places:
                original = vars(owner)[name]
                originals.append((owner, name, original))
                static = isinstance(original, staticmethod)
                setattr(owner, name, staticmethod(wrapper) if static else wrapper)
        yield
    finally:
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)


def record_calls(run: Callable[[], Any], targets: list[Target]) -> list[Call]:
    """Run a model and record its calls of targets.

    Args:
        run: Runs it once.
        targets: What to watch.

    Returns:
        The calls that no other call made; those that they made are their children.
    """
    outermost: list[Call] = []
    running: list[Call] = []

    def make_wrapper(target: Target) -> Function:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = pytree.tree_flatten((args, kwargs))
            call = Call(target, leaves, tree)
            (running[-1].children if running else outermost).append(call)
            running.append(call)
            try:
                output = target.function(*args, **kwargs)
            finally:
                running.pop()
            call.output, call.output_tree = pytree.tree_flatten(output)
            return output

        return wrapper

    with patch_targets(targets, make_wrapper), torch.no_grad():
        run()
    return outermost
