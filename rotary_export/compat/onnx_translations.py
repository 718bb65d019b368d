"""The registry of torch.onnx: which function translates an operator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import Node

_registries: dict[tuple[Any, ...], Any] = {}  # by the arguments they were made with


@contextmanager
def reuse_translations() -> Iterator[None]:
    """Let torch.onnx read its own translations once per process, not once per export.

    There are about 500. It inspects the source of each, which takes longer than the rest of a
    small export. Every export still has a registry of its own, to which it adds its custom ones.
    """
    try:
        from torch.onnx._internal.exporter import _registration

        registry_class: Any = _registration.ONNXRegistry
        read, of_class = registry_class.from_torchlib, vars(registry_class)["from_torchlib"]
    except (ImportError, AttributeError, KeyError):  # a newer torch: slower, not broken
        yield
        return

    def copy(*arguments: Any, **keywords: Any) -> Any:
        key = (*arguments, *sorted(keywords.items()))
        if key not in _registries:
            _registries[key] = read(*arguments, **keywords)
        registry = registry_class()
        vars(registry).update(vars(_registries[key]))
        registry.functions = {k: list(found) for k, found in _registries[key].functions.items()}
        return registry

    registry_class.from_torchlib = staticmethod(copy)
    try:
        yield
    finally:
        registry_class.from_torchlib = of_class


def find_failing_node(error: BaseException) -> Node | None:
    """Return the node of the traced graph that torch.onnx could not translate.

    Its errors contain the node as text only; the functions that raised them have it.
    """
    cause: BaseException | None = error
    while cause is not None:
        named = re.match(r"Error when translating node %(\w+)", str(cause))
        trace = cause.__traceback__
        while named and trace is not None:
            for value in trace.tb_frame.f_locals.values():
                if isinstance(value, Node) and value.name == named[1]:
                    return value
            trace = trace.tb_next
        cause = cause.__cause__
    return None
