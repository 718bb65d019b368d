"""Tables that a model computes in a half type: found, and put back to float32.

A converter to float16 rounds positions, frequencies and angles. The tables are then wrong from a
few hundred positions on, and no two runtimes agree on them. Such a model is equal to itself, which
proves nothing.

A *turn* is a Cos or Sin node. Its part of the graph, which `widen_tables` computes in float32, is

1. above it, what its angles are computed from, up to integers, constants and inputs;
2. below it, what is computed from it and constants alone, such as the attention factor, up to where
   it meets an activation. There it is rounded once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir.passes.common as passes
from onnxscript import ir

from rotary_export.fusion.half_frequencies import restore_inv_freq
from rotary_export.fusion.normalize import infer_types, inline_functions
from rotary_export.fusion.rules.build import HALF_TYPES
from rotary_export.fusion.rules.join import is_rotary
from rotary_export.fusion.values import read_constant

_TURNS = {"Cos", "Sin"}
_FLOATS = {*HALF_TYPES, ir.DataType.FLOAT, ir.DataType.DOUBLE}
# They round nothing.
_EXACT = set(
    "Identity Reshape Unsqueeze Squeeze Slice Split Concat Gather GatherND GatherElements "
    "Transpose Expand Tile Flatten Neg Abs Where Max Min Clip Constant".split()
)
_CASTS = {"Cast", "CastLike"}
_SIZES = {"Shape", "Size"}
_KEPT = {"Constant", "ConstantOfShape", "DequantizeLinear", "QuantizeLinear"}


_MAX_STEPS = 4  # nodes between a rotary node and the value of the model that it replaces


@dataclass(frozen=True)
class HalfTables:
    """Rotary calls whose tables are computed in a half type.

    Attributes:
        types: The half type, by the name of the call's output.
        turns: Names of the outputs of the turns that compute the tables.
    """

    types: Mapping[str, str]
    turns: frozenset[str]


def find_half_tables(before: ir.Model, after: ir.Model, calls: Iterable[str]) -> HalfTables:
    """Find the rotary calls whose tables are computed in a half type.

    The tables are what a call is computed from besides x.

    Args:
        before: As it was read; it is not changed.
        after: After the rules, which tell what x is.
        calls: Names of the values that rotary calls return, in both.
    """
    types: dict[str, str] = {}
    turns: set[str] = set()
    flat, _ = _flatten(before)
    if _has_half(flat):
        infer_types(flat)
        values, fused = _list_values(flat), _list_values(after)
        for call in calls:
            stop = _list_x(fused[call])
            for value in _list_above([values.get(call)], stop):
                node = value.producer()
                half = _find_half(node.inputs[0]) if node is not None and _is_turn(node) else None
                if half is not None:
                    types[call] = half.name.lower()
                    turns.add(value.name or "")
    return HalfTables(types, frozenset(turns))


def _flatten(model: ir.Model) -> tuple[ir.Model, dict[Any, ir.Function]]:
    flat = model.clone()
    return flat, inline_functions(flat)


def _list_values(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name or "": value for node in model.graph.all_nodes() for value in node.outputs}


def _list_x(call: ir.Value) -> set[str]:
    """Return the names of what a call rotates, and of the nearest values above it."""
    value: ir.Value | None = call
    for _ in range(_MAX_STEPS):
        node = None if value is None else value.producer()
        if value is None or node is None:
            break
        if is_rotary(node):
            value = node.inputs[0 if value is node.outputs[0] else 4]
            break
        value = node.inputs[0]
    names = set()
    for _ in range(_MAX_STEPS):
        if value is not None:
            names.add(value.name or "")
            node = value.producer()
            value = node.inputs[0] if node is not None and node.op_type in _EXACT else None
    return names


def widen_tables(model: ir.Model, turns: Collection[str]) -> tuple[ir.Model, list[str]]:
    """Return a model that computes some turns, and the tables that they give, in float32.

    Args:
        model: As it was read; it is not changed.
        turns: Names of their outputs.

    Returns:
        The model, and what was done about constants that are stored in a half type.
    """
    model, own = _flatten(model)
    infer_types(model)
    found = [node for node in model.graph.all_nodes() if node.outputs[0].name in turns]
    part = _list_part(found)
    twins = _Twins()
    changed = []
    for value in [value for node in part for value in node.outputs]:
        if value.is_graph_output() or any(user not in part for user in value.consumers()):
            changed.append((value, twins.make(value)))
    for value, twin in changed:
        same = value.dtype is None or value.dtype == twin.dtype
        _take_over(value, twin if same else _cast(twin, value.dtype))
    twins.take_sizes()
    model.functions.update(own)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    return model, twins.notes


def _has_half(model: ir.Model) -> bool:
    """Return whether a model has turns, and anything in a half type."""
    nodes = list(model.graph.all_nodes())
    if not any(map(_is_turn, nodes)):
        return False
    given = [*model.graph.inputs]
    given += [value for graph in model.graphs() for value in graph.initializers.values()]
    casts = [node.attributes["to"].as_int() for node in nodes if "to" in node.attributes]
    values = [value for node in nodes if node.op_type == "Constant" for value in node.outputs]
    stored = [ir.convenience.get_const_tensor(value) for value in values]
    types = {value.dtype for value in given} | {t.dtype for t in stored if t is not None}
    return bool(HALF_TYPES & (types | set(map(ir.DataType, casts))))


def _is_turn(node: ir.Node) -> bool:
    return node.op_type in _TURNS and not node.domain


def _find_half(angles: ir.Value | None) -> ir.DataType | None:
    """Return the half type in which angles are computed; None: in none."""
    for value in _list_above([angles]):
        node = value.producer()
        rounds = node is not None and node.op_type not in _EXACT
        if rounds and value.dtype in HALF_TYPES:
            return value.dtype
    return None


def _list_above(
    values: Iterable[ir.Value | None], stop: Collection[str] = ()
) -> Iterator[ir.Value]:
    """Yield floating-point values and what they are computed from, up to some names."""
    waiting, seen = list(values), set()
    while waiting:
        value = waiting.pop()
        if value is None or value in seen or value.dtype not in _FLOATS or value.name in stop:
            continue
        seen.add(value)
        yield value
        node = value.producer()
        waiting += node.inputs if node is not None else ()


# ---- float32 instead


class _Twins:
    """Makes the float32 twin of each value of a part of the graph, beside it.

    Attributes:
        notes: What was done about constants that are stored in a half type.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._known: dict[ir.Value, ir.Value] = {}

    def make(self, value: ir.Value) -> ir.Value:
        """Return what a value is if nothing above it is rounded to a half type."""
        if value not in self._known:
            node = value.producer()
            if value.dtype not in _FLOATS:
                self._known[value] = value
            elif node is None or not _is_widened(node):
                self._known[value] = self._widen(value) if value.dtype in HALF_TYPES else value
            elif node.op_type in _CASTS:
                self._known[value] = self._make_cast(value, node)
            else:
                self._repeat(node)
        return self._known[value]

    def take_sizes(self) -> None:
        """Let sizes be read from twins: two computations of one size are not known to be equal."""
        for value, twin in self._known.items():
            for user, index in [*value.uses()] if twin is not value else ():
                if user.op_type in _SIZES and not user.domain:
                    user.replace_input_with(index, twin)

    def _widen(self, value: ir.Value) -> ir.Value:
        """Cast what is stored, or an input; restore frequencies that have a closed form."""
        stored = read_constant(value)
        if stored is None or stored.size == 1:
            return _cast(value)
        half = stored.dtype.name
        restored = restore_inv_freq(stored)
        if restored is None:
            self.notes.append(
                f"{value.name} is stored in {half}, and has no closed form that restores it: what "
                "was rounded when the file was converted stays rounded"
            )
            return _cast(value)
        inv_freq, base = restored
        self.notes.append(
            f"{value.name} is stored in {half}; it is restored to float32 as the frequencies of "
            f"base {base:g}, which round to what is stored"
        )
        return _insert(ir.node("Constant", [], {"value": ir.tensor(inv_freq)}), value)

    def _make_cast(self, value: ir.Value, node: ir.Node) -> ir.Value:
        data = node.inputs[0]
        assert data is not None
        twin = self.make(data)
        if twin.dtype == ir.DataType.FLOAT and value.dtype != ir.DataType.DOUBLE:
            return twin
        if twin is data and value.dtype not in HALF_TYPES:
            return value
        return _cast(twin, value.dtype if value.dtype not in HALF_TYPES else ir.DataType.FLOAT)

    def _repeat(self, node: ir.Node) -> None:
        """Write a node again, with the twins of its inputs."""
        inputs = [value and self.make(value) for value in node.inputs]
        widened = any(value.dtype in HALF_TYPES for value in node.outputs)
        if not widened and all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
            self._known.update((value, value) for value in node.outputs)
            return
        again = ir.Node(
            node.domain, node.op_type, inputs, [*node.attributes.values()],
            overload=node.overload, num_outputs=len(node.outputs), version=node.version,
        )  # fmt: skip
        assert node.graph is not None
        node.graph.insert_after(node, again)
        for old, new in zip(node.outputs, again.outputs, strict=True):
            dtype = ir.DataType.FLOAT if old.dtype in HALF_TYPES else old.dtype
            new.shape, new.type = old.shape, old.type if dtype is None else ir.TensorType(dtype)
            self._known[old] = new


def _is_widened(node: ir.Node) -> bool:
    """Return whether a node computes in float32 what it computes in a half type."""
    has_graph = any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())
    return not node.domain and node.op_type not in _KEPT and not has_graph


def _cast(value: ir.Value, dtype: ir.DataType | None = ir.DataType.FLOAT) -> ir.Value:
    """Write a Cast of a value beside it."""
    assert dtype is not None
    output = _insert(ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)]), value)
    output.type = ir.TensorType(dtype)
    return output


def _insert(node: ir.Node, value: ir.Value) -> ir.Value:
    """Insert a node with one output of a value's shape beside the value; return the output."""
    producer, graph, output = value.producer(), value.graph, node.outputs[0]
    output.shape, output.type = value.shape, ir.TensorType(ir.DataType.FLOAT)
    if producer is not None:
        assert producer.graph is not None
        producer.graph.insert_after(producer, node)
    else:
        assert graph is not None
        graph.insert_before(graph[0], node)
    return output


def _list_part(turns: Sequence[ir.Node]) -> list[ir.Node]:
    """Return turns and the nodes that compute from them, and from constants, alone."""
    part, waiting = list(turns), list(turns)
    inside = {value for node in turns for value in node.outputs}
    while waiting:
        for user in {user for value in waiting.pop().outputs for user in value.consumers()}:
            if user not in part and _is_widened(user) and _reads_only(user, inside):
                part.append(user)
                waiting.append(user)
                inside |= set(user.outputs)
    return part


def _reads_only(node: ir.Node, inside: set[ir.Value]) -> bool:
    return all(
        value is None or value in inside or value.dtype not in _FLOATS or _is_constant(value)
        for value in node.inputs
    )


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return value.is_initializer() and not value.is_graph_input()
    return node.op_type == "Constant" and not node.domain


def _take_over(value: ir.Value, other: ir.Value) -> None:
    """Let other nodes and the graph's outputs read another value."""
    name, is_output = value.name, value.is_graph_output()
    ir.convenience.replace_all_uses_with(value, other, replace_graph_outputs=True)
    if is_output:
        value.name, other.name = f"{name}_half", name
