"""Calls of a model's functions, redirected wherever the functions are held.

A module or a class is not the only place that holds a function: a model imports it elsewhere, keeps
it in an attribute of an object, or defines it anew inside a method. So no attribute is replaced.
What is replaced is the *code*:

1. Of a function: its `__code__`, by code with the same parameters that calls a wrapper.
2. Of a function that is defined inside another one: Python creates it, at each call, from a
   constant of the outer function's code. The outer function gets code with another constant.
3. Of a function compiled by torch.jit.script, which has no Python code: the `__call__` of its type.

Profilers and `sys.monitoring` see such calls too, but can't replace what they return.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import Tensor

from rotary_export.compat import pytree, script

_WRAPPER = "_rotary_export_wrapper"


@dataclass(frozen=True, eq=False)
class OwnFunction:
    """A function of the model, as one call has it.

    Attributes:
        run: Runs it with the calls inside it redirected.
        original: Runs it as the model has it.
        cells: By name, the variables of outer functions that it reads.
    """

    run: Callable[..., Any]
    original: Callable[..., Any]
    cells: Mapping[str, CellType]

    def read_captured(self) -> dict[str, Any]:
        """Return the outer variables that contain tensors: they are arguments, too."""
        return {
            name: cell.cell_contents
            for name, cell in self.cells.items()
            if _is_filled(cell)
            and any(isinstance(leaf, Tensor) for leaf in pytree.list_leaves(cell.cell_contents))
        }

    def identify(self) -> tuple[Any, ...]:
        """Return what tells calls with other outer variables apart; tensors not included."""
        captured = self.read_captured()
        return tuple(
            _identify(cell)
            for name, cell in self.cells.items()
            if name not in captured and _is_filled(cell)
        )

    def call(self, args: Any, kwargs: Mapping[str, Any], captured: Mapping[str, Any]) -> Any:
        """Run the model's own code with other arguments and outer variables."""
        if not captured:
            return self.original(*args, **kwargs)
        cells = {**self.cells, **{name: CellType(value) for name, value in captured.items()}}
        function: Any = self.original
        closure = tuple(cells[name] for name in function.__code__.co_freevars)
        code, names = function.__code__, function.__globals__
        return FunctionType(code, names, function.__name__, None, closure)(*args, **kwargs)


Wrapper = Callable[[OwnFunction, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Place:
    """Where a function is defined.

    Attributes:
        function: The function itself, or the one that it is defined in.
        code: The function's own code; None: it was compiled by torch.jit.script.
    """

    function: Any
    code: CodeType | None


@contextmanager
def redirect_calls(wrappers: Sequence[tuple[Place, Wrapper]]) -> Iterator[None]:
    """Call wrappers in the place of functions; the functions come back, after an error too.

    A function that is redirected already is not redirected again.

    Args:
        wrappers: Functions, and what is called instead with the function and its arguments.
    """
    codes: dict[FunctionType, dict[int, Wrapper]] = {}
    scripts: dict[int, script.Target] = {}
    for place, wrapper in wrappers:
        if place.code is None:
            scripts[id(place.function)] = _wrap_script(place.function, wrapper)
        else:
            codes.setdefault(place.function, {})[id(place.code)] = wrapper
    with ExitStack() as stack:
        for function, by_code in codes.items():
            original = function.__code__
            stack.callback(setattr, function, "__code__", original)
            function.__code__ = _replace_code(original, by_code, function.__globals__)
            # A function that was defined meanwhile may live on, with the wrapper in its code.
            stack.callback(by_code.clear)
        if scripts:
            stack.enter_context(script.redirect_scripts(scripts))
        yield


def can_redirect(code: CodeType) -> bool:
    """Return whether calls of a function with this code can be redirected."""
    generates = code.co_flags & (
        inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    )
    return not generates and all(name.isidentifier() for name in _list_parameters(code))


def _wrap_script(function: Any, wrapper: Wrapper) -> script.Target:
    source = script.get_source(function)

    def target(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return wrapper(OwnFunction(run, source or run, {}), args, kwargs)

    return target


def _replace_code(
    code: CodeType, wrappers: Mapping[int, Wrapper], names: dict[str, Any]
) -> CodeType:
    """Return code whose functions, and itself, are redirected."""
    constants = tuple(
        _replace_code(each, wrappers, names) if isinstance(each, CodeType) else each
        for each in code.co_consts
    )
    # Equal constants stay the same code: a recorded call is known by it.
    unchanged = all(a is b for a, b in zip(constants, code.co_consts, strict=True))
    inside = code if unchanged else code.replace(co_consts=constants)
    if id(code) not in wrappers:
        return inside

    def call_wrapper(read: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cells = dict(zip(read.__code__.co_freevars, read.__closure__ or (), strict=True))
        closure = tuple(cells[name] for name in code.co_freevars)
        run, original = (
            FunctionType(each, names, code.co_name, None, closure) for each in (inside, code)
        )
        wrapper = wrappers.get(id(code))
        if wrapper is None:
            return original(*args, **kwargs)
        return wrapper(OwnFunction(run, original, cells), args, kwargs)

    return _make_calling_code(code, call_wrapper)


def _make_calling_code(code: CodeType, target: Callable[..., Any]) -> CodeType:
    """Return code with the parameters and outer variables of some code, that calls a target.

    The target receives a function that reads the outer variables, positional and keyword arguments.
    """
    positional = list(code.co_varnames[: code.co_argcount])
    keywords = list(code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount])
    rest = list(code.co_varnames[code.co_argcount + code.co_kwonlyargcount :])
    parameters = list(positional)
    if code.co_posonlyargcount:
        parameters.insert(code.co_posonlyargcount, "/")
    given = "".join(f"{name}, " for name in positional)
    named = "".join(f"{name!r}: {name}, " for name in keywords)
    if code.co_flags & inspect.CO_VARARGS:
        parameters.append(f"*{rest[0]}")
        given += f"*{rest.pop(0)}, "
    elif keywords:
        parameters.append("*")
    parameters += keywords
    if code.co_flags & inspect.CO_VARKEYWORDS:
        parameters.append(f"**{rest[0]}")
        named += f"**{rest[0]}"
    outer = ", ".join(code.co_freevars)
    source = (
        f"def make({outer}):\n"
        f"    def call({', '.join(parameters)}):\n"
        f"        {_WRAPPER} = {_WRAPPER!r}\n"
        f"        return {_WRAPPER}(lambda: ({outer}), ({given}), {{{named}}})\n"
    )
    made = _find_code(_find_code(compile(source, code.co_filename, "exec", dont_inherit=True)))
    return made.replace(
        co_consts=tuple(target if each == _WRAPPER else each for each in made.co_consts),
        co_name=code.co_name,
        co_qualname=code.co_qualname,
        co_firstlineno=code.co_firstlineno,
    )


def _find_code(code: CodeType) -> CodeType:
    return next(each for each in code.co_consts if isinstance(each, CodeType))


def _list_parameters(code: CodeType) -> tuple[str, ...]:
    flags = code.co_flags
    extra = bool(flags & inspect.CO_VARARGS) + bool(flags & inspect.CO_VARKEYWORDS)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + extra]


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises for a variable that has no value yet)
    except ValueError:
        return False
    return True


def _identify(cell: CellType, depth: int = 3) -> Any:
    """Identify what a variable contains; a function that is defined anew, by its code."""
    value = cell.cell_contents
    if isinstance(value, FunctionType) and depth:
        inner = (each for each in value.__closure__ or () if _is_filled(each))
        return id(value.__code__), tuple(_identify(each, depth - 1) for each in inner)
    return value if isinstance(value, (int, float, str)) else id(value)
