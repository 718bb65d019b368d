"""Inputs of a bundle's main graph at a shape: to time it, and as the example of a kit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rotary_export.bundle.dims import BATCH, SEQ
from rotary_export.bundle.manifest import GraphInfo, Manifest, TensorInfo
from rotary_export.proof.models.cases import CaseSpec, Run, make_case
from rotary_export.proof.models.compare import GRAPH, read_sources
from rotary_export.runtime.tensors import make_dtype
from rotary_export.types import Array, Arrays

HEADS = 8  # where the bundle leaves the number open


def fit_shapes(
    manifest: Manifest, name: str, shapes: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Lower (batch_size, seq_len) to what `rotate` or `model` accepts, each once."""
    if name != "rotate":
        return _fit_sizes(manifest, shapes)
    query, _, position = manifest.graphs[name].inputs
    if isinstance(query.shape[0], int) and isinstance(query.shape[2], int):
        return [(query.shape[0], query.shape[2])]
    assert position.limits is not None
    rows = position.limits[1] + 1
    return list(dict.fromkeys((batch_size, min(seq_len, rows)) for batch_size, seq_len in shapes))


def make_inputs(
    manifest: Manifest, name: str, batch_size: int, seq_len: int, run: Run | None = None
) -> Mapping[str, Any]:
    """Make inputs of `rotate` (numpy) or `model` (torch) at a shape that it accepts.

    `run` runs the graph, to fill a key/value cache; None: its values are random.
    """
    if name == "rotate":
        return _make_rotate_inputs(manifest.graphs[name], batch_size, seq_len)
    return _make_model_inputs(manifest, batch_size, seq_len, run)


def _make_rotate_inputs(graph: GraphInfo, batch_size: int, seq_len: int) -> Arrays:
    """Make normal activations, and ids that count up as in a prompt."""
    rng = np.random.default_rng(0)
    sizes = {"batch_size": batch_size, "seq_len": seq_len}

    def make(info: TensorInfo) -> Array:
        shape = [sizes.get(d, HEADS) if isinstance(d, str) else d for d in info.shape]
        if info.name == "seq_len":
            return np.array(seq_len)
        if info.limits is not None:
            return np.broadcast_to(np.arange(seq_len), shape).copy()
        return rng.standard_normal(shape, dtype=np.float32).astype(make_dtype(info.dtype))

    return {info.name: make(info) for info in graph.inputs}


def _fit_sizes(manifest: Manifest, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Change (batch_size, seq_len) to what a model accepts, each once."""
    max_size, min_size = manifest.graphs[GRAPH].max_size, manifest.graphs[GRAPH].min_size
    shapes = [
        (max(batch, min_size.get(BATCH, 1)), max(seq, min_size.get(SEQ, 1)))
        for batch, seq in shapes
    ]
    rows, length = max_size.get(BATCH, 1 << 30), max_size.get(SEQ, 1 << 30)
    longest = min(length, manifest.config["max_positions"] or length)
    least, shortest = min_size.get(BATCH, 1), min_size.get(SEQ, 1)
    fitted = ((max(min(b, rows), least), max(min(s, longest), shortest)) for b, s in shapes)
    return list(dict.fromkeys(fitted))


def _make_model_inputs(
    manifest: Manifest, batch_size: int, seq_len: int, run: Run | None
) -> dict[str, torch.Tensor]:
    """Make inputs of one size, by name; the other sizes are those that were traced."""
    infos = manifest.graphs[GRAPH].inputs
    sizes = manifest.config["traced_sizes"] | {BATCH: batch_size, SEQ: seq_len}
    case = make_case(infos, read_sources(manifest), CaseSpec(sizes), run)
    return {info.name: value for info, value in zip(infos, case.tensors, strict=True)}
