"""The classes, Python modules and functions that a model is made of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from rotary_export.compat.script import ScriptFunction, get_source
from rotary_export.models.find.names import is_own, is_rotary_name

_OWN = __name__.partition(".")[0]
_MAX_DEPTH = 3  # objects in objects, counted from the module that holds the first
_PLAIN = (Tensor, nn.Module, ModuleType, type, FunctionType, MethodType, str, int, float, bytes)


def find_classes(model: nn.Module) -> set[type]:
    """Return the classes of a model's modules and of the objects that these hold, bases too.

    An object that is no module may rotate, too, such as the attention processors of diffusers.
    """
    objects = [*model.modules(), *_list_objects(model)]
    classes = {cls for each in objects for cls in type(each).__mro__}
    return {cls for cls in classes if is_own(cls.__module__)}


def list_module_values(model: nn.Module, classes: set[type]) -> Iterator[tuple[str, Any]]:
    """Yield what the Python modules contain in which a model's functions may be, with its name.

    1. All of the modules of its classes, of functions that it holds, and of rotary functions that
       these import.
    2. What the others of these packages define: it may be imported only where it is called.
    """
    near = {cls.__module__ for cls in classes}
    near |= {value.__module__ for _, value in list_held(model) if isinstance(value, FunctionType)}
    near |= {
        value.__module__
        for name in near & sys.modules.keys()
        for value in tuple(vars(sys.modules[name]).values())
        if isinstance(value, FunctionType) and is_rotary_name(value.__name__)
    }
    packages = {name.partition(".")[0] for name in near} - {_OWN, "__main__"}
    far = {name for name in tuple(sys.modules) if name.partition(".")[0] in packages} - near
    for name in sorted(near | far):
        module = sys.modules.get(name)
        if is_own(name) and isinstance(module, ModuleType):
            for key, value in tuple(vars(module).items()):
                source = get_source(value) if isinstance(value, ScriptFunction) else value
                # A module may import what it is asked for, and fail.
                is_module = isinstance(source, ModuleType)
                if name in near or (not is_module and getattr(source, "__module__", None) == name):
                    yield key, value


def list_held(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of modules, and of the objects that they hold, with their names."""
    for owner in (*model.modules(), *_list_objects(model)):
        yield from tuple(vars(owner).items())


def _list_objects(model: nn.Module) -> list[Any]:
    """List the objects with attributes that a model's modules hold and that are no modules."""
    found: dict[int, Any] = {}
    level: list[Any] = list(model.modules())
    for _ in range(_MAX_DEPTH):
        inner = [
            value
            for owner in level
            for held in tuple(vars(owner).values())
            for value in _open(held)
            if hasattr(value, "__dict__")
            and not isinstance(value, _PLAIN)
            and is_own(type(value).__module__)
        ]
        level = list({id(value): value for value in inner if id(value) not in found}.values())
        found |= {id(value): value for value in level}
    return list(found.values())


def _open(value: Any) -> Iterator[Any]:
    """Yield a value, or the values of a container."""
    if isinstance(value, dict):
        yield from tuple(value.values())
    elif isinstance(value, (list, tuple, set)):
        yield from tuple(value)
    else:
        yield value
