"""The inputs that the proof of a plain bundle compares at."""

from __future__ import annotations

import torch
from torch import Tensor

from rotary_export.graphs.graph import Graph

MAX_ELEMENTS = 2**24  # of one input of one case; longer tables are tried at their last rows


def make_cases(
    graph: Graph, max_seq_len: int, length_boundary: int | None = None
) -> list[tuple[Tensor, ...]]:
    """Make inputs at batches and lengths that the graph was not traced at, and at the edges.

    Args:
        graph: One of a bundle.
        max_seq_len: Rows of its tables.
        length_boundary: The longest length with the first frequencies; None: all have the same.

    Returns:
        Inputs in order, of each case.
    """
    edges = [] if length_boundary is None else [length_boundary, length_boundary + 1]
    edges = [length for length in edges if length <= max_seq_len]
    if any(info.name == "seq_len" for info in graph.inputs):
        lengths = {0, 1, 2, max_seq_len // 2 + 1, max_seq_len - 1, max_seq_len, *edges}
        return [graph.make_inputs({}, n, seed=n) for n in sorted(lengths) if n <= max_seq_len]
    _, num_heads, _, head_dim = (
        size if isinstance(size, int) else 7 for size in graph.inputs[0].shape
    )
    longest = max(1, min(max_seq_len, MAX_ELEMENTS // (num_heads * head_dim)))
    cases: list[tuple[Tensor, ...]] = []
    some = min(7, longest)
    for batch, heads, length in (
        (1, 1, 1),
        (3, 7, some),
        (2, 3, longest // 2 + 1),
        (1, 2, longest),
    ):
        sizes = {"batch_size": batch, "num_heads": heads, "num_kv_heads": 1, "seq_len": length}
        query, key, ids = graph.make_inputs(sizes, seed=length)
        if length == longest:  # the last rows of the tables, in order
            ids = torch.arange(max_seq_len - length, max_seq_len).expand_as(ids).contiguous()
        if length == 1:
            ids[:] = max_seq_len - 1
        cases.append((query, key, ids))
    for edge in edges:  # both sides of the boundary: the largest id alone decides
        sizes = {"batch_size": 2, "num_heads": 3, "num_kv_heads": 1, "seq_len": some}
        query, key, ids = graph.make_inputs(sizes, seed=edge)
        ids = ids.clamp(max=edge - 1)
        ids[..., 0, 0] = edge - 1
        cases.append((query, key, ids))
    return cases


def describe_case(graph: Graph, case: tuple[Tensor, ...]) -> str:
    """Return what is particular of a case: `query 3x8x7x64`, `seq_len 128`."""
    if graph.inputs[-1].name == "seq_len":
        return f"seq_len {int(case[-1])}"
    return "query " + "x".join(str(size) for size in case[0].shape)
