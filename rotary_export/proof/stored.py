"""What the files of a bundle store: tables by format, and rotary nodes."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import numpy_helper

from rotary_export.bundle.manifest import GraphInfo
from rotary_export.compat.quiet import quiet_torch
from rotary_export.errors import CheckFailedError
from rotary_export.graphs.plain import ZETA
from rotary_export.op.onnx_graph import count_rotary_nodes
from rotary_export.op.spec import DOMAIN, OP_TYPE
from rotary_export.types import Array

STORED = ("inv_freq", "scale", "cos_cache", "sin_cache", "scale_cache")


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
            continue  # machine code; the bundle also contains the program
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
    """Compare the rotary nodes in a manifest with those in the ONNX file.

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
    is_native = bool(bodies) and all(OP_TYPE in [n.op_type for n in f.node] for f in bodies)
    found = (count_rotary_nodes(model.graph), "native" if is_native else "primitive")
    if found != (info.rotary_nodes, info.function_body):
        raise CheckFailedError(
            f"{info.files['onnx']} has {found[0]} rotary nodes of {found[1]} bodies, the manifest "
            f"names {info.rotary_nodes} of {info.function_body}"
        )
