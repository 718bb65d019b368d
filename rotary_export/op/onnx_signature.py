"""What a function body depends on, read from a node and the types and shapes around it."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto, TensorProto, ValueInfoProto

from rotary_export.errors import RotaryExportError
from rotary_export.op import spec

NATIVE_OPSET = 23  # the first with ai.onnx::RotaryEmbedding
OLDEST_OPSET = 18
NEWEST_OPSET = 25  # the exporter of torch 2.13 and onnxscript 0.7 writes no newer one

Dim = int | str | None


@dataclass(frozen=True)
class FunctionSignature:
    """What a function body depends on: nodes with equal signatures share a body.

    Attributes:
        x_type: ONNX element type of X, key and the outputs.
        table_type: ONNX element type of the tables.
        x_rank: Rank of X, 3 or 4.
        head_dim: H.
        ids: The shape of position_ids: "none" (no ids), "per-batch" (B, S), "shared" (1, S) or
            unknown batch size, "offset" (1,).
        expand_tables: Whether 3-D tables may have batch size 1 where X has more.
        has_key: Whether the node has a key.
        has_scale: Whether the node has a scale_cache.
        rotary_dim: R, twice the columns of the tables.
        partial: Whether R < H.
        interleaved: True: pairs (2i, 2i + 1); False: pairs (i, i + R/2).
        num_heads: N of a 3-D X.
        kv_num_heads: Heads of a 3-D key.
        opset: The model's ai.onnx opset.
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


def read_signature(
    node: NodeProto, values: dict[str, ValueInfoProto], opset: int
) -> FunctionSignature:
    """Read the signature of a node.

    Args:
        node: A `rotary_export::RotaryEmbedding` node.
        values: Type and shape of each value in the node's scope, by name.
        opset: The model's ai.onnx opset.

    Returns:
        The signature.

    Raises:
        RotaryExportError: The opset is too old, or a type or size that the body depends on is not
            known.
    """
    if opset < OLDEST_OPSET:
        raise RotaryExportError(f"opset must be >= {OLDEST_OPSET}, got {opset}")
    given = dict(zip(spec.INPUTS, node.input, strict=False))
    attributes = {a.name: a.i for a in node.attribute}

    def read_dims(name: str) -> list[Dim]:
        value = values.get(given[name])
        if value is None or not value.type.tensor_type.HasField("shape"):
            raise RotaryExportError(f"{node.name}: type and shape of {name} are not known")
        shape = value.type.tensor_type.shape
        return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in shape.dim]

    x_shape, cos_shape = read_dims("X"), read_dims("cos_cache")
    num_heads = attributes.get("num_heads", 0)
    width = x_shape[-1]
    if not isinstance(width, int) or not isinstance(cos_shape[-1], int):
        raise RotaryExportError(f"{node.name}: the last dimension of X and cos_cache must be known")
    head_dim = width if len(x_shape) == 4 else width // max(num_heads, 1)
    ids, expand_tables = "none", False
    if given.get("position_ids"):
        ids_shape = read_dims("position_ids")
        same_batch = ids_shape[0] is not None and ids_shape[0] == x_shape[0]
        ids = "offset" if len(ids_shape) == 1 else "per-batch" if same_batch else "shared"
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


def check_opset(opset: int) -> None:
    """Refuse an opset that the function bodies or the exporter don't support.

    Raises:
        RotaryExportError: It is out of range.
    """
    if not isinstance(opset, int) or not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise RotaryExportError(f"opset must be in [{OLDEST_OPSET}, {NEWEST_OPSET}], got {opset!r}")
