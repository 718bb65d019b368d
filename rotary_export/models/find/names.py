"""Names of functions, classes and Python modules: what may apply a rotary embedding."""

from __future__ import annotations

import re

# Not "property", "rotten" or "protein"; but "apply_rot_embed", "RotEmb" and "applyRot".
_ROTARY = re.compile(
    r"(?i:rotar|rotat|rope(?!r))|(?<![a-zA-Z])[rR]ot(?![a-z])|(?<=[a-z0-9])Rot(?![a-z])"
)
_FOREIGN = ("torch", "builtins", "typing", "abc", "collections", "numpy", "enum", "functools")


def is_rotary_name(name: str) -> bool:
    """Return whether the name of a function or class suggests a rotary embedding."""
    return bool(_ROTARY.search(name))


def is_own(module_name: str) -> bool:
    """Return whether a Python module may belong to a model, by its name."""
    return module_name.partition(".")[0] not in _FOREIGN
