"""`signature.txt`: inputs, outputs and limits of a graph, for programs without a JSON parser."""

from __future__ import annotations

from pathlib import Path

from rotary_export.bundle.manifest import Manifest


def write_signature(staging: Path, manifest: Manifest, graph: str) -> None:
    """Write a line for each input and output, and limit.

    `input NAME DTYPE DIM... [in LOW HIGH]`, `output NAME`, and `max_size DIM SIZE`, `min_size DIM
    SIZE` for axes of limited size. A sum or a multiple of sizes is written without spaces. HIGH is
    the largest legal value.

    Args:
        staging: The folder to write it in.
        manifest: Of the bundle.
        graph: Which graph.
    """
    info = manifest.graphs[graph]
    lines = []
    for tensor in info.inputs:
        words = ["input", tensor.name, tensor.dtype]
        words += [str(dim).replace(" ", "") for dim in tensor.shape]
        if tensor.limits is not None:
            words += ["in", *map(str, tensor.limits)]
        lines.append(" ".join(words))
    lines += [f"output {tensor.name}" for tensor in info.outputs]
    lines += [f"max_size {dim} {size}" for dim, size in info.max_size.items()]
    lines += [f"min_size {dim} {size}" for dim, size in info.min_size.items()]
    (staging / "signature.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
