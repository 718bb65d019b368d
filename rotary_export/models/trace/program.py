"""torch.export with dynamic sizes, and an error where tracing specialises one to a constant."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.bundle.dims import compute_dim, list_names
from rotary_export.bundle.manifest import TensorInfo
from rotary_export.compat.dispatch import is_in_place
from rotary_export.compat.quiet import quiet_torch
from rotary_export.compat.sizes import (
    Environment,
    get_constant,
    get_lower_bound,
    locate_guards,
    set_lower_bound,
    tells_apart,
)
from rotary_export.errors import RotaryExportError
from rotary_export.models.error_text import explain_trace_error, is_library
from rotary_export.models.trace.guards import format_location
from rotary_export.models.trace.traced_rotary import find_tables, list_ancestors


def trace_program(
    module: nn.Module,
    tensors: Sequence[Tensor],
    infos: Sequence[TensorInfo],
    min_size: Mapping[str, int] | None = None,
) -> Any:
    """Trace a module whose forward accepts `*tensors`.

    Args:
        module: The module.
        tensors: Inputs to trace with.
        infos: The inputs; a name in a shape is a size that must stay dynamic.
        min_size: By name of a size, the smallest that is legal, where it is more than 1.

    Returns:
        The `torch.export.ExportedProgram`.

    Raises:
        RotaryExportError: torch.export can't trace it, or specialises a dynamic size to a
            constant; the message names the source line.
    """
    shapes = tuple(
        {axis: torch.export.Dim.AUTO for axis, d in enumerate(info.shape) if isinstance(d, str)}
        for info in infos
    )
    try:
        # torch.export prints the whole graph where it fails; the error contains the reason.
        with (
            quiet_torch(),
            torch.no_grad(),
            redirect_stderr(io.StringIO()),
            locate_guards(lambda file: file != __file__ and is_library(file)),
        ):
            program = torch.export.export(
                module, tuple(tensors), dynamic_shapes=(shapes,), strict=False
            )
            if _is_opaque(program):
                program = program.run_decompositions({})
    except (Exception, SystemExit) as error:  # what the model and torch's tracer raise
        raise RotaryExportError(
            f"torch.export can't trace the model: {explain_trace_error(error)}"
            f"{_name_script(module)}"
        ) from error
    for info, value in zip(infos, get_inputs(program), strict=True):
        for axis, (dim, size) in enumerate(zip(info.shape, value.shape, strict=True)):
            constant = get_constant(size)
            if isinstance(dim, str) and constant is not None:
                raise RotaryExportError(
                    f"tracing specialises {dim} to the constant {constant} (dimension {axis} of "
                    f"{info.name}){_find_location(program, constant)}; give it a fixed size with "
                    f"dynamic_shapes, or change the model there{_name_script(module)}"
                )
    _allow_small_sizes(program, infos, min_size or {})
    return program


def _name_script(module: nn.Module) -> str:
    """Name the first part that is compiled or traced, as the end of a sentence, or return ""."""
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            name = name.removeprefix("model.")
            return f"; {name} is a ScriptModule: use the module that it was scripted or traced from"
    return ""


def _is_opaque(program: Any) -> bool:
    """Return whether a graph hides from which nodes the tables of a rotary node are computed.

    1. The rotary node is in a graph of its own, as under autocast. Tables may be computed in one.
    2. A node writes into a tensor that tables are computed from, as where channels are assigned to
       slices. `detach_`, which torch inserts for each constant, writes nothing.

    Such a program is decomposed, which takes as long as the trace.
    """
    op = torch.ops.rotary_export.rotary_embedding.default
    inner = [m for m in program.graph_module.modules() if m is not program.graph_module]
    graphs = [module.graph for module in inner if isinstance(module, torch.fx.GraphModule)]
    if any(node.target == op for graph in graphs for node in graph.nodes):
        return True
    nodes = list(program.graph.nodes)
    tables = [table for node in nodes if node.target == op for table in find_tables(node).values()]
    needed = set(list_ancestors(program.graph, tables))
    return any(
        is_in_place(node.target)
        and node.target != torch.ops.aten.detach_.default
        and not needed.isdisjoint(_list_bases(node.args[0]))
        for node in nodes
    )


def _list_bases(node: Any) -> list[Any]:
    """Return a node, and those that it is a view of."""
    bases = [node]
    while getattr(bases[-1].target, "is_view", False):
        bases.append(bases[-1].args[0])
    return bases


def _allow_small_sizes(
    program: Any, infos: Sequence[TensorInfo], min_size: Mapping[str, int]
) -> None:
    """Let sizes be as small as the model accepts; the proof tells whether that is right.

    torch.export assumes that each size, and each that is computed, is at least 2. It does not check
    that for traced sizes, but does check that past + new tokens is at least 4, so that an empty
    cache would be refused; and that a convolution has two results.
    """
    for info, value in zip(infos, get_inputs(program), strict=True):
        for dim, size in zip(info.shape, value.shape, strict=True):
            if not isinstance(dim, str) or not isinstance(size, torch.SymInt):
                continue
            names = list_names([dim])
            smallest = compute_dim(dim, {name: min_size.get(name, 1) for name in names})
            lower = get_lower_bound(program, size)
            if lower is not None and lower > max(smallest, 2):
                set_lower_bound(program, size, max(smallest, 2))


def _find_location(program: Any, size: int) -> str:
    """Find the line at which a symbolic size became a number: by itself, or in an expression."""
    environment = Environment.find(get_inputs(program))
    guards = environment.list_guards() if environment is not None else []
    named = [guard for guard in guards if re.search(rf"\b{size}\b", str(guard.expression))]
    fixing = [
        guard
        for other in (size + 1, 4 * size)
        for guard in guards
        if tells_apart(guard.expression, size, other)
    ]
    return format_location((named or fixing)[0]) if named or fixing else ""


def get_inputs(program: Any) -> list[Tensor]:
    """Return the fake tensors of a program's inputs, in order."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[name].meta["val"] for name in program.graph_signature.user_inputs]


def get_outputs(program: Any) -> list[Tensor]:
    """Return the fake tensors of a program's outputs, in order."""
    nodes = {node.name: node for node in program.graph.nodes}
    return [nodes[name].meta["val"] for name in program.graph_signature.user_outputs]


def name_symbols(program: Any, infos: Sequence[TensorInfo]) -> dict[str, str]:
    """Map torch.export's symbols to the names of the inputs' sizes."""
    names: dict[str, str] = {}
    for info, value in zip(infos, get_inputs(program), strict=True):
        for dim, size in zip(info.shape, value.shape, strict=True):
            # A sum is a symbol of its own where no input has its terms alone.
            if isinstance(dim, str) and (" + " not in dim or str(size).isidentifier()):
                names.setdefault(str(size), dim)
    return names


def name_shape(
    shape: Sequence[Any], names: Mapping[str, str], output: str
) -> tuple[int | str, ...]:
    """Write a traced shape in the names of the inputs' sizes.

    Args:
        shape: Sizes, symbolic or not.
        names: As `name_symbols`.
        output: The tensor's name: a size that is not a sum of inputs' sizes is "OUTPUT.AXIS".
    """

    def write(axis: int, size: Any) -> int | str:
        if isinstance(size, int):
            return size
        terms = [names.get(term, term) for term in str(size).split(" + ")]
        known = all(term in names.values() or term.isdigit() for term in terms)
        # Sums are written with the cached part first, whatever order sympy has.
        terms.sort(key=lambda term: (not term.startswith("past"), term))
        return " + ".join(terms) if known else f"{output}.{axis}"

    return tuple(write(axis, size) for axis, size in enumerate(shape))
