"""The arguments of an export, checked against each other, and the `config` of a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from rotary_export.embedding import check_max_seq_len
from rotary_export.errors import RotaryExportError
from rotary_export.graphs.kinds import RopeKind, make_kind, read_kind
from rotary_export.op.spec import check_rotary_dim

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class ExportConfig:
    """The checked arguments of an export.

    Attributes:
        rope: The kind of rope, with the arguments of its module.
        max_seq_len: Rows of the tables.
        num_heads: Heads of query; None: a dynamic axis.
        num_kv_heads: Heads of key; None: a dynamic axis.
        head_dim: H, >= rope.rotary_dim.
        interleaved: Layout.
        static: query and key have max_seq_len rows, of which the first seq_len are rotated.
        batch_size: B of a static export; else None.
        dtype: Of query and key.
    """

    rope: RopeKind
    max_seq_len: int
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int
    interleaved: bool
    static: bool
    batch_size: int | None
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a manifest contains it; `read_config` reads it."""
        names = [field.name for field in fields(self) if field.name != "rope"]
        return {self.rope.key: self.rope.to_dict()} | {name: getattr(self, name) for name in names}


def check_config(
    module: object,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    interleaved: bool = False,
    max_seq_len: int | None = None,
    batch_size: int | None = None,
    static: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ExportConfig:
    """Check the arguments of `export` against each other.

    Returns:
        The arguments, with their defaults filled in.

    Raises:
        RotaryExportError: One is wrong, missing, or does not go with another.
    """
    rope = make_kind(module)
    weights: Any = module
    if weights.inv_freq.dtype != torch.float32:
        raise RotaryExportError(f"module must be float32, got {weights.inv_freq.dtype}")
    max_seq_len = rope.find_max_seq_len(module) if max_seq_len is None else max_seq_len
    if max_seq_len is None:
        name = type(module).__name__
        raise RotaryExportError(f"max_seq_len must be given to export or to the {name}")
    check_max_seq_len(max_seq_len)
    head_dim = rope.default_head_dim if head_dim is None else head_dim
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    sizes = {
        "head_dim": head_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "batch_size": batch_size,
    }
    _check_sizes(sizes)
    for name, flag in (("interleaved", interleaved), ("static", static)):
        if not isinstance(flag, bool):
            raise RotaryExportError(f"{name} must be True or False, got {flag!r}")
    check_rotary_dim(rope.rotary_dim, head_dim)
    _check_heads(num_heads, num_kv_heads)
    _check_static(static, batch_size, num_heads)
    dtype_name = _find_dtype_name(dtype)
    rope.check(module, max_seq_len=max_seq_len, static=static, dtype=dtype)
    return ExportConfig(
        rope=rope,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        interleaved=interleaved,
        static=static,
        batch_size=batch_size,
        dtype=dtype_name,
    )


def _check_sizes(sizes: Mapping[str, int | None]) -> None:
    for name, value in sizes.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise RotaryExportError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise RotaryExportError(f"{name} must be >= 1, got {value}")


def _check_heads(num_heads: int | None, num_kv_heads: int | None) -> None:
    if num_heads and num_kv_heads and num_heads % num_kv_heads:
        raise RotaryExportError(
            "num_heads must be a multiple of num_kv_heads, "
            f"got num_heads={num_heads}, num_kv_heads={num_kv_heads}"
        )


def _check_static(static: bool, batch_size: int | None, num_heads: int | None) -> None:
    if static and (batch_size is None or num_heads is None):
        raise RotaryExportError(
            "a static export needs batch_size and num_heads, "
            f"got batch_size={batch_size}, num_heads={num_heads}"
        )
    if batch_size is not None and not static:
        raise RotaryExportError(
            f"batch_size is for static=True (else the batch is dynamic), got {batch_size}"
        )


def _find_dtype_name(dtype: torch.dtype) -> str:
    for name, value in DTYPES.items():
        if value == dtype:
            return name
    raise RotaryExportError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")


def read_config(config: Mapping[str, Any]) -> ExportConfig:
    """Read the `config` of a manifest, as `ExportConfig.to_dict` wrote it.

    Raises:
        RotaryExportError: Something is missing or unknown.
    """
    try:
        rope = read_kind(config)
        return ExportConfig(rope=rope, **{k: v for k, v in config.items() if k != rope.key})
    except TypeError as error:
        raise RotaryExportError(f"the manifest's config is damaged: {error}") from None
