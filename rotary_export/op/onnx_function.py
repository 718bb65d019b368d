"""The op's function bodies: the op in standard ONNX, for where our op library is not registered.

A body is written for its node's signature: types, ranks and optional inputs. At opset >= 23, and
for all types but float64, it consists of `ai.onnx::RotaryEmbedding`, once for X and once for key.
Execution providers run that op with kernels of their own. Otherwise the body consists of
primitives. A file with function bodies is portable: every ONNX runtime with functions can run it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
)

from rotary_export.op import spec
from rotary_export.op.onnx_signature import FunctionSignature, read_signature


class _Body:
    """Nodes of one function, written in order; values are named v0, v1, ..."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []

    def add(self, op_type: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        name = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def ints(self, *values: int) -> str:
        return self.add("Constant", value_ints=values)


def build_function(signature: FunctionSignature, overload: str = "") -> FunctionProto:
    """Write the function body of one signature.

    Args:
        signature: Of the nodes that call the function.
        overload: Name of the overload; "" if the model has one signature.

    Returns:
        The function `rotary_export::RotaryEmbedding`.
    """
    body = _Body()
    compute = TensorProto.DOUBLE if signature.x_type == TensorProto.DOUBLE else TensorProto.FLOAT
    names = ["cos_cache", "sin_cache"] + (["scale_cache"] if signature.has_scale else [])
    tables = [
        name if signature.table_type == compute else body.add("Cast", name, to=compute)
        for name in names
    ]
    batch = body.add("Shape", "X", start=0, end=1)  # (1,)
    ids = _write_ids(body, signature, batch)
    if signature.expand_tables:
        shape = body.add("Concat", batch, body.ints(1, 1), axis=0)
        tables = [body.add("Expand", table, shape) for table in tables]

    write = _write_native if signature.is_native else _write_primitive
    rotated = [("X", "Y", signature.num_heads)]
    if signature.has_key:
        rotated.append(("key", "key_out", signature.kv_num_heads))
    for x, y, heads in rotated:
        cos_sin_scale = list(tables)
        if x == "key" and signature.has_scale:
            cos_sin_scale[2] = body.add("Reciprocal", tables[2])
        if signature.x_type == compute:
            write(body, signature, _Operands(x, heads, cos_sin_scale, ids, y))
        else:
            wide = body.add("Cast", x, to=compute)
            operands = _Operands(wide, heads, cos_sin_scale, ids, None)
            wide = write(body, signature, operands)
            body.add("Cast", wide, to=signature.x_type, out=y)

    function = helper.make_function(
        spec.DOMAIN,
        spec.OP_TYPE,
        list(spec.INPUTS),
        list(spec.OUTPUTS if signature.has_key else spec.OUTPUTS[:1]),
        _drop_unused(body.nodes),
        [helper.make_opsetid("", signature.opset)],
        attribute_protos=[helper.make_attribute(name, 0) for name in spec.ATTRIBUTES],
    )
    function.overload = overload
    return function


def _drop_unused(nodes: list[NodeProto]) -> list[NodeProto]:
    """Drop nodes whose output nothing reads."""
    needed = set(spec.OUTPUTS)
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def _write_ids(body: _Body, signature: FunctionSignature, batch: str) -> str:
    """Write (B, S) ids, which ORT's own op requires; return "" if the node has no ids."""
    if signature.ids == "none":
        return ""
    ids = "position_ids"
    if signature.ids == "offset":
        axis = 2 if signature.x_rank == 4 else 1
        seq_len = body.add("Squeeze", body.add("Shape", "X", start=axis, end=axis + 1))
        zero = body.add("Constant", value_int=0)
        steps = body.add("Range", zero, seq_len, body.add("Constant", value_int=1))  # (S,)
        ids = body.add("Unsqueeze", body.add("Add", ids, steps), body.ints(0))  # (1, S)
    if signature.ids != "per-batch":
        ids = body.add("Expand", ids, body.add("Concat", batch, body.ints(1), axis=0))
    return ids


class _Operands(NamedTuple):
    """The values of one rotation, by name.

    Attributes:
        x: X or key.
        heads: N of a 3-D x.
        tables: cos_cache and sin_cache, and scale_cache if the node has one.
        ids: (B, S) position ids; "": none.
        out: The name of the result; None: a new one.
    """

    x: str
    heads: int
    tables: Sequence[str]
    ids: str
    out: str | None


def _write_native(body: _Body, signature: FunctionSignature, operands: _Operands) -> str:
    """Write one `ai.onnx::RotaryEmbedding`; the scale goes into its tables."""
    x, heads, tables, ids, out = operands
    cos, sin = tables[:2]
    if signature.has_scale:
        cos, sin = body.add("Mul", cos, tables[2]), body.add("Mul", sin, tables[2])
    attributes = {"interleaved": int(signature.interleaved)}
    if signature.partial:
        attributes["rotary_embedding_dim"] = signature.rotary_dim
    if signature.x_rank == 3:
        attributes["num_heads"] = heads
    inputs = [x, cos, sin] + ([ids] if ids else [])
    return body.add("RotaryEmbedding", *inputs, out=out, **attributes)


def _write_primitive(body: _Body, signature: FunctionSignature, operands: _Operands) -> str:
    """Write the rotation with Mul, Add and Sub, in eager's order: the same bits in float32."""
    x, heads, tables, ids, out = operands
    if ids:
        # Gather would wrap a negative id around: map it to row M, which Gather refuses.
        rows = body.add("Squeeze", body.add("Shape", tables[0], start=0, end=1))
        negative = body.add("Less", ids, body.add("Constant", value_int=0))
        ids = body.add("Where", negative, rows, ids)
        tables = [body.add("Gather", table, ids) for table in tables]  # (B, S, R/2)
    # X is viewed as (B, N, S, H) or (B, S, N, H); the tables get an axis of size 1 for N.
    heads_axis = body.ints(1 if signature.x_rank == 4 else 2)
    tables = [body.add("Unsqueeze", table, heads_axis) for table in tables]
    if signature.x_rank == 3:
        x = body.add("Reshape", x, body.ints(0, 0, heads, signature.head_dim))

    def cut(start: int, end: int, step: int = 1) -> str:
        return body.add(
            "Slice", x, body.ints(start), body.ints(end), body.ints(-1), body.ints(step)
        )

    half = signature.rotary_dim // 2
    if signature.interleaved:
        first, second = cut(0, signature.rotary_dim, 2), cut(1, signature.rotary_dim, 2)
    else:
        first, second = cut(0, half), cut(half, 2 * half)

    def product(value: str, table: str) -> str:
        term = body.add("Mul", value, table)
        return body.add("Mul", term, tables[2]) if signature.has_scale else term

    cos, sin = tables[:2]
    parts = [
        body.add("Sub", product(first, cos), product(second, sin)),
        body.add("Add", product(second, cos), product(first, sin)),
    ]
    if signature.interleaved:
        last = body.ints(-1)
        pairs = [body.add("Unsqueeze", part, last) for part in parts]
        joined = body.add("Concat", *pairs, axis=-1)  # (..., R/2, 2)
        parts = [body.add("Reshape", joined, body.ints(0, 0, 0, signature.rotary_dim))]
    if signature.partial:
        parts.append(cut(signature.rotary_dim, 2**63 - 1))
    if signature.x_rank == 4:
        return body.add("Concat", *parts, axis=-1, out=out)
    joined = body.add("Concat", *parts, axis=-1)
    return body.add("Reshape", joined, body.ints(0, 0, heads * signature.head_dim), out=out)


def add_functions(model: ModelProto) -> list[FunctionSignature]:
    """Add the function bodies of all `rotary_export::RotaryEmbedding` nodes to a model, in place.

    Nodes in subgraphs (If, Loop, Scan) are included. Bodies of an earlier call are replaced. Nodes
    of one signature need one plain function. Several signatures become overloads of the function,
    which need IR version 10.

    Args:
        model: With types and shapes of the values around its rotary nodes.

    Returns:
        The signatures, in order of appearance.

    Raises:
        RotaryExportError: As `read_signature`.
    """
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    scopes = list(_walk_graphs(model.graph, {}))
    found = [
        (node, read_signature(node, values, opset))
        for graph, values in scopes
        for node in graph.node
        if (node.domain, node.op_type) == (spec.DOMAIN, spec.OP_TYPE)
    ]
    signatures = list(dict.fromkeys(signature for _, signature in found))
    for node, signature in found:
        node.overload = _name_overload(signature, signatures)
        if not signature.has_key:  # torch's op always has two outputs
            del node.output[1:]
    others = [f for f in model.functions if (f.domain, f.name) != (spec.DOMAIN, spec.OP_TYPE)]
    bodies = [build_function(s, _name_overload(s, signatures)) for s in signatures]
    del model.functions[:]
    model.functions.extend([*others, *bodies])
    oldest = helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.ir_version = max(oldest, 10 if len(signatures) > 1 else 8)
    return signatures


def _walk_graphs(
    graph: GraphProto, outer: dict[str, ValueInfoProto]
) -> Iterator[tuple[GraphProto, dict[str, ValueInfoProto]]]:
    """Yield a graph and its subgraphs, each with the values in its scope."""
    values = outer | {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    for tensor in graph.initializer:
        values[tensor.name] = helper.make_tensor_value_info(
            tensor.name, tensor.data_type, tensor.dims
        )
    yield graph, values
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
            for subgraph in inner:
                yield from _walk_graphs(subgraph, values)


def _name_overload(signature: FunctionSignature, signatures: list[FunctionSignature]) -> str:
    return "" if len(signatures) == 1 else f"signature{signatures.index(signature)}"
