"""The graphs of a bundle: module, inputs and outputs, the same for every format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.bundle.manifest import TensorInfo
from rotary_export.embedding import RotaryEmbedding, RotaryQueryKey, check_max_seq_len
from rotary_export.errors import RotaryExportError
from rotary_export.graphs.rotate_static import RotateStatic
from rotary_export.graphs.scaled_graphs import (
    check_scaled,
    describe_scaled_tables,
    find_max_seq_len,
    make_scaled_modules,
    read_parameters,
)
from rotary_export.op.spec import check_rotary_dim
from rotary_export.rope import ScaledRotaryEmbedding

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

ZETA = "zeta"  # the name in ONNX of RotaryEmbedding's buffer `scale`
EMBEDDING_ARGUMENTS = (
    "dim",
    "use_xpos",
    "scale_base",
    "interpolation_factor",
    "base",
    "base_rescale_factor",
)


@dataclass(frozen=True)
class ExportConfig:
    """The checked arguments of an export.

    Attributes:
        embedding: Arguments of `RotaryEmbedding`, but for max_seq_len; empty with `rope`.
        max_seq_len: Rows of the tables.
        num_heads: Heads of query; None: a dynamic axis.
        num_kv_heads: Heads of key; None: a dynamic axis.
        head_dim: H, >= embedding["dim"].
        interleaved: Layout.
        static: query and key have max_seq_len rows, of which the first seq_len are rotated.
        batch_size: B of a static export; else None.
        dtype: Of query and key.
        rope: `RopeParameters` of a `ScaledRotaryEmbedding`.
    """

    embedding: Mapping[str, Any]
    max_seq_len: int
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int
    interleaved: bool
    static: bool
    batch_size: int | None
    dtype: str
    rope: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a manifest holds it."""
        values = asdict(self)
        return values if self.rope is not None else {k: v for k, v in values.items() if k != "rope"}


@dataclass(frozen=True)
class Graph:
    """One graph, ready to be exported.

    Attributes:
        name: "tables" or "rotate".
        module: What computes it.
        inputs: In the order of the module's forward.
        outputs: In order.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def make_inputs(
        self, sizes: Mapping[str, int], seq_len: int = 0, seed: int = 0
    ) -> tuple[Tensor, ...]:
        """Make random inputs: activations in [-0.5, 0.5), ids in their limits.

        Args:
            sizes: Of the dynamic axes.
            seq_len: Value of the scalar input of that name.
            seed: Of the random numbers.

        Returns:
            One tensor per input.
        """
        generator = torch.Generator().manual_seed(seed)
        made = []
        for info in self.inputs:
            shape = [sizes[d] if isinstance(d, str) else d for d in info.shape]
            if info.name == "seq_len":
                made.append(torch.tensor(seq_len))
            elif info.limits is not None:
                made.append(
                    torch.randint(info.limits[0], info.limits[1] + 1, shape, generator=generator)
                )
            else:
                # A pair's magnitude is below 1: xPos's scale, at its largest, fits the dtype.
                values = torch.rand(shape, generator=generator) - 0.5
                made.append(values.to(DTYPES[info.dtype]))
        return tuple(made)


# What graphs are traced at; `parity` proves them at other sizes. None is 0 or 1, which
# torch.export would take for a constant.
TRACED_SIZES = {"batch_size": 2, "num_heads": 4, "num_kv_heads": 3, "seq_len": 5}


def make_buffers(config: ExportConfig) -> dict[str, Tensor]:
    """Return the state dict of a fresh module of that config."""
    if config.rope is None:
        return RotaryEmbedding(**config.embedding).state_dict()
    tables, _ = make_scaled_modules(config.rope, config.max_seq_len, False, False)
    return tables.state_dict()


def _make_modules(
    config: ExportConfig, buffers: Mapping[str, Tensor]
) -> tuple[nn.Module, tuple[TensorInfo, ...], nn.Module]:
    """Build the module of `tables`, its outputs, and the module of `rotate`."""
    rows = config.max_seq_len
    if config.rope is not None:
        tables, rotate = make_scaled_modules(
            config.rope, rows, config.interleaved, config.static, buffers
        )
        return tables, describe_scaled_tables(tables), rotate
    rope = RotaryEmbedding(**config.embedding, max_seq_len=rows)
    rope.load_state_dict(buffers)
    scale_shape = (rows, rope.dim) if rope.use_xpos else ()
    outputs = (
        TensorInfo("freqs", "float32", (rows, rope.dim)),
        TensorInfo("scale", "float32", scale_shape),
    )
    dynamic = RotaryQueryKey(rope, interleaved=config.interleaved)
    return rope, outputs, RotateStatic(dynamic) if config.static else dynamic


def make_graphs(config: ExportConfig, buffers: Mapping[str, Tensor]) -> tuple[Graph, Graph]:
    """Build the graphs `tables` and `rotate` of a plain embedding.

    Args:
        config: The checked arguments.
        buffers: State dict of the module.

    Returns:
        `tables`: seq_len -> freqs, scale; with `config.rope` cos_cache, sin_cache. `rotate`: query,
        key, position_ids (static: query, key, seq_len) -> query_out, key_out.
    """
    rows = config.max_seq_len
    rope, outputs, module = _make_modules(config, buffers)
    seq_len = TensorInfo("seq_len", "int64", (), (0, rows))
    tables = Graph("tables", rope, (seq_len,), outputs)

    batch: int | str = config.batch_size or "batch_size"
    length: int | str = rows if config.static else "seq_len"
    query = (batch, config.num_heads or "num_heads", length, config.head_dim)
    key = (batch, config.num_kv_heads or "num_kv_heads", length, config.head_dim)
    axes = getattr(module, "num_axes", 1)
    ids_shape = (batch, length) if axes == 1 else (axes, batch, length)
    ids = TensorInfo("position_ids", "int64", ids_shape, (0, rows - 1))
    if config.static:
        ids = seq_len
    rotate = Graph(
        "rotate",
        module,
        (TensorInfo("query", config.dtype, query), TensorInfo("key", config.dtype, key), ids),
        (TensorInfo("query_out", config.dtype, query), TensorInfo("key_out", config.dtype, key)),
    )
    return tables, rotate


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
    # A subclass may compute something else.
    if type(module) is not RotaryEmbedding and type(module) is not ScaledRotaryEmbedding:
        raise RotaryExportError(
            "module must be a rotary_export.RotaryEmbedding or ScaledRotaryEmbedding, "
            f"got {type(module).__name__}"
        )
    if module.inv_freq.dtype != torch.float32:
        raise RotaryExportError(f"module must be float32, got {module.inv_freq.dtype}")
    if isinstance(module, ScaledRotaryEmbedding):
        known, default_dim = find_max_seq_len(module), module.rope_parameters.head_dim
    else:
        known, default_dim = module.max_seq_len, module.dim
    max_seq_len = known if max_seq_len is None else max_seq_len
    if max_seq_len is None:
        name = type(module).__name__
        raise RotaryExportError(f"max_seq_len must be given to export or to the {name}")
    check_max_seq_len(max_seq_len)
    head_dim = default_dim if head_dim is None else head_dim
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    sizes = {
        "head_dim": head_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "batch_size": batch_size,
    }
    for name, value in sizes.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise RotaryExportError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise RotaryExportError(f"{name} must be >= 1, got {value}")
    for name, flag in (("interleaved", interleaved), ("static", static)):
        if not isinstance(flag, bool):
            raise RotaryExportError(f"{name} must be True or False, got {flag!r}")
    check_rotary_dim(module.dim, head_dim)
    if num_heads and num_kv_heads and num_heads % num_kv_heads:
        raise RotaryExportError(
            "num_heads must be a multiple of num_kv_heads, "
            f"got num_heads={num_heads}, num_kv_heads={num_kv_heads}"
        )
    if static and (batch_size is None or num_heads is None):
        raise RotaryExportError(
            "a static export needs batch_size and num_heads, "
            f"got batch_size={batch_size}, num_heads={num_heads}"
        )
    if batch_size is not None and not static:
        raise RotaryExportError(
            f"batch_size is for static=True (else the batch is dynamic), got {batch_size}"
        )
    names = [name for name, value in DTYPES.items() if value == dtype]
    if not names:
        raise RotaryExportError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    embedding: dict[str, Any] = {}
    rope = None
    if isinstance(module, ScaledRotaryEmbedding):
        check_scaled(module, static)
        rope = asdict(module.rope_parameters)
    else:
        _check_xpos_range(module, max_seq_len, dtype)
        embedding = {name: getattr(module, name) for name in EMBEDDING_ARGUMENTS}
    return ExportConfig(
        embedding,
        max_seq_len,
        num_heads,
        num_kv_heads,
        head_dim,
        interleaved,
        static,
        batch_size,
        names[0],
        rope,
    )


def _check_xpos_range(rope: RotaryEmbedding, max_seq_len: int, dtype: torch.dtype) -> None:
    """Refuse a length at which xPos's scale, or its reciprocal, is not finite in dtype."""
    if not rope.use_xpos:
        return
    longest = find_longest_xpos(rope, dtype)
    if max_seq_len > longest:
        name = str(dtype).removeprefix("torch.")
        raise RotaryExportError(
            f"with xPos (dim={rope.dim}, scale_base={rope.scale_base:g}) the scale leaves the "
            f"range of {name} at max_seq_len={max_seq_len}; the longest that fits is {longest}"
        )


def find_longest_xpos(rope: RotaryEmbedding, dtype: torch.dtype) -> int:
    """Find the longest max_seq_len whose xPos scale, and its reciprocal, are finite in dtype.

    Args:
        rope: With xPos.
        dtype: Of query and key; the tables are float32.

    Returns:
        Rows.
    """
    assert rope.scale is not None
    info = torch.finfo(dtype)
    rounded = info.max * (1 + info.eps / 4)  # what rounds to info.max, not to infinity
    largest = min(rounded, torch.finfo(torch.float32).max)
    # The first row is max_seq_len // 2 steps before the centre: zeta ** -(max_seq_len // 2 / base).
    steps = math.log(largest) / -math.log(float(rope.scale.min()))
    return 2 * int(steps * rope.scale_base) + 1


def read_config(config: Mapping[str, Any]) -> ExportConfig:
    """Read the `config` of a manifest, as `asdict` of an `ExportConfig` wrote it.

    Raises:
        RotaryExportError: Something is missing or unknown.
    """
    try:
        read = ExportConfig(**config)
        if read.rope is None:
            RotaryEmbedding(**read.embedding)
        else:
            read_parameters(read.rope)
        return read
    except TypeError as error:
        raise RotaryExportError(f"the manifest's config is damaged: {error}") from None
