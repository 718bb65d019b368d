"""Every way to run a graph of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from rotary_export.bundle.manifest import GraphInfo, Manifest
from rotary_export.errors import RotaryExportError
from rotary_export.graphs.graphs import Graph
from rotary_export.op.onnx_reference import RotaryEmbedding as ReferenceRotaryEmbedding
from rotary_export.runtime.compiled import find_refusal
from rotary_export.runtime.load import open_session
from rotary_export.runtime.providers import CPU, import_onnxruntime, library_refusal
from rotary_export.runtime.session import make_bfloat16

Array = np.ndarray[Any, np.dtype[Any]]


def to_numpy(tensor: Tensor) -> Array:
    """Return a tensor as numpy; bfloat16 as float32, which holds it exactly."""
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@dataclass(frozen=True)
class Runner:
    """One way to run a graph.

    Attributes:
        name: For people.
        kernel_path: As `Session.kernel_path`; "eager" and "reference" besides.
        run: From the inputs in order to the outputs in order; bfloat16 as float32.
    """

    name: str
    kernel_path: str
    run: Callable[[tuple[Tensor, ...]], list[Array]]


def open_runners(
    path: Path, manifest: Manifest, graph: Graph, skipped: dict[str, str]
) -> Iterator[Runner]:
    """Open every runtime that is here for every format of a graph.

    Args:
        path: The bundle's folder.
        manifest: Its manifest.
        graph: The graph, with eager's module.
        skipped: Gets the runtimes that are not here, and why.

    Yields:
        Runners, eager first.
    """
    info = manifest.graphs[graph.name]

    def eager(case: tuple[Tensor, ...]) -> list[Array]:
        with torch.no_grad():
            return [to_numpy(value) for value in graph.module(*case)]

    def open_runner(name: str, runtime: str, **options: Any) -> Runner:
        session = open_session(path, manifest, graph.name, runtime, **options)

        def run(case: tuple[Tensor, ...]) -> list[Array]:
            inputs = {i.name: value for i, value in zip(graph.inputs, case, strict=True)}
            return [to_numpy(value) for value in session(**inputs).values()]

        return Runner(name, session.kernel_path, run)

    yield Runner("eager", "eager", eager)
    if "torchscript" in info.files:
        yield open_runner("TorchScript", "torchscript")
    if "program" in info.files:
        yield open_runner("torch.export", "program")
    if "aoti" in info.files:
        refusal = find_refusal(manifest.compiled_for)
        if refusal:
            skipped["AOTInductor"] = refusal
        else:
            yield open_runner("AOTInductor", "aoti")
    if "onnx" in info.files:
        try:
            import_onnxruntime()
        except RotaryExportError as error:
            skipped["ONNX Runtime"] = str(error)
            yield open_reference(path / info.files["onnx"], graph)
            return
        refusal = library_refusal([CPU], "auto")
        if refusal:
            skipped["ONNX Runtime, op library"] = refusal
        elif info.rotary_nodes:
            yield open_runner("ONNX Runtime, op library", "onnxruntime", providers=[CPU])
        yield open_runner(
            "ONNX Runtime, function body", "onnxruntime", providers=[CPU], use_op_library=False
        )
        yield open_reference(path / info.files["onnx"], graph)


def open_reference(file: Path, graph: Graph | GraphInfo) -> Runner:
    """Open an ONNX file with onnx.reference, which runs bfloat16 too; it is slow."""
    evaluator = ReferenceEvaluator(str(file), new_ops=[ReferenceRotaryEmbedding])

    def run(case: tuple[Tensor, ...]) -> list[Array]:
        feeds = {}
        for info, value in zip(graph.inputs, case, strict=True):
            array = to_numpy(value)
            feeds[info.name] = array.astype(make_bfloat16()) if info.dtype == "bfloat16" else array
        outputs: Any = evaluator.run(None, feeds)
        is_half = graph.outputs[0].dtype == "bfloat16"
        return [o.astype(np.float32) if is_half else np.asarray(o) for o in outputs]

    return Runner("onnx.reference", "reference", run)
