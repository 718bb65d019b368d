"""Places that look like a rotary embedding and were not replaced, and the check that decided.

A candidate is

1. a rotary node of another domain,
2. an attention node that rotates inside, or
3. a sum of two products that adds channels of one value to other channels of the same value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnxscript import ir

from rotary_export.errors import RotaryExportError
from rotary_export.fusion.rules.base import Findings
from rotary_export.fusion.rules.build import plan_rotation
from rotary_export.fusion.rules.join import is_rotary
from rotary_export.fusion.symbolic.channels import Tracer
from rotary_export.fusion.symbolic.polynomials import Polynomial, Symbol, UnknownShapeError
from rotary_export.fusion.symbolic.refusal import Refusal, name_check
from rotary_export.fusion.values import is_sum_of_products, read_int_attribute

_ROTATES_INSIDE = {"GroupQueryAttention", "Attention", "SparseAttention", "PagedAttention"}
_JOINS = {"Concat", "Reshape", "Unsqueeze", "Cast"}
_MAX_JOINS = 5

# By the name of each node, and by those of its outputs: the names of its outputs. Normalisation
# names nodes, too, which the file's reader does not know.
Names = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class NotReplaced:
    """A node that was not replaced.

    Attributes:
        node: Its name; of a node without one, that of its output.
        output: Name of its first output.
        op: "ai.onnx::Add".
        reason: Not replaced because of this.
        check: File and function that decided.
        nearest: The nearest rotation that it could have been; empty: nothing is near.
        candidate: Whether it looks like a rotary embedding, not only was examined by name.
    """

    node: str
    output: str
    op: str
    reason: str
    check: str
    nearest: str
    candidate: bool = True


def find_not_replaced(model: ir.Model, findings: Findings, names: Names) -> list[NotReplaced]:
    """List the candidates that no rule replaced.

    Args:
        model: After the rules.
        findings: Of the rules.
        names: Of the model as it was read.

    Returns:
        One for each call; of several nodes of a call, the one that got furthest.
    """
    found: dict[Any, tuple[ir.Node, Refusal]] = {}
    for node in model.graph.all_nodes():
        op, output = _name_op(node), node.outputs[0].name or "" if node.outputs else ""
        if node.op_type == "MRotaryEmbedding":
            found[node] = node, _refuse(f"{op} reads its tables at three rows of ids")
        elif node.op_type == "RotaryEmbedding" and not is_rotary(node):
            found[node] = node, findings.refused.get(output, _refuse(f"{op} is not known"))
        elif node.op_type in _ROTATES_INSIDE and node.domain:
            if read_int_attribute(node, "do_rotary"):
                found[node] = node, _refuse(f"{op} rotates inside: it keeps its own kernel")
        elif is_sum_of_products(node):
            call = find_crossed_channels(node)
            if call is None:
                continue
            refusal = _find_refusal(node.outputs[0], findings)
            if call not in found or refusal.rank > found[call][1].rank:
                found[call] = found.get(call, (node,))[0], refusal
    return [_describe(node, refusal, names) for node, refusal in found.values()]


def _refuse(reason: str) -> Refusal:
    return Refusal(reason, name_check(__file__, "find_not_replaced"))


def _name_op(node: ir.Node) -> str:
    return f"{node.domain or 'ai.onnx'}::{node.op_type}"


def _describe(node: ir.Node, refusal: Refusal, names: Names) -> NotReplaced:
    output = node.outputs[0].name or "" if node.outputs else ""
    name = node.name if node.name and node.name in names else output or node.op_type
    return NotReplaced(name, output, _name_op(node), refusal.reason, refusal.check, refusal.nearest)


def _find_refusal(value: ir.Value, findings: Findings) -> Refusal:
    """Find why a call was refused: at its sum, or at what joins its channels below."""
    known = [findings.refused.get(each.name or "") for each in _list_joined(value, _MAX_JOINS)]
    refusals = [refusal for refusal in known if refusal is not None]
    return max(refusals, key=lambda r: r.rank, default=_refuse("no rule matches it"))


def _list_joined(value: ir.Value, depth: int) -> Iterator[ir.Value]:
    yield value
    for user in value.consumers() if depth else ():
        if user.op_type in _JOINS and not user.domain:
            yield from _list_joined(user.outputs[0], depth - 1)


# ---- nodes that are named


def list_names(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """Return the outputs of each node, by its name and by those of its outputs."""
    names: dict[str, tuple[str, ...]] = {}
    for node in model.graph.all_nodes():
        outputs = tuple(value.name or "" for value in node.outputs)
        names |= {name: outputs for name in (node.name or "", *outputs) if name}
    return names


def examine_node(
    name: str, names: Names, model: ir.Model, findings: Findings
) -> NotReplaced | None:
    """Return why a node was not replaced, whatever it looks like.

    Args:
        name: Of a node, or of an output of it.
        names: Of the model as it was read.
        model: After the rules.
        findings: Of the rules.

    Returns:
        The reason; None: it was replaced.

    Raises:
        RotaryExportError: The model has no such node.
    """
    if name not in names:
        raise RotaryExportError(f"the model has no node or value of the name {name}")
    wanted = {name, *names[name]}
    if wanted & findings.fused.keys():
        return None
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name in wanted:
                found = _describe(node, _examine(node, value), names)
                return replace(found, candidate=False)
    reason = (
        "it is not in the graph after normalisation: it is a part of a rotation that was replaced, "
        "or was removed, inlined, folded into a constant or merged with an equal node"
    )
    check = "fusion/normalize.py: normalize"
    return NotReplaced(name, names[name][0], "", reason, check, "", candidate=False)


def _examine(node: ir.Node, value: ir.Value) -> Refusal:
    check = name_check(__file__, "examine_node")
    if is_rotary(node):
        return Refusal(f"it is {_name_op(node)} already", check)
    plan = plan_rotation(value)
    if isinstance(plan, Refusal):
        return plan
    return Refusal(
        f"it is a rotation, but the pattern of no rule ends in {_name_op(node)}",
        "fusion/rules/apply.py: STEPS",
        channels=plan.rotation.channels,
    )


# ---- what looks like a rotation


def find_crossed_channels(node: ir.Node) -> tuple[object, frozenset[int]] | None:
    """Find the value of which an Add or Sub adds different channels, each times something.

    Args:
        node: An Add or Sub of two Mul.

    Returns:
        What identifies the call: the value and its channels. None: fewer than half of the
        channels are such sums.
    """
    try:
        channels = Tracer().trace(node.outputs[0], 1)
    except UnknownShapeError:
        return None
    touched: dict[object, set[int]] = {}
    counts: Counter[object] = Counter()
    for channel in channels.flat:
        crossed = _find_crossed(channel)
        if crossed is not None:
            base, pair = crossed
            counts[base] += 1
            touched.setdefault(base, set()).update(pair)
    if not counts:
        return None
    base, count = counts.most_common(1)[0]
    return (base, frozenset(touched[base])) if 2 * count >= channels.size else None


def _find_crossed(channel: Polynomial) -> tuple[object, tuple[int, int]] | None:
    """Find the value of which a channel is a sum of two products with different channels."""
    if len(channel) != 2:
        return None
    (one, _), (two, _) = channel
    if len(one) < 2 or len(two) < 2:
        return None
    first = dict(map(_split_symbol, one))
    crossed = {
        base: (first[base], index)
        for base, index in map(_split_symbol, two)
        if base in first and index != first[base]
    }
    return next(iter(crossed.items())) if len(crossed) == 1 else None


def _split_symbol(symbol: Symbol) -> tuple[object, int]:
    """Return what a symbol is a channel of, and which."""
    if symbol[0] == "value":
        return symbol[1], symbol[2]
    inner = symbol[-1]
    if symbol[0] == "leading" and len(inner) == 1:
        ((product, coefficient),) = inner
        if len(product) == 1:
            base, index = _split_symbol(product[0])
            return (*symbol[:-1], base, coefficient), index
    return symbol, 0
