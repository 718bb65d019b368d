"""The op's bodies in standard ONNX: what runs where our op library does not.

A body is written for its node (`FunctionSignature`): the types, ranks and optional inputs that it
has. Float32 and
the half types at opset >= 23 become `ai.onnx::RotaryEmbedding`, once for X and once for key, which
execution providers run with kernels of their own; float64 and older opsets become primitives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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

from rotary_export.errors import RotaryExportError
from rotary_export.op import spec

NATIVE_OPSET = 23  # ai.onnx::RotaryEmbedding exists from here on
OLDEST_OPSET = 18

Dim = int | str | None


@dataclass(frozen=True)
class FunctionSignature:
    """What a body depends on.

    Attributes:
        x_type: ONNX element type of X, key and the outputs.
        table_type: ONNX element type of the tables.
        x_rank: 3 or 4.
        head_dim: H; of a 3-D X.
        ids: "none", "each" (B, S), "shared" (1, S) or of unknown batch, "offset" (1,).
        expand_tables: 3-D tables may have batch 1 where X has more.
        has_key: There is a key.
        has_scale: There is a scale_cache.
        rotary_dim: R; equals 2 * columns of the tables.
        partial: R < H.
        interleaved: Layout.
        num_heads: N of a 3-D X.
        kv_num_heads: Heads of a 3-D key.
        opset: Of ai.onnx.
    """

    x_type: int
    table_type: int
    x_rank: int
    head_dim: int
    ids: str
    expand_tables: bool
    has_key: bool
    has_scale: bool
    rotary_dim: int
    partial: bool
    interleaved: bool
    num_heads: int
    kv_num_heads: int
    opset: int

    @property
    def is_native(self) -> bool:
        """Whether the body uses `ai.onnx::RotaryEmbedding`."""
        return self.opset >= NATIVE_OPSET and self.x_type != TensorProto.DOUBLE


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


def build_function(form: FunctionSignature, overload: str = "") -> FunctionProto:
    """Write the body of one form.

    Args:
        form: What the node looks like.
        overload: Name of the overload; "" where the model has one form.

    Returns:
        The function `rotary_export::RotaryEmbedding`.
    """
    body = _Body()
    compute = TensorProto.DOUBLE if form.x_type == TensorProto.DOUBLE else TensorProto.FLOAT
    names = ["cos_cache", "sin_cache"] + (["scale_cache"] if form.has_scale else [])
    tables = [
        name if form.table_type == compute else body.add("Cast", name, to=compute) for name in names
    ]
    batch = body.add("Shape", "X", start=0, end=1)  # (1,)
    ids = _write_ids(body, form, batch)
    if form.expand_tables:
        shape = body.add("Concat", batch, body.ints(1, 1), axis=0)
        tables = [body.add("Expand", table, shape) for table in tables]

    write = _write_native if form.is_native else _write_primitive
    rotated = [("X", "Y", form.num_heads)]
    if form.has_key:
        rotated.append(("key", "key_out", form.kv_num_heads))
    for x, y, heads in rotated:
        cos_sin_scale = list(tables)
        if x == "key" and form.has_scale:
            cos_sin_scale[2] = body.add("Reciprocal", tables[2])
        if form.x_type == compute:
            write(body, form, x, heads, cos_sin_scale, ids, y)
        else:
            wide = body.add("Cast", x, to=compute)
            wide = write(body, form, wide, heads, cos_sin_scale, ids, None)
            body.add("Cast", wide, to=form.x_type, out=y)

    function = helper.make_function(
        spec.DOMAIN,
        spec.OP_TYPE,
        list(spec.INPUTS),
        list(spec.OUTPUTS if form.has_key else spec.OUTPUTS[:1]),
        _drop_unused(body.nodes),
        [helper.make_opsetid("", form.opset)],
        attribute_protos=[helper.make_attribute(name, 0) for name in spec.ATTRIBUTES],
    )
    function.overload = overload
    return function


def _drop_unused(nodes: list[NodeProto]) -> list[NodeProto]:
    """Leave out nodes that nothing reads."""
    needed = set(spec.OUTPUTS)
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def _write_ids(body: _Body, form: FunctionSignature, batch: str) -> str:
    """Write (B, S) ids, as ORT's own op wants them; "" where the node has none."""
    if form.ids == "none":
        return ""
    ids = "position_ids"
    if form.ids == "offset":
        axis = 2 if form.x_rank == 4 else 1
        seq_len = body.add("Squeeze", body.add("Shape", "X", start=axis, end=axis + 1))
        zero = body.add("Constant", value_int=0)
        steps = body.add("Range", zero, seq_len, body.add("Constant", value_int=1))  # (S,)
        ids = body.add("Unsqueeze", body.add("Add", ids, steps), body.ints(0))  # (1, S)
    if form.ids != "each":
        ids = body.add("Expand", ids, body.add("Concat", batch, body.ints(1), axis=0))
    return ids


def _write_native(
    body: _Body,
    form: FunctionSignature,
    x: str,
    heads: int,
    tables: Sequence[str],
    ids: str,
    out: str | None,
) -> str:
    """Write one `ai.onnx::RotaryEmbedding`; the scale goes into its tables."""
    cos, sin = tables[:2]
    if form.has_scale:
        cos, sin = body.add("Mul", cos, tables[2]), body.add("Mul", sin, tables[2])
    attributes = {"interleaved": int(form.interleaved)}
    if form.partial:
        attributes["rotary_embedding_dim"] = form.rotary_dim
    if form.x_rank == 3:
        attributes["num_heads"] = heads
    inputs = [x, cos, sin] + ([ids] if ids else [])
    return body.add("RotaryEmbedding", *inputs, out=out, **attributes)


def _write_primitive(
    body: _Body,
    form: FunctionSignature,
    x: str,
    heads: int,
    tables: Sequence[str],
    ids: str,
    out: str | None,
) -> str:
    """Write the rotation with Mul, Add and Sub, in eager's order: the same bits in float32."""
    if ids:
        # A negative id would wrap around: send it to row M, which Gather refuses.
        rows = body.add("Squeeze", body.add("Shape", tables[0], start=0, end=1))
        negative = body.add("Less", ids, body.add("Constant", value_int=0))
        ids = body.add("Where", negative, rows, ids)
        tables = [body.add("Gather", table, ids) for table in tables]  # (B, S, R/2)
    # X is seen as (B, N, S, H) or (B, S, N, H); the tables get an axis of 1 for N.
    heads_axis = body.ints(1 if form.x_rank == 4 else 2)
    tables = [body.add("Unsqueeze", table, heads_axis) for table in tables]
    if form.x_rank == 3:
        x = body.add("Reshape", x, body.ints(0, 0, heads, form.head_dim))

    def cut(start: int, end: int, step: int = 1) -> str:
        return body.add(
            "Slice", x, body.ints(start), body.ints(end), body.ints(-1), body.ints(step)
        )

    half = form.rotary_dim // 2
    if form.interleaved:
        first, second = cut(0, form.rotary_dim, 2), cut(1, form.rotary_dim, 2)
    else:
        first, second = cut(0, half), cut(half, 2 * half)

    def product(value: str, table: str) -> str:
        term = body.add("Mul", value, table)
        return body.add("Mul", term, tables[2]) if form.has_scale else term

    cos, sin = tables[:2]
    parts = [
        body.add("Sub", product(first, cos), product(second, sin)),
        body.add("Add", product(second, cos), product(first, sin)),
    ]
    if form.interleaved:
        last = body.ints(-1)
        pairs = [body.add("Unsqueeze", part, last) for part in parts]
        joined = body.add("Concat", *pairs, axis=-1)  # (..., R/2, 2)
        parts = [body.add("Reshape", joined, body.ints(0, 0, 0, form.rotary_dim))]
    if form.partial:
        parts.append(cut(form.rotary_dim, 2**63 - 1))
    if form.x_rank == 4:
        return body.add("Concat", *parts, axis=-1, out=out)
    joined = body.add("Concat", *parts, axis=-1)
    return body.add("Reshape", joined, body.ints(0, 0, heads * form.head_dim), out=out)


def read_form(node: NodeProto, values: dict[str, ValueInfoProto], opset: int) -> FunctionSignature:
    """Find out what body a node needs.

    Args:
        node: A `rotary_export::RotaryEmbedding` node.
        values: Type and shape of each value of its graph, by name.
        opset: The model's ai.onnx opset.

    Returns:
        The form.

    Raises:
        RotaryExportError: A type or size that the body depends on is not known.
    """
    if opset < OLDEST_OPSET:
        raise RotaryExportError(f"opset must be >= {OLDEST_OPSET}, got {opset}")
    given = dict(zip(spec.INPUTS, node.input, strict=False))
    attributes = {a.name: a.i for a in node.attribute}

    def dims(name: str) -> list[Dim]:
        value = values.get(given[name])
        if value is None or not value.type.tensor_type.HasField("shape"):
            raise RotaryExportError(f"{node.name}: type and shape of {name} are not known")
        shape = value.type.tensor_type.shape
        return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in shape.dim]

    x_shape, cos_shape = dims("X"), dims("cos_cache")
    num_heads = attributes.get("num_heads", 0)
    width = x_shape[-1]
    if not isinstance(width, int) or not isinstance(cos_shape[-1], int):
        raise RotaryExportError(f"{node.name}: the last dimension of X and cos_cache must be known")
    head_dim = width if len(x_shape) == 4 else width // max(num_heads, 1)
    ids, expand_tables = "none", False
    if given.get("position_ids"):
        ids_shape = dims("position_ids")
        same_batch = ids_shape[0] is not None and ids_shape[0] == x_shape[0]
        ids = "offset" if len(ids_shape) == 1 else "each" if same_batch else "shared"
    else:
        expand_tables = cos_shape[0] is None or cos_shape[0] != x_shape[0]
    rotary_dim = 2 * cos_shape[-1]
    return FunctionSignature(
        x_type=values[given["X"]].type.tensor_type.elem_type,
        table_type=values[given["cos_cache"]].type.tensor_type.elem_type,
        x_rank=len(x_shape),
        head_dim=head_dim,
        ids=ids,
        expand_tables=expand_tables,
        has_key=bool(given.get("key")),
        has_scale=bool(given.get("scale_cache")),
        rotary_dim=rotary_dim,
        partial=rotary_dim < head_dim,
        interleaved=bool(attributes.get("interleaved", 0)),
        num_heads=num_heads,
        kv_num_heads=attributes.get("kv_num_heads", 0),
        opset=opset,
    )


def add_functions(model: ModelProto) -> list[FunctionSignature]:
    """Give every `rotary_export::RotaryEmbedding` node of a model its body, in place.

    Nodes in subgraphs (If, Loop, Scan) are included. Bodies that an earlier call added are
    replaced. One form needs one plain function; several become overloads, which need IR version 10.

    Args:
        model: With types and shapes of the values around its rotary nodes.

    Returns:
        The forms, in order of appearance.

    Raises:
        RotaryExportError: As `read_form`.
    """
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    scopes = list(_walk_graphs(model.graph, {}))
    found = [
        (node, read_form(node, values, opset))
        for graph, values in scopes
        for node in graph.node
        if (node.domain, node.op_type) == (spec.DOMAIN, spec.OP_TYPE)
    ]
    forms = list(dict.fromkeys(form for _, form in found))
    for node, form in found:
        node.overload = _name_overload(form, forms)
        if not form.has_key:  # torch's op always has two outputs
            del node.output[1:]
    others = [f for f in model.functions if (f.domain, f.name) != (spec.DOMAIN, spec.OP_TYPE)]
    bodies = [build_function(form, _name_overload(form, forms)) for form in forms]
    del model.functions[:]
    model.functions.extend([*others, *bodies])
    oldest = helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.ir_version = max(oldest, 10 if len(forms) > 1 else 8)
    return forms


def _walk_graphs(
    graph: GraphProto, outer: dict[str, ValueInfoProto]
) -> Iterator[tuple[GraphProto, dict[str, ValueInfoProto]]]:
    """Yield a graph and its subgraphs, each with the values that are in its scope."""
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


def _name_overload(form: FunctionSignature, forms: list[FunctionSignature]) -> str:
    return "" if len(forms) == 1 else f"form{forms.index(form)}"
