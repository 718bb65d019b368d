"""The rewrite rules: each finds one way to write a rotary embedding and puts our op in its place.

Every rule removes nothing itself: values that something else reads stay, what nothing reads is
dropped at the end. A refusal is kept with its reason in `Findings`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from onnxscript import ir
from onnxscript.rewriter import pattern

from rotary_export.fusion.rules.build import (
    X_TYPES,
    Op,
    Plan,
    like,
    make_plan,
    write_node,
    write_rotary,
)
from rotary_export.fusion.symbolic.channels import Tracer
from rotary_export.fusion.symbolic.polynomials import UnknownShapeError, read_dims
from rotary_export.fusion.symbolic.rotation import NotARotationError, find_rotation
from rotary_export.op import spec

MICROSOFT = "com.microsoft"

Result = Any  # a pattern.MatchResult, which onnxscript does not type


@dataclass
class Findings:
    """What the rules saw.

    Attributes:
        fused: How each rotary node came to be, by the name of its output.
        refused: Why a node was left, by the name of its first output.
        shared: Tables, by what they are.
    """

    fused: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    shared: dict[Any, ir.Value] = field(default_factory=dict)


class _Rule(pattern.RewriteRuleClassBase):
    """Keeps findings; `plan` carries what check found to rewrite."""

    def __init__(self, findings: Findings) -> None:
        super().__init__(remove_nodes=False)
        self.findings = findings

    def refuse(self, value: ir.Value, reason: str) -> Result:
        if reason:
            self.findings.refused[value.name or ""] = reason
        return pattern.MatchResult().fail(reason, value)

    def accept(self, value: ir.Value, how: str) -> Result:
        self.findings.fused[value.name or ""] = how
        return pattern.MatchResult()


# ---- primitives


class _PrimitiveRule(_Rule):
    plan: Plan

    def examine(self, out: ir.Value) -> Result:
        try:
            self.plan = make_plan(find_rotation(out))
        except NotARotationError as error:
            return self.refuse(out, str(error))
        found = self.plan.rotation
        words = ["interleaved" if found.interleaved else "half"]
        dims = read_dims(found.x)
        if dims is not None and found.rotary_dim != dims[-1]:
            words.append(f"partial {found.rotary_dim} of {dims[-1]}")
        if found.order is not None:
            words.append("halves out")
        return self.accept(out, f"primitives, {', '.join(words)}")

    def rewrite(self, op: Op, **_: Any) -> ir.Value:
        return write_node(op, self.plan, self.findings.shared)


class SumRule(_PrimitiveRule):
    """x * cos + rotate_half(x) * sin, however the halves are cut and joined."""

    def pattern(self, op: Op, a: Any, b: Any, c: Any, d: Any) -> Any:
        return op.Add(op.Mul(a, b), op.Mul(c, d), _outputs=["out"])

    def check(self, context: Any, out: ir.Value, **_: Any) -> Result:
        return self.examine(out)


class DifferenceRule(SumRule):
    """x * cos - rotate_half(x) * sin, where the halves are turned the other way round."""

    def pattern(self, op: Op, a: Any, b: Any, c: Any, d: Any) -> Any:
        return op.Sub(op.Mul(a, b), op.Mul(c, d), _outputs=["out"])


class ConcatRule(_PrimitiveRule):
    """The two halves of the result, or the rotated channels and the others, are joined."""

    def pattern(self, op: Op) -> Any:
        return op.Concat(_allow_other_inputs=True, _outputs=["out"])

    def check(self, context: Any, out: ir.Value, **_: Any) -> Result:
        node = out.producer()
        assert node is not None
        if not _joins_channels(node) or not _is_near_products(out):
            return self.refuse(out, "")
        for user in out.consumers():
            if _joins_channels(user) and _is_rotation(user.outputs[0]):
                return self.refuse(out, "")  # that one is the whole
        return self.examine(out)


class ReshapeRule(_PrimitiveRule):
    """Pairs, or real and imaginary parts, become channels again."""

    def pattern(self, op: Op, data: Any, shape: Any) -> Any:
        return op.Reshape(data, shape, _outputs=["out"])

    def check(self, context: Any, out: ir.Value, **_: Any) -> Result:
        if not _is_near_products(out):
            return self.refuse(out, "")
        return self.examine(out)


def _joins_channels(node: ir.Node) -> bool:
    if node.op_type != "Concat" or node.domain:
        return False
    axis, dims = node.attributes["axis"].as_int(), read_dims(node.outputs[0])
    return axis == -1 or (dims is not None and axis == len(dims) - 1)


def _is_rotation(value: ir.Value) -> bool:
    try:
        make_plan(find_rotation(value))
    except NotARotationError:
        return False
    return True


_MOVES = {"Concat", "Reshape", "Unsqueeze", "Cast", "Identity", "Squeeze", "Flatten"}


def _is_near_products(value: ir.Value, depth: int = 5) -> bool:
    """Whether a sum of two products is a few moves of channels above."""
    node = value.producer()
    if node is None or node.domain or not depth:
        return False
    if is_sum_of_products(node):
        return True
    return node.op_type in _MOVES and any(
        v is not None and _is_near_products(v, depth - 1) for v in node.inputs
    )


def is_sum_of_products(node: ir.Node) -> bool:
    """Whether a node is an Add or Sub of two Mul."""
    return (
        not node.domain
        and node.op_type in ("Add", "Sub")
        and all(v is not None and _producer_is(v, "Mul") for v in node.inputs)
    )


def _producer_is(value: ir.Value, op_type: str) -> bool:
    node = value.producer()
    return node is not None and node.op_type == op_type and not node.domain


# ---- rotary nodes of others


class OnnxRule(_Rule):
    """`ai.onnx::RotaryEmbedding`: ours is a superset, so the domain changes and no more."""

    def pattern(self, op: Op, x: Any, cos: Any, sin: Any) -> Any:
        return op.RotaryEmbedding(x, cos, sin, _allow_other_inputs=True, _outputs=["y"])

    def check(self, context: Any, y: ir.Value, x: ir.Value, cos: ir.Value, sin: ir.Value) -> Result:
        dims = read_dims(x)
        if dims is None or not isinstance(dims[-1], int):
            return self.refuse(y, "the shape of X is not known")
        if x.dtype not in X_TYPES:
            return self.refuse(y, f"X is {x.dtype}")
        return self.accept(y, "ai.onnx::RotaryEmbedding")

    def rewrite(self, op: Op, y: ir.Value, **_: Any) -> ir.Value:
        node = y.producer()
        assert node is not None
        given = {
            name: _read_int(node, name)
            for name in ("interleaved", "rotary_embedding_dim", "num_heads")
        }
        dims = read_dims(node.inputs[0]) if node.inputs[0] is not None else None
        if dims is None or len(dims) != 3:
            given.pop("num_heads")
        return write_rotary(op, node.inputs, {n: v for n, v in given.items() if v})


class MicrosoftRule(_Rule):
    """`com.microsoft::RotaryEmbedding`: X, position_ids, cos, sin; `scale` has no effect in it."""

    attributes: dict[str, int]

    def pattern(self, op: Op, x: Any, ids: Any, cos: Any, sin: Any) -> Any:
        return op.RotaryEmbedding(x, ids, cos, sin, _domain=MICROSOFT, _outputs=["y"])

    def check(
        self, context: Any, y: ir.Value, x: ir.Value, ids: ir.Value, cos: ir.Value, sin: ir.Value
    ) -> Result:
        node = y.producer()
        assert node is not None
        dims, cos_dims, id_dims = read_dims(x), read_dims(cos), read_dims(ids)
        if dims is None or not isinstance(dims[-1], int) or id_dims is None:
            return self.refuse(y, "the shapes of X and position_ids are not known")
        if cos_dims is None or len(cos_dims) != 2 or not isinstance(cos_dims[1], int):
            return self.refuse(y, f"the tables must be (max_seq_len, width), got {cos_dims}")
        if x.dtype not in X_TYPES:
            return self.refuse(y, f"X is {x.dtype}")
        heads, rotary = _read_int(node, "num_heads"), _read_int(node, "rotary_embedding_dim")
        width = 2 * cos_dims[1]
        if rotary and rotary != width:
            return self.refuse(y, f"rotary_embedding_dim is {rotary}, the tables are for {width}")
        if len(dims) == 4:
            head_dim = dims[-1]
        elif rotary:
            if not heads:
                return self.refuse(y, "rotary_embedding_dim needs num_heads")
            head_dim = dims[-1] // heads
        else:  # ONNX Runtime takes a head to be as wide as the tables
            head_dim = width
            if dims[-1] % width or heads not in (0, dims[-1] // width):
                return self.refuse(
                    y, f"{heads} heads of {width} channels do not fill the {dims[-1]} of X"
                )
            heads = dims[-1] // width
        if width > head_dim or (width < head_dim and not rotary):
            return self.refuse(y, f"tables for {width} channels, heads of {head_dim}")
        self.attributes = {
            "interleaved": _read_int(node, "interleaved"),
            "rotary_embedding_dim": rotary,
            "num_heads": heads if len(dims) == 3 else 0,
        }
        return self.accept(y, f"{MICROSOFT}::RotaryEmbedding")

    def rewrite(
        self, op: Op, x: ir.Value, ids: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any
    ) -> ir.Value:
        attributes = {name: value for name, value in self.attributes.items() if value}
        return write_rotary(op, [x, cos, sin, ids], attributes)


def _read_int(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


# ---- around our own node


class PartialRule(_Rule):
    """The leading channels are cut off, rotated, and joined with the others."""

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
        if part is None or not _joins_channels(concat) or _read_int(node, "num_heads"):
            return self.refuse(out, "")
        for whole in _find_sources(part):
            if self._is_cut(whole, part, rest, out):
                self.whole = whole
                how = self.findings.fused.pop(y.name or "", "rotary node")
                return self.accept(out, f"{how}, partial")
        return self.refuse(out, "")

    @staticmethod
    def _is_cut(whole: ir.Value, part: ir.Value, rest: ir.Value, out: ir.Value) -> bool:
        if read_dims(whole) != read_dims(out):
            return False
        tracer = Tracer(leaf=whole)
        try:
            joined = [*tracer.trace(part, 1), *tracer.trace(rest, 1)]
            return joined == list(tracer.trace(whole, 1))
        except UnknownShapeError:
            return False

    def rewrite(self, op: Op, y: ir.Value, **_: Any) -> ir.Value:
        node = y.producer()
        assert node is not None
        part = node.inputs[0]
        dims = read_dims(part) if part is not None else None
        assert dims is not None
        assert isinstance(dims[-1], int)
        attributes = {name: _read_int(node, name) for name in spec.ATTRIBUTES}
        attributes["rotary_embedding_dim"] = attributes["rotary_embedding_dim"] or dims[-1]
        used = {name: value for name, value in attributes.items() if value}
        return write_rotary(op, [self.whole, *node.inputs[1:]], used)


def _find_sources(value: ir.Value) -> Iterator[ir.Value]:
    node = value.producer()
    if node is not None and not node.domain and node.op_type in ("Slice", "Split", "Gather"):
        data = node.inputs[0]
        if data is not None:
            yield data
            yield from _find_sources(data)


class CastRule(_Rule):
    """Half-precision x is widened, rotated, rounded: the op does that itself."""

    def pattern(self, op: Op, x: Any, to: Any) -> Any:
        wide = op.Cast(x, _outputs=["wide"])
        y = op.RotaryEmbedding(wide, _allow_other_inputs=True, _domain=spec.DOMAIN, _outputs=["y"])
        return op.Cast(y, _outputs=["out"])

    def check(
        self, context: Any, out: ir.Value, y: ir.Value, wide: ir.Value, x: ir.Value, **_: Any
    ) -> Result:
        narrow = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
        if wide.dtype != ir.DataType.FLOAT or x.dtype not in narrow or out.dtype != x.dtype:
            return self.refuse(out, "")
        how = self.findings.fused.pop(y.name or "", "rotary node")
        return self.accept(out, f"{how}, casts taken in")

    def rewrite(self, op: Op, x: ir.Value, y: ir.Value, **_: Any) -> ir.Value:
        node = y.producer()
        assert node is not None
        attributes = {name: _read_int(node, name) for name in spec.ATTRIBUTES}
        used = {name: value for name, value in attributes.items() if value}
        return like(write_rotary(op, [x, *node.inputs[1:]], used), x)


def make_rule_sets(findings: Findings) -> list[pattern.RewriteRuleSet]:
    """Return the rules, in the order in which they are to be applied.

    What joins channels comes before what adds products, so that the whole is found before its part.
    """
    steps: list[tuple[type[_Rule], ...]] = [
        (OnnxRule, MicrosoftRule),
        (ConcatRule,),
        (ReshapeRule,),
        (SumRule, DifferenceRule),
        (PartialRule,),
        (CastRule,),
    ]
    return [
        pattern.RewriteRuleSet([rule.rule(findings) for rule in rules], commute=False)
        for rules in steps
    ]
