"""The schema of `manifest.json`: which entries it has, and of what kind. Standard library only.

A kind is one of:

- `int`, `float`, `str`, `bool`, `None`; an int is not negative, a float may be written as an int;
- a set: one of these strings;
- a list: a list of that kind;
- a dict: an object with these entries, a name with "?" being optional; `...` stands for any name;
- a tuple: one of these kinds;
- `object`: anything.
"""

from __future__ import annotations

from typing import Any

MAX_INT = 2**63 - 1
DTYPES = {
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("bool", "float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
}

_TENSOR = {"name": str, "dtype": DTYPES, "shape": [(int, str)], "limits": (None, [int])}
_SIZES = {...: int}
_GRAPH = {
    "inputs": [_TENSOR],
    "outputs": [_TENSOR],
    "files": {...: str},
    "rotary_nodes": int,
    "function_body": {"native", "primitive"},
    "max_size?": _SIZES,
    "min_size?": _SIZES,
}
_CASE = {
    "sizes?": _SIZES,
    "seed?": int,
    "offset?": int,
    "stagger?": bool,
    "jump?": bool,
    "padding?": {"left", "right", ""},
    "optional?": bool,
    "grid?": bool,
}
_INPUT = {
    "input": str,
    "role": str,
    "limits": [(int, float)],
    "value": object,
    "spread": [float],
}
# Of a graph with a key/value cache: what a loop over it must know.
_DECODER = {
    "cache": {"full", "window", "static"},
    "num_layers": int,
    "logits": {"all", "last"},
    "max_cache_len": (None, int),
    "length_thresholds": [int],
    "max_positions": (None, int),
}
# Of the config of a plain bundle and of a model's, what is there.
_CONFIG = {
    "embedding?": {...: (float, bool, None)},
    "rope?": {...: object},
    "max_seq_len?": int,
    "num_heads?": (None, int),
    "num_kv_heads?": (None, int),
    "head_dim?": int,
    "interleaved?": bool,
    "static?": bool,
    "batch_size?": (None, int),
    "dtype?": DTYPES,
    "cases?": [{"name": str, "noise?": {...: float}, "spec?": _CASE}],
    "input_values?": [_INPUT],
    "traced_sizes?": _SIZES,
    "length_thresholds?": [int],
    "max_positions?": (None, int),
    "last_position?": (None, int),
    "last_logits?": bool,
    "decoder?": _DECODER,
    "left_out?": {...: str},
    "unverified?": [str],
    "mismatched?": [str],
    "fused?": {"calls": {...: str}, "not_replaced": [str], "narrowest?": {...: str}},
}
_CONFIG["graphs?"] = {...: _CONFIG.copy()}  # of the graphs beside the main one
MANIFEST = {
    "op": {"domain": str, "name": str, "version": int},
    "name": str,
    "config": _CONFIG,
    "dtype": DTYPES,
    "opset": int,
    "graphs": {...: _GRAPH},
    "minimum_onnxruntime": {"fused": str, "portable": str},
    "producers": {...: str},
    "files": {...: str},
    "parity": {"passed?": bool, "error?": str},
    "compiled_for?": {...: str},
}
_NAMES = {int: "an integer >= 0", float: "a number", str: "a string", bool: "true or false"}


def check(value: Any, kind: Any, where: str = "") -> None:
    """Compare a value with a kind.

    Args:
        value: As `json` reads it.
        kind: As above.
        where: Of the value, in words.

    Raises:
        ValueError: Something is missing or of another kind; the message names the place.
    """
    if isinstance(kind, tuple):
        if not any(_is_of(value, each) for each in kind):
            raise _mismatch(value, " or ".join(map(_describe, kind)), where)
    elif isinstance(kind, dict):
        if not isinstance(value, dict):
            raise _mismatch(value, "an object", where)
        for name, part in value.items():
            expected = kind.get(name, kind.get(f"{name}?", kind.get(..., object)))
            check(part, expected, f"{where}.{name}")
        for name in kind:
            if isinstance(name, str) and not name.endswith("?") and name not in value:
                raise ValueError(f"{where[1:] or 'it'} has no {name!r}")
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise _mismatch(value, "a list", where)
        for index, part in enumerate(value):
            check(part, kind[0], f"{where}[{index}]")
    elif not _is_of(value, kind):
        raise _mismatch(value, _describe(kind), where)


def _is_of(value: Any, kind: Any) -> bool:
    if kind is object:
        return True
    if isinstance(kind, (tuple, dict, list)):
        try:
            check(value, kind)
        except ValueError:
            return False
        return True
    if isinstance(kind, set):
        return isinstance(value, str) and value in kind
    if kind is None:
        return value is None
    if kind is int:
        return type(value) is int and 0 <= value <= MAX_INT
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) <= MAX_INT)
    return type(value) is kind


def _describe(kind: Any) -> str:
    if kind is None:
        return "null"
    if isinstance(kind, set):
        return f"one of {', '.join(sorted(kind))}"
    if isinstance(kind, (list, dict)):
        return "a list" if isinstance(kind, list) else "an object"
    return _NAMES[kind]


def _mismatch(value: Any, wanted: str, where: str) -> ValueError:
    got = repr(value)
    got = got if len(got) <= 80 else f"{got[:77]}..."
    return ValueError(f"{where[1:]} must be {wanted}, got {got}")
