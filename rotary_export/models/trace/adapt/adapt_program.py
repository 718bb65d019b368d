"""A traced program in the forms that torch.onnx translates rightly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from rotary_export.compat.programs import copy_program, get_fake_mode
from rotary_export.models.trace.adapt.attention import ATTENTION, adapt_attention
from rotary_export.models.trace.adapt.bools import adapt_bools, is_bool_call
from rotary_export.models.trace.adapt.complex_pairs import pair_complex
from rotary_export.models.trace.adapt.composites import replace_composites
from rotary_export.models.trace.adapt.graph_edit import ATEN, GraphEditor

_SUBTRACT_FROM = ATEN.rsub.Scalar
_REPEATS = (ATEN.repeat_interleave.Tensor, ATEN.repeat_interleave.self_Tensor)
_LARGEST = torch.finfo(torch.float32).max


def adapt_program(program: Any, opset: int) -> Any:
    """Change what torch.onnx can't write, or writes as ONNX Runtime can't run it.

    1. Complex numbers: see `complex_pairs.py`.
    2. Attention: see `attention.py`.
    3. Integer tensors that a number turns into floats: torch.onnx promotes the number, which is no
       tensor. The tensor is converted.
    4. Numbers out of float32's range, such as the smallest float64 in a mask: torch.onnx writes
       them as float32, so that they become infinite. The end of that range takes their place.
    5. Operators on bools: see `bools.py`.
    6. Composite operators: see `composites.py`.
    7. The size of the result that `repeat_interleave` may be told: torch.onnx has no such argument.

    Args:
        program: A `torch.export.ExportedProgram`; it is not changed.
        opset: Of ai.onnx.

    Returns:
        A changed copy.
    """
    own, program = program, pair_complex(program)
    if program is own:
        program = copy_program(program)
    fake_mode = get_fake_mode(program)
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        edit = GraphEditor(module.graph, fake_mode)
        for node in _list_calls(module.graph):
            if node.target == ATTENTION:
                adapt_attention(node, edit, opset)
            elif _is_promoted(node):
                _convert_first(node, edit)
            elif is_bool_call(node):
                adapt_bools(node, edit)
            else:
                node.args = tuple(map(_limit_number, node.args))
                node.kwargs = {k: v for k, v in node.kwargs.items() if not _is_hint(node, k)}
        replace_composites(module.graph, edit)
    return program


def _list_calls(graph: Graph) -> list[Node]:
    return [
        node
        for node in graph.nodes
        if node.target == ATTENTION
        or _is_promoted(node)
        or is_bool_call(node)
        or any(_is_hint(node, key) for key in node.kwargs)
        or any(_limit_number(value) is not value for value in node.args)
    ]


def _is_hint(node: Node, argument: str) -> bool:
    return node.target in _REPEATS and argument == "output_size"


def _limit_number(value: Any) -> Any:
    """Return the end of float32's range in place of a finite number out of it."""
    out = type(value) is float and _LARGEST < abs(value) < math.inf
    return math.copysign(_LARGEST, value) if out else value


def _is_promoted(node: Node) -> bool:
    """Return whether a call subtracts from a number, or computes with a number made of sizes.

    Its first argument is an integer tensor, the number a float.
    """
    first, *others = node.args or (None,)
    value = first.meta.get("val") if isinstance(first, Node) else None
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        return False
    made = [each.meta.get("val") for each in others if isinstance(each, Node)]
    return node.target == _SUBTRACT_FROM or any(isinstance(m, torch.SymFloat) for m in made)


def _convert_first(node: Node, edit: GraphEditor) -> None:
    """Convert the first tensor of a call to the type that the call computes in."""
    edit.origin = node
    first, *others = node.args
    dtype = node.meta["val"].dtype
    if not dtype.is_floating_point and node.target != _SUBTRACT_FROM:  # it compares
        dtype = torch.get_default_dtype()
    node.args = (edit.emit(ATEN.to.dtype, first, dtype), *others)
