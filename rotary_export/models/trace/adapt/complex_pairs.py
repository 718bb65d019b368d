"""Complex numbers of a traced program as pairs of real ones: ONNX has no others.

A complex tensor (...) becomes a real one (..., 2), as `torch.view_as_real` returns it.
`pair_rules.py` has a rule for each operator.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from rotary_export.compat.programs import copy_program, get_fake_mode, get_name
from rotary_export.compat.quiet import quiet_torch
from rotary_export.errors import RotaryExportError
from rotary_export.models.error_text import locate
from rotary_export.models.trace.adapt.pair_editor import PairEditor, is_complex
from rotary_export.models.trace.adapt.pair_rules import RULES

# Composite operators, taken apart into those that have a rule; `where` of numbers is one of them.
_COMPOSITE = frozenset(
    "broadcast_to chunk conj contiguous einsum expand_as flatten imag matmul mH movedim mT narrow "
    "numpy_T outer real repeat_interleave reshape reshape_as square swapaxes swapdims "
    "take_along_dim tensor_split tile to type_as unflatten view_as where".split()
)

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def pair_complex(program: Any) -> Any:
    """Write the complex numbers of a program as pairs of real ones.

    Args:
        program: A `torch.export.ExportedProgram`; it is not changed.

    Returns:
        The program, if it has no complex numbers or no rule for one of its operators; else a copy.

    Raises:
        RotaryExportError: An input or output is complex.
    """
    if not any(_list_complex(module.graph) for module in _list_graphs(program)):
        return program
    _check_ends(program)
    found = _decompose(program)
    if any(_list_complex(module.graph) for module in _list_graphs(found)[1:]):
        return program  # in a branch or a loop
    if any(_find_rule(node) is None for node in _list_complex(found.graph)):
        return program
    stored = {**found.state_dict, **found.constants}
    pairs = {
        name: _read_pairs(value)
        for name, value in stored.items()
        if isinstance(value, Tensor) and value.is_complex()
    }
    found = copy_program(found, pairs)
    _rewrite(found)
    return found


def _list_graphs(program: Any) -> list[Any]:
    modules = program.graph_module.modules()
    return [module for module in modules if isinstance(module, torch.fx.GraphModule)]


def _list_complex(graph: torch.fx.Graph) -> list[Node]:
    """Return the calls that have a complex argument or result."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and (is_complex(node) or any(is_complex(source) for source in node.all_input_nodes))
    ]


def _find_rule(node: Node) -> Any:
    if node.target == operator.getitem:
        return PairEditor.take_item
    return RULES.get(_name(node.target))


def _name(target: Any) -> str:
    return get_name(target).removeprefix("aten::")


def _check_ends(program: Any) -> None:
    """Refuse complex inputs and outputs of a model."""
    signature = program.graph_signature
    nodes = {node.name: node for node in program.graph.nodes}
    for kind, names in (("input", signature.user_inputs), ("output", signature.user_outputs)):
        for name in names:
            if name in nodes and is_complex(nodes[name]):
                raise RotaryExportError(
                    f"an ONNX file has no complex numbers, {kind} {name} of the model is complex; "
                    "use torch.view_as_real there, or leave 'onnx' out of formats"
                )


def _decompose(program: Any) -> Any:
    """Take composite operators on complex tensors apart, and what writes in place."""
    touched = {n.target for module in _list_graphs(program) for n in _list_complex(module.graph)}
    table = {
        target: function
        for target, function in torch.export.default_decompositions().items()
        if _name(target) in _COMPOSITE or (target in touched and _name(target) not in RULES)
    }
    with quiet_torch():
        return program.run_decompositions(table)


def _read_pairs(value: Tensor) -> Tensor:
    pairs = torch.view_as_real(value.detach().resolve_conj())
    is_parameter = isinstance(value, nn.Parameter)
    return nn.Parameter(pairs, requires_grad=False) if is_parameter else pairs


def _rewrite(program: Any) -> None:
    edit = PairEditor(program.graph, get_fake_mode(program))
    old = []
    for node in list(program.graph.nodes):
        if node.op == "placeholder" and is_complex(node):
            edit.read_pair(node)
        elif node.op == "call_function" and edit.touches(node):
            rule = _find_rule(node)
            edit.origin = node
            try:
                value = rule(edit, node)
            except Exception as error:  # a form of the operator that its rule does not have
                raise RotaryExportError(
                    f"{get_name(node.target)} of complex numbers can't be written as ONNX in this "
                    f"form{locate(node)}; compute with cosines and sines there"
                ) from error
            if is_complex(node):
                edit.note_pair(node, value)
                old.append(node)
            elif value is None:
                old.append(node)
            else:
                edit.replace(node, value)
    for node in reversed(old):
        program.graph.erase_node(node)
    for node in program.graph.nodes:  # pairs have other strides, which a view may not fit
        if node.target in _VIEWS:
            node.target = torch.ops.aten.reshape.default
    program.graph_module.recompile()
