"""torch.export's programs: a copy with a graph of its own, the schema of an operator."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from torch.fx import Node

from rotary_export.compat.quiet import quiet_torch


def copy_program(program: Any, tensors: dict[str, Tensor] | None = None) -> Any:
    """Return a program whose graph can be changed; weights are shared.

    Args:
        program: A `torch.export.ExportedProgram`; it is not changed.
        tensors: By name of a weight, buffer or constant, the tensor in its place.
    """
    tensors = tensors or {}

    def exchange(stored: Any) -> dict[str, Any]:
        return {name: tensors.get(name, value) for name, value in stored.items()}

    with quiet_torch():
        return program._update(
            copy.deepcopy(program.graph_module),
            program.graph_signature,
            state_dict=exchange(program.state_dict),
            constants=exchange(program.constants),
        )


def get_fake_mode(program: Any) -> Any:
    """Return the mode under which operators run on a program's fake tensors; None: no tensor."""
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return None


def bind_arguments(node: Node) -> tuple[dict[str, Any], set[str]]:
    """Return the arguments of a node by name, defaults included; and which are keyword-only.

    Args:
        node: A call of an operator of torch.
    """
    schema = node.target._schema  # type: ignore[union-attr]
    values: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            values[argument.name] = argument.default_value
    return values, {argument.name for argument in schema.arguments if argument.kwarg_only}


def get_name(target: Any) -> str:
    """Return the name of an operator without its overload, "aten::mul"; "": it is none."""
    schema = getattr(target, "_schema", None)
    return "" if schema is None else str(schema.name)
