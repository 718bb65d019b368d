"""Every way to run a graph of a bundle, and the tables that its files store; for `parity`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.exporters.graphs import Graph
from rotary_export.exporters.onnx import ZETA
from rotary_export.exporters.program import quiet_torch
from rotary_export.manifest import GraphInfo, Manifest
from rotary_export.op.reference_op import RotaryEmbedding as ReferenceRotaryEmbedding
from rotary_export.op.spec import DOMAIN, OP_TYPE
from rotary_export.runtime.load import open_session
from rotary_export.runtime.machine import find_refusal
from rotary_export.runtime.providers import CPU, import_onnxruntime, library_refusal
from rotary_export.runtime.session import make_bfloat16

Array = np.ndarray[Any, np.dtype[Any]]

STORED = ("inv_freq", "scale", "cos_cache", "sin_cache", "scale_cache")


def to_numpy(tensor: Tensor) -> Array:
    """Return a tensor as numpy; bfloat16 as float32, which holds it exactly."""
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def read_constants(path: Path, info: GraphInfo) -> dict[str, dict[str, Array]]:
    """Read the tables that a graph's files store.

    Args:
        path: The bundle's folder.
        info: The graph.

    Returns:
        By format, but for `aoti`, arrays by buffer name.
    """
    constants: dict[str, dict[str, Array]] = {}
    for kind, file in info.files.items():
        if kind == "aoti":
            continue  # machine code; the program that it was compiled from is there too
        if kind == "onnx":
            initializers = onnx.load(path / file).graph.initializer
            arrays = {t.name: numpy_helper.to_array(t) for t in initializers}
            if ZETA in arrays:
                arrays["scale"] = arrays[ZETA]
        elif kind == "torchscript":
            with quiet_torch():
                module = torch.jit.load(path / file)
            arrays = {name: buffer.numpy() for name, buffer in module.named_buffers()}
        else:
            with quiet_torch():
                program = torch.export.load(path / file)
            tensors = {**program.state_dict, **program.constants}
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        constants[kind] = {name: arrays[name].copy() for name in STORED if name in arrays}
    return constants


def check_rotary_nodes(path: Path, info: GraphInfo) -> None:
    """Compare what a manifest says of the rotary nodes of a graph with its ONNX file.

    Args:
        path: The bundle's folder.
        info: The graph.

    Raises:
        CheckFailedError: There are more or fewer of them, or their bodies are of the other kind.
    """
    if "onnx" not in info.files:
        return
    model = onnx.load(path / info.files["onnx"], load_external_data=False)
    bodies = [f for f in model.functions if (f.domain, f.name) == (DOMAIN, OP_TYPE)]
    nodes = sum((node.domain, node.op_type) == (DOMAIN, OP_TYPE) for node in model.graph.node)
    is_native = bool(bodies) and all(OP_TYPE in [n.op_type for n in f.node] for f in bodies)
    found = (nodes, "native" if is_native else "primitive")
    if found != (info.rotary_nodes, info.portable):
        raise CheckFailedError(
            f"{info.files['onnx']} has {found[0]} rotary nodes of {found[1]} bodies, the manifest "
            f"says {info.rotary_nodes} of {info.portable}"
        )


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
            "ONNX Runtime, portable", "onnxruntime", providers=[CPU], use_op_library=False
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
