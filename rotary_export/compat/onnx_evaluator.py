"""The operators of onnx.reference, on half types."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto
from onnx.defs import OpSchema, get_schema
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

_HALF_TYPES = ("float16", "bfloat16")
_NOT_TENSORS = ("seq(", "optional(")


class WideEvaluator(ReferenceEvaluator):
    """Computes each operator on half types in float32, and rounds its results once.

    So do the kernels of torch and of ONNX Runtime. numpy rounds between the steps of an operator:
    a sum of bfloat16 ones ends at 256, so that a softmax over 3,000 tokens is far off.
    """

    def _load_impl(self, node: NodeProto, input_types: Any = None) -> Any:
        found = super()._load_impl(node, input_types)
        has_graph = any(a.type == AttributeProto.GRAPH for a in node.attribute)
        # The nodes of a graph inside, and those of a function, are loaded here themselves.
        if node.domain or has_graph or not isinstance(found, type):
            return found
        return _widen(found, get_schema(node.op_type, self.opsets[""], ""))


@functools.cache
def _widen(operator: type[OpRun], schema: OpSchema) -> type[OpRun]:
    """Return an operator that computes in float32 what it is given in a half type."""
    if any(kind.startswith(_NOT_TENSORS) for output in schema.outputs for kind in output.types):
        return operator

    class Wide(operator):  # type: ignore[valid-type, misc]
        def run(self, *inputs: Any, **options: Any) -> tuple[Any, ...]:
            halves = {
                _find_kind(schema.inputs, index): value.dtype
                for index, value in enumerate(inputs)
                if isinstance(value, np.ndarray) and value.dtype.name in _HALF_TYPES
            }
            if not halves:
                return tuple(super().run(*inputs, **options))
            wide = [_round(value, np.float32, _HALF_TYPES) for value in inputs]
            return tuple(
                _round(value, halves.get(_find_kind(schema.outputs, index)), ("float32",))
                for index, value in enumerate(super().run(*wide, **options))
            )

    Wide.__name__ = operator.__name__
    return Wide


def _find_kind(formal: Sequence[OpSchema.FormalParameter], index: int) -> str:
    """Return the type variable of an input or output; the last one may stand for several."""
    return str(formal[min(index, len(formal) - 1)].type_str)


def _round(value: Any, dtype: Any, kinds: Sequence[str]) -> Any:
    """Return an array of some types in another type, if one is given."""
    if dtype is None or not isinstance(value, np.ndarray) or value.dtype.name not in kinds:
        return value
    return value.astype(dtype)
