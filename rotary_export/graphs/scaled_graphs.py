"""The graphs of a plain bundle whose rope is of a Hugging Face rope type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rotary_export.bundle.manifest import TensorInfo
from rotary_export.errors import RotaryExportError
from rotary_export.rope import RopeParameters, ScaledRotaryEmbedding
from rotary_export.rope.query_key import ScaledQueryKey, ScaledStatic, ScaledTables


def read_parameters(rope: Mapping[str, Any]) -> RopeParameters:
    """Read the rope parameters of a manifest, where tuples are lists.

    Raises:
        TypeError: Something is missing or unknown.
    """
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in rope.items()}
    return RopeParameters(**values)


def find_max_seq_len(rope: ScaledRotaryEmbedding) -> int | None:
    """Return how many rows the tables of a rope have by default.

    That is what its config says, and for dynamic, whose config has the length before it is made
    longer, factor times that.
    """
    p = rope.rope_parameters
    if rope.max_seq_len is not None:
        return rope.max_seq_len
    length = p.max_position_embeddings
    return (int(p.factor * length) if p.rope_type == "dynamic" else length) or None


def check_scaled(rope: ScaledRotaryEmbedding, static: bool) -> None:
    """Refuse what has no graph.

    Raises:
        RotaryExportError: Positions that are no ids; a static export of multimodal positions.
    """
    if rope.rope_parameters.coordinates:
        raise RotaryExportError(
            "the positions of this rope are coordinates in [-1, 1], a bundle takes position_ids: "
            "rotary_export.rope has its tables"
        )
    if static and rope.axes is not None:
        raise RotaryExportError(
            f"a static export has one position for each row, this rope has {rope.num_axes} "
            "(mrope_section or axial)"
        )


def make_scaled_modules(
    rope: Mapping[str, Any],
    max_seq_len: int,
    interleaved: bool,
    static: bool,
    buffers: Mapping[str, Tensor] | None = None,
) -> tuple[ScaledTables, ScaledQueryKey]:
    """Build what computes the graphs `tables` and `rotate`.

    Args:
        rope: `asdict` of RopeParameters.
        max_seq_len: Rows of the tables.
        interleaved: Layout.
        static: Whether `rotate` takes seq_len in place of position_ids.
        buffers: State dict of the rope: inv_freq; None: as computed here.
    """
    tables = ScaledTables(read_parameters(rope), max_seq_len)
    if buffers:
        tables.load_state_dict(buffers)
    kind = ScaledStatic if static else ScaledQueryKey
    return tables, kind(tables, interleaved=interleaved)


def describe_scaled_tables(tables: ScaledTables) -> tuple[TensorInfo, ...]:
    """Return the outputs of the graph `tables`."""
    assert tables.max_seq_len is not None
    shape = (tables.max_seq_len, tables.dim // 2)
    return tuple(TensorInfo(name, "float32", shape) for name in ("cos_cache", "sin_cache"))
