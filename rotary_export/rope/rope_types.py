"""The rope types by name: every file of `types/` defines one, and is found here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from rotary_export.rope import types
from rotary_export.rope.parameters import RopeParameters


def _find_types() -> dict[str, type[RopeParameters]]:
    """Import the files of `types/` and return the classes that they define."""
    found = {}
    for info in iter_modules(types.__path__):
        module = import_module(f"{types.__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                if issubclass(value, RopeParameters):
                    found[value.rope_type] = value
    return found


ROPE_TYPES = _find_types()
ALIASES = {alias: name for name, cls in ROPE_TYPES.items() for alias in cls.aliases}


def from_dict(values: Mapping[str, Any]) -> RopeParameters:
    """Read the rope parameters of a manifest, in which tuples are lists.

    Raises:
        TypeError: Something is missing or unknown.
    """
    own: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in dict(values).items()
    }
    name = own.pop("rope_type", None)
    if name not in ROPE_TYPES:
        raise TypeError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {name!r}")
    return ROPE_TYPES[name](**own)
