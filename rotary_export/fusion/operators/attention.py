"""`ai.onnx::Attention` reads keys and values as they are in the cache.

Exporters repeat each head of the key and the value for its group of query heads, and join the cache
with the new positions, before attention. The operator does both inside (opset 23): its group is
what `repeat_kv` repeats, and `present_key` is what Concat joins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxscript import ir
from onnxscript.rewriter import pattern

from rotary_export.fusion.rules.base import Op, Result
from rotary_export.fusion.values import read_dims, read_int_attribute, read_ints

_HEADS = 1  # axis of (B, N, S, H)
_NEW_AXIS = [2]  # of the members of a group
_LENGTH = (2, -2)


class RepeatedHeadsRule(pattern.RewriteRuleClassBase):
    """Key and value with a head for each query head, made by Unsqueeze, Expand and Reshape."""

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(
        self, op: Op, query: Any, key: Any, value: Any, key_axis: Any, value_axis: Any
    ) -> Any:
        any_shape = pattern.ANY_VALUE
        wide_key = op.Expand(op.Unsqueeze(key, key_axis), any_shape, _outputs=["wide_key"])
        wide_value = op.Expand(op.Unsqueeze(value, value_axis), any_shape, _outputs=["wide_value"])
        return op.Attention(
            query,
            op.Reshape(wide_key, any_shape, _outputs=["many_keys"]),
            op.Reshape(wide_value, any_shape, _outputs=["many_values"]),
            _allow_other_inputs=True,
            _outputs=["y"],
        )

    def check(
        self, context: Any, y: ir.Value, key_axis: ir.Value, value_axis: ir.Value, **found: Any
    ) -> Result:
        if any(each is not None for each in _get_node(y).inputs[4:]):
            return pattern.MatchResult().fail("its cache has a head for each query head", y)
        for axis, names in (
            (key_axis, ("key", "wide_key", "many_keys")),
            (value_axis, ("value", "wide_value", "many_values")),
        ):
            if read_ints(axis) != _NEW_AXIS or not _is_repeated(*(found[name] for name in names)):
                return pattern.MatchResult().fail("heads are not repeated", y)
        return pattern.MatchResult()

    def rewrite(self, op: Op, y: ir.Value, key: ir.Value, value: ir.Value, **_: Any) -> Any:
        node = _get_node(y)
        return op.Attention(node.inputs[0], key, value, *node.inputs[3:], **node.attributes)


class GrowingCacheRule(pattern.RewriteRuleClassBase):
    """Key and value that Concat joins from the cache and the new positions."""

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(
        self, op: Op, query: Any, past_key: Any, key: Any, past_value: Any, value: Any
    ) -> Any:
        present_key = op.Concat(past_key, key, _outputs=["present_key"])
        present_value = op.Concat(past_value, value, _outputs=["present_value"])
        y = op.Attention(
            query, present_key, present_value, _allow_other_inputs=True, _outputs=["y"]
        )
        return y, present_key, present_value

    def check(
        self,
        context: Any,
        y: ir.Value,
        past_key: ir.Value,
        key: ir.Value,
        present_key: ir.Value,
        past_value: ir.Value,
        value: ir.Value,
        present_value: ir.Value,
        **_: Any,
    ) -> Result:
        node = _get_node(y)
        if any(each is not None for each in node.inputs[4:]):
            return pattern.MatchResult().fail("it has a cache already", y)
        if read_int_attribute(node, "is_causal"):
            return pattern.MatchResult().fail("with a cache, it is causal in another way", y)
        caches = [read_dims(past) for past in (past_key, past_value)]
        rows = [read_dims(new) for new in (key, value)]
        if any(dims is None or len(dims) != 4 or None in dims for dims in (*caches, *rows)):
            return pattern.MatchResult().fail("it is not (B, N, S, H)", y)
        if caches[0][:3] != caches[1][:3] or rows[0][:3] != rows[1][:3]:  # type: ignore[index]
            return pattern.MatchResult().fail("keys and values have other positions", y)
        joined = (_get_node(present_key), _get_node(present_value))
        if any(read_int_attribute(each, "axis") not in _LENGTH for each in joined):
            return pattern.MatchResult().fail("positions are not joined", y)
        others = [node.inputs[0], *node.inputs[3:], key, past_key, value, past_value]
        if _depend_on(others, {present_key, present_value}):
            return pattern.MatchResult().fail("its mask depends on what it would return", y)
        return pattern.MatchResult()

    def rewrite(
        self,
        op: Op,
        y: ir.Value,
        past_key: ir.Value,
        key: ir.Value,
        past_value: ir.Value,
        value: ir.Value,
        **_: Any,
    ) -> Any:
        node = _get_node(y)
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        inputs = (node.inputs[0], key, value, mask, past_key, past_value)
        return op.Attention(*inputs, **node.attributes, _outputs=3)


def _get_node(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _depend_on(values: Sequence[ir.Value | None], sources: set[ir.Value]) -> bool:
    """Whether one of these values is computed from one of those."""
    queue, seen = list(values), set()
    while queue:
        value = queue.pop()
        if value is None or value in seen:
            continue
        if value in sources:
            return True
        seen.add(value)
        node = value.producer()
        queue += [] if node is None else node.inputs
    return False


def _is_repeated(few: ir.Value, wide: ir.Value, many: ir.Value) -> bool:
    """Whether (B, N, S, H) became (B, N, G, S, H) and then (B, N*G, S, H)."""
    before, between, after = read_dims(few), read_dims(wide), read_dims(many)
    if before is None or between is None or after is None:
        return False
    if (len(before), len(between), len(after)) != (4, 5, 4):
        return False
    heads, members = between[_HEADS : _HEADS + 2]
    if not isinstance(heads, int) or not isinstance(members, int):
        return False
    same = (before[0], before[-1]) == (between[0], between[-1]) == (after[0], after[-1])
    return same and before[_HEADS] == heads and after[_HEADS] == heads * members
