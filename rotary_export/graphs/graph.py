"""The graphs of a bundle: module, inputs and outputs, the same for every format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rotary_export.bundle.manifest import TensorInfo
from rotary_export.graphs.config import DTYPES, ExportConfig


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


# What graphs are traced at; the proof runs them at other sizes. None is 0 or 1, which torch.export
# would specialise to a constant.
TRACED_SIZES = {"batch_size": 2, "num_heads": 4, "num_kv_heads": 3, "seq_len": 5}


def make_graphs(config: ExportConfig, buffers: Mapping[str, Tensor]) -> tuple[Graph, Graph]:
    """Build the graphs `tables` and `rotate` of a rotary embedding.

    Args:
        config: The checked arguments.
        buffers: State dict of the module.

    Returns:
        `tables`: seq_len -> freqs, scale; of a Hugging Face rope type cos_cache, sin_cache.
        `rotate`: query, key, position_ids (static: query, key, seq_len) -> query_out, key_out.
    """
    rows, rope = config.max_seq_len, config.rope
    module = rope.make_tables(rows, buffers)
    seq_len = TensorInfo("seq_len", "int64", (), (0, rows))
    tables = Graph("tables", module, (seq_len,), rope.describe_tables(rows))

    batch: int | str = config.batch_size or "batch_size"
    length: int | str = rows if config.static else "seq_len"
    query = (batch, config.num_heads or "num_heads", length, config.head_dim)
    key = (batch, config.num_kv_heads or "num_kv_heads", length, config.head_dim)
    ids_shape = (batch, length) if rope.num_axes == 1 else (rope.num_axes, batch, length)
    ids = TensorInfo("position_ids", "int64", ids_shape, (0, rows - 1))
    if config.static:
        ids = seq_len
    rotate = Graph(
        "rotate",
        rope.make_rotate(module, interleaved=config.interleaved, static=config.static),
        (TensorInfo("query", config.dtype, query), TensorInfo("key", config.dtype, key), ids),
        (TensorInfo("query_out", config.dtype, query), TensorInfo("key_out", config.dtype, key)),
    )
    return tables, rotate
