"""Conditions on sizes in words: "seq_len / 16 == 0.4375", "height is a multiple of 8"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

_RELATIONS = {
    "Eq": "==",
    "Equality": "==",
    "Ne": "!=",
    "Unequality": "!=",
    "LessThan": "<=",
    "StrictLessThan": "<",
    "GreaterThan": ">=",
    "StrictGreaterThan": ">",
}
# By name of torch's function; they have two arguments.
_OPERATORS = {
    "FloorDiv": "//",
    "IntTrueDiv": "/",
    "FloatTrueDiv": "/",
    "CleanDiv": "/",
    "Mod": "%",
    "PythonMod": "%",
    "PowByNatural": "**",
}
_FUNCTIONS = {"Max": "max", "Min": "min", "Abs": "abs", "CeilToInt": "ceil", "FloorToInt": "floor"}
_REMAINDERS = ("Mod", "PythonMod")


def describe_condition(expression: Any, names: Mapping[Any, str]) -> str:
    """Write a condition.

    Args:
        expression: Of sympy, in the symbols of `names`.
        names: By symbol, the name of the size.
    """
    kind = type(expression).__name__
    if isinstance(expression, (sympy.And, sympy.Or)):
        word = " and " if isinstance(expression, sympy.And) else " or "
        return word.join(describe_condition(each, names) for each in expression.args)
    if isinstance(expression, sympy.Not):
        return f"not ({describe_condition(expression.args[0], names)})"
    if kind in _RELATIONS:
        first, second = expression.args
        if type(first).__name__ in _REMAINDERS and second == 0 and _RELATIONS[kind] in ("==", "!="):
            size, step = (_write(each, names) for each in first.args)
            word = "is" if _RELATIONS[kind] == "==" else "is not"
            return f"{size} {word} a multiple of {step}"
        return f"{_write(first, names)} {_RELATIONS[kind]} {_write(second, names)}"
    return _write(expression, names)


def _write(expression: Any, names: Mapping[Any, str]) -> str:
    """Write a number that is computed from sizes."""
    kind = type(expression).__name__
    if expression in names:
        return names[expression]
    if isinstance(expression, sympy.Float):
        return f"{float(expression):g}"
    if isinstance(expression, sympy.Add):
        return _write_sum(expression, names)
    if isinstance(expression, sympy.Mul):
        return _write_product(expression, names)
    if isinstance(expression, sympy.Pow):
        return " ** ".join(_write_factor(each, names) for each in expression.args)
    if kind in _OPERATORS and len(expression.args) == 2:
        return f" {_OPERATORS[kind]} ".join(_write_factor(each, names) for each in expression.args)
    if kind in _FUNCTIONS:
        arguments = sorted((_write(each, names) for each in expression.args), key=len)
        return f"{_FUNCTIONS[kind]}({', '.join(arguments)})"
    if expression.args and not expression.is_number:
        return f"{kind}({', '.join(_write(each, names) for each in expression.args)})"
    return str(expression)


def _write_factor(expression: Any, names: Mapping[Any, str]) -> str:
    text = _write(expression, names)
    return f"({text})" if " " in text and expression not in names and ")" != text[-1:] else text


def _write_sum(expression: Any, names: Mapping[Any, str]) -> str:
    """Write the sizes first, then numbers: "a - 2 * b + 1"."""
    terms = sorted(expression.args, key=lambda term: (term.is_number, _is_negative(term)))
    text = _write(terms[0], names)
    for term in terms[1:]:
        negative = _is_negative(term)
        text += f" {'-' if negative else '+'} {_write(-term if negative else term, names)}"
    return text


def _is_negative(term: Any) -> bool:
    return bool(term.as_coeff_Mul()[0].is_negative)


def _write_product(expression: Any, names: Mapping[Any, str]) -> str:
    number, rest = expression.as_coeff_Mul()
    factors = [_write_factor(each, names) for each in sympy.Mul.make_args(rest)]
    if number == -1:
        return "-" + " * ".join(factors)
    if number != 1:
        factors.insert(0, str(number) if number.is_Integer else f"({number})")
    return " * ".join(factors)
