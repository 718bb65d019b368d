"""What `verify`, `bench` and `deploy` need to know of the inputs of an ONNX file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from onnxscript import ir

from rotary_export.bundle.manifest import GraphInfo, Manifest
from rotary_export.fusion.check.feeds import SHAPES, Shape, count_rows, make_feeds
from rotary_export.fusion.read import read_model
from rotary_export.fusion.rules.join import is_rotary
from rotary_export.fusion.values import read_dims
from rotary_export.proof.models.input_values import choose_values, find_tables, write_input_values
from rotary_export.runtime.onnx_file import GRAPH, read_onnx_file
from rotary_export.runtime.session import check_session_inputs
from rotary_export.types import Array

_SELECT = {"Gather", "GatherElements", "GatherND", "Slice"}


def describe_file(path: Path) -> Manifest:
    """Describe a file as `read_onnx_file`, with the config that a model's manifest has.

    Raises:
        RotaryExportError: It can't be read, or the names of its sizes contradict each other.
    """
    manifest = read_onnx_file(path)
    model = read_model(path)
    return replace(manifest, config=make_config(model, manifest.graphs[GRAPH]))


def make_config(model: ir.Model, info: GraphInfo) -> dict[str, Any]:
    """Return where the values of each input come from, and at which sizes they were drawn.

    Args:
        model: The file.
        info: Its inputs.
    """
    feeds = make_feeds(model.graph, SHAPES[0])
    rows = {value.name: count_rows(value) for value in model.graph.inputs}
    longest = find_max_positions(model)
    made = {tensor.name: _to_torch(feeds[tensor.name]) for tensor in info.inputs}
    tables = find_tables(made)
    sources = {}
    for tensor in info.inputs:
        name, count = tensor.name, rows.get(tensor.name)
        limits = None if count is None else (0, count - 1)
        sources[name] = choose_values(name, made[name], tensor.shape, limits, name in tables)
    return {
        "traced_sizes": find_sizes(info, feeds),
        "length_thresholds": [],
        "max_positions": longest,
        "last_position": longest,
        "sizes_to_verify": [],
        "unverified": [],
        "mismatched": [],
        "left_out": {},
        "seed": 0,
        "input_values": write_input_values(sources),
        "cases": [],
    }


def draw_sizes(model: ir.Model, info: GraphInfo, shape: Shape) -> dict[str, int]:
    """Return the sizes of all dynamic axes at a shape of the comparison."""
    return find_sizes(info, make_feeds(model.graph, shape))


def find_sizes(info: GraphInfo, feeds: Mapping[str, Array]) -> dict[str, int]:
    """Return the sizes of the dynamic axes of inputs.

    Raises:
        RotaryExportError: One name has two sizes.
    """
    return check_session_inputs(GRAPH, info, feeds)


def _to_torch(value: Array) -> torch.Tensor:
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.astype("float32")).bfloat16()
    return torch.from_numpy(value)


def find_max_positions(model: ir.Model) -> int | None:
    """Return the rows of the shortest stored table of a rotary node; None: none is stored."""
    found = []
    for node in model.graph.all_nodes():
        if is_rotary(node):
            cos, ids = node.inputs[1], node.inputs[3] if len(node.inputs) > 3 else None
            found += [_count_stored(cos)] if ids is not None else list(_list_selected(cos))
    positions = [value for value in model.graph.inputs if "position" in (value.name or "")]
    found += [count_rows(value) for value in positions]
    rows = [count for count in found if count is not None]
    return min(rows, default=None)


def _list_selected(table: ir.Value | None) -> Iterator[int | None]:
    """Yield the rows of the stored tables of which a table is a selection."""
    waiting, seen = [table], set()
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if value is None or node is None or value in seen:
            continue
        seen.add(value)
        if node.op_type in _SELECT and _count_stored(node.inputs[0]) is not None:
            yield _count_stored(node.inputs[0])
        elif node.op_type != "Shape":
            waiting += node.inputs


def _count_stored(value: ir.Value | None) -> int | None:
    """Return the rows of a stored table, (M, channels); None: it is something else."""
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    stored = value.is_initializer() if node is None else node.op_type == "Constant"
    dims = read_dims(value)
    if not stored or dims is None or len(dims) < 2 or not isinstance(dims[-2], int):
        return None
    return dims[-2] if dims[-2] > 1 else None
