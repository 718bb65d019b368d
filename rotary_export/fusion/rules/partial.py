"""Around our node: the leading channels are cut off, rotated, and joined with the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnxscript import ir

from rotary_export.fusion.rules.base import Op, Result, Rule, read_rotary_attributes
from rotary_export.fusion.rules.build import write_rotary
from rotary_export.fusion.symbolic.channels import Tracer
from rotary_export.fusion.symbolic.polynomials import UnknownShapeError
from rotary_export.fusion.values import (
    is_produced_by,
    joins_channels,
    read_dims,
    read_int_attribute,
)
from rotary_export.op import spec


class PartialRule(Rule):
    """Sets rotary_embedding_dim, and rotates the value that was cut."""

    whole: ir.Value

    def pattern(self, op: Op, rest: Any) -> Any:
        y = op.RotaryEmbedding(
            _allow_other_inputs=True, _domain=spec.DOMAIN, _version=None, _outputs=["y"]
        )
        return op.Concat(y, rest, _outputs=["out"])

    def check(self, context: Any, out: ir.Value, y: ir.Value, rest: ir.Value) -> Result:
        concat, node = out.producer(), y.producer()
        assert concat is not None
        assert node is not None
        part = node.inputs[0]
        if part is None or not joins_channels(concat) or read_int_attribute(node, "num_heads"):
            return self.pass_by(out, "it does not join rotated channels and others")
        for whole in _list_cut_values(part):
            if _is_cut(whole, part, rest, out):
                self.whole = whole
                was = self.findings.fused.pop(y.name or "", "rotary node")
                return self.accept(out, f"{was}, partial")
        return self.pass_by(out, "the channels are not those of one value, in order")

    def rewrite(self, op: Op, y: ir.Value, **_: Any) -> ir.Value:
        node = y.producer()
        assert node is not None
        dims = read_dims(node.inputs[0])
        assert dims is not None
        assert isinstance(dims[-1], int)
        attributes = read_rotary_attributes(node)
        attributes["rotary_embedding_dim"] = attributes["rotary_embedding_dim"] or dims[-1]
        return write_rotary(op, [self.whole, *node.inputs[1:]], attributes)


def _is_cut(whole: ir.Value, part: ir.Value, rest: ir.Value, out: ir.Value) -> bool:
    """Return whether part and rest, joined, are the channels of whole."""
    if read_dims(whole) != read_dims(out):
        return False
    tracer = Tracer(source=whole)
    try:
        joined = [*tracer.trace(part, 1), *tracer.trace(rest, 1)]
        return joined == list(tracer.trace(whole, 1))
    except UnknownShapeError:
        return False


def _list_cut_values(value: ir.Value) -> Iterator[ir.Value]:
    """Yield what a value is cut from, nearest first."""
    node = value.producer()
    if node is not None and is_produced_by(value, "Slice", "Split", "Gather"):
        data = node.inputs[0]
        if data is not None:
            yield data
            yield from _list_cut_values(data)
