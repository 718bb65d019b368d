"""Functions compiled by torch.jit.script: their Python source, and who calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

ScriptFunction = torch.jit.ScriptFunction

# What is called with the compiled function, as it is without a redirection, and the arguments.
Target = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def get_source(function: Any) -> Callable[..., Any] | None:
    """Return the Python function that was compiled; None: it was loaded, or traced."""
    return getattr(function, "_torchdynamo_inline", None)


def get_name(function: Any) -> str:
    """Return the name of a function; the `__name__` of a compiled one is that of its type."""
    source = get_source(function) or function
    return str(source.name if isinstance(source, ScriptFunction) else source.__name__)


@contextmanager
def redirect_scripts(targets: Mapping[int, Target]) -> Iterator[None]:
    """Call other functions in the place of compiled ones, wherever these are held.

    Args:
        targets: What is called instead, by the id of the compiled function.
    """
    call: Any = ScriptFunction.__call__

    def redirect(self: Any, *args: Any, **kwargs: Any) -> Any:
        target = targets.get(id(self))
        run = functools.partial(call, self)
        return run(*args, **kwargs) if target is None else target(run, args, kwargs)

    types: Any = ScriptFunction
    types.__call__ = redirect
    try:
        yield
    finally:
        types.__call__ = call
