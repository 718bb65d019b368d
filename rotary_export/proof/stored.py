"""What the files of a bundle store: tables by format, and rotary nodes."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import numpy_helper

from rotary_export.bundle.manifest import CODE_FORMATS, GraphInfo
from rotary_export.errors import CheckFailedError
from rotary_export.graphs.plain import ZETA
from rotary_export.op.onnx_graph import count_rotary_nodes
from rotary_export.op.spec import DOMAIN, OP_TYPE
from rotary_export.runtime.onnx_file import check_locations
from rotary_export.runtime.torch_files import open_torch_file
from rotary_export.types import Array

STORED = ("inv_freq", "scale", "cos_cache", "sin_cache", "scale_cache")


def read_constants(path: Path, info: GraphInfo, *, allow_code: bool) -> dict[str, dict[str, Array]]:
    """Read the tables that a graph's files store.

    Args:
        path: The bundle's folder.
        info: The graph.
        allow_code: Open the files whose code may run, too.

    Returns:
        By format, but for `aoti`, arrays by buffer name.
    """
    constants: dict[str, dict[str, Array]] = {}
    for kind, file in info.files.items():
        if kind == "aoti" or (kind in CODE_FORMATS and not allow_code):
            continue  # of machine code the bundle also contains the program
        if kind == "onnx":
            initializers = onnx.load(path / file).graph.initializer
            arrays = {t.name: numpy_helper.to_array(t) for t in initializers}
            if ZETA in arrays:
                arrays["scale"] = arrays[ZETA]
        elif kind == "torchscript":
            module = open_torch_file(path / file, kind)
            arrays = {name: buffer.numpy() for name, buffer in module.named_buffers()}
        else:
            program = open_torch_file(path / file, kind)
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
    check_locations(model, info.files["onnx"])
    bodies = [f for f in model.functions if (f.domain, f.name) == (DOMAIN, OP_TYPE)]
    is_native = bool(bodies) and all(OP_TYPE in [n.op_type for n in f.node] for f in bodies)
    found = (count_rotary_nodes(model.graph), "native" if is_native else "primitive")
    if found != (info.rotary_nodes, info.function_body):
        raise CheckFailedError(
            f"{info.files['onnx']} has {found[0]} rotary nodes of {found[1]} bodies, the manifest "
            f"names {info.rotary_nodes} of {info.function_body}"
        )
