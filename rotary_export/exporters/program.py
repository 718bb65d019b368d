"""`.pt2`: a torch.export program of aten ops only, which loads without rotary_export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotary_export.compat.quiet import quiet_torch
from rotary_export.graphs.graph import Graph
from rotary_export.op.torch_op import rotary_embedding_aten


def make_dynamic_shapes(graph: Graph) -> tuple[dict[int, Any], ...]:
    """Return torch.export's dynamic_shapes: one `Dim` per name, wherever it stands."""
    names = {d for info in graph.inputs for d in info.shape if isinstance(d, str)}
    dims = {name: torch.export.Dim(name) for name in names}
    return tuple(
        {axis: dims[d] for axis, d in enumerate(info.shape) if isinstance(d, str)}
        for info in graph.inputs
    )


def export_program(graph: Graph, example: tuple[Tensor, ...], path: Path) -> None:
    """Write one graph as a `.pt2` file.

    Args:
        graph: What to export.
        example: Inputs to trace with.
        path: The file to write.
    """
    with quiet_torch():
        program = torch.export.export(
            graph.module, example, dynamic_shapes=make_dynamic_shapes(graph), strict=False
        )
    save_program(program, path)


def save_program(program: Any, path: Path) -> None:
    """Write a traced program as a `.pt2` file of aten ops only.

    Args:
        program: A `torch.export.ExportedProgram`; it is not changed.
        path: The file to write.
    """
    with quiet_torch():
        op = torch.ops.rotary_export.rotary_embedding.default
        program = program.run_decompositions({op: rotary_embedding_aten})
        program.example_inputs = None  # they would be stored
        for node in program.graph.nodes:  # stack traces and where each node came from
            node.meta = {key: value for key, value in node.meta.items() if key == "val"}
        torch.export.save(program, path)
