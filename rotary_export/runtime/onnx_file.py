"""A plain `.onnx` file, described as a manifest describes the graph of a bundle.

What the file names its dynamic sizes, manifests name batch_size, seq_len and past_seq_len. A size
without a name gets one of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from rotary_export.bundle.dims import BATCH, PAST, SEQ, TOTAL
from rotary_export.bundle.manifest import GraphInfo, Manifest, TensorInfo
from rotary_export.bundle.paths import check_path
from rotary_export.errors import RotaryExportError, explain_damage
from rotary_export.op import spec
from rotary_export.op.onnx_graph import count_rotary_nodes, list_graphs
from rotary_export.runtime.load import open_session
from rotary_export.runtime.session import Session

GRAPH = "model"
_TOTAL = re.compile(r"total|past.*(\+|plus|and)")
_CACHE = re.compile(r"past|cache")
_IDS = re.compile(r"ids$|^tokens?$")


def is_onnx_file(path: Path) -> bool:
    """Return whether a path is that of a plain file, not of a bundle."""
    return path.suffix == ".onnx" and not path.is_dir()


def read_onnx_file(path: Path) -> Manifest:
    """Describe a file; its weights are not read.

    Args:
        path: An `.onnx` file.

    Returns:
        A manifest with the one graph "model". It has no hashes, no proof and an empty config.

    Raises:
        RotaryExportError: It does not exist, is not an ONNX file, or has an input or output that is
            not a tensor of numbers.
    """
    import onnx
    from google.protobuf.message import DecodeError

    check_path(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        reason = f"can't be read: {error.strerror}" if isinstance(error, OSError) else ""
        raise RotaryExportError(f"{path} {reason or 'is not an ONNX file'}") from None
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if opset is None or not model.graph.node:
        raise RotaryExportError(f"{path} is not an ONNX model: it has no ai.onnx opset or no nodes")
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [_read_tensor(v) for v in model.graph.input if v.name not in stored]
    if not all(v.type.tensor_type.HasField("shape") for v in model.graph.output):
        with explain_damage(f"{path} can't be read"):
            model = onnx.shape_inference.infer_shapes(model)
    outputs = [_read_tensor(v, is_output=True) for v in model.graph.output]
    names = name_dims(inputs)
    bodies = [f for f in model.functions if (f.domain, f.name) == (spec.DOMAIN, spec.OP_TYPE)]
    native = [_is_native(body) for body in bodies]
    graph = GraphInfo(
        tuple(_rename(info, names) for info in inputs),
        tuple(_rename(info, names) for info in outputs),
        {"onnx": path.name},
        count_rotary_nodes(model.graph),
        "native" if native and all(native) else "primitive",
    )
    floating = [info.dtype for info in (*outputs, *inputs) if "float" in info.dtype]
    return Manifest(
        name=path.stem,
        config={},
        dtype=floating[0] if floating else "float32",
        opset=opset,
        graphs={GRAPH: graph},
        minimum_onnxruntime={
            "fused": "1.20",
            "portable": spec.MINIMUM_NATIVE_ORT if any(native) else "1.0",
        },
        producers={},
    )


def check_location(location: str, file: str) -> None:
    """Refuse external data outside the folder of its file.

    Args:
        location: Of the data, as the file has it.
        file: Name of the file.

    Raises:
        RotaryExportError: It is absolute, or leads out of the folder.
    """
    path = PurePath(location)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise RotaryExportError(
            f"the external data of {file} must be in its folder, got the location {location!r}"
        )


def check_locations(model: Any, file: str) -> None:
    """Check the location of each tensor of an `onnx.ModelProto`; as `check_location`."""
    for graph in list_graphs(model.graph):
        constants = [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
        for tensor in (*graph.initializer, *constants):
            for entry in tensor.external_data:
                if entry.key == "location":
                    check_location(entry.value, file)


def load_onnx_file(
    path: Path,
    providers: str | Sequence[str] = "auto",
    use_op_library: bool | str = "auto",
    require_fused: bool = False,
) -> Session:
    """Load a file; arguments as `load`."""
    manifest = read_onnx_file(path)
    return open_session(
        path.parent, manifest, GRAPH, "onnxruntime", providers, use_op_library, require_fused
    )


def _is_native(body: Any) -> bool:
    return spec.OP_TYPE in [node.op_type for node in body.node]


def _read_tensor(value: Any, is_output: bool = False) -> TensorInfo:
    """Read what a file declares; an output of unknown rank has one unknown size for its shape."""
    import onnx

    tensor = value.type.tensor_type
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:
        dtype = "object"
    if not value.type.HasField("tensor_type") or dtype == "object":
        raise RotaryExportError(f"{value.name} must be a tensor of numbers")
    if not tensor.HasField("shape"):
        if not is_output:
            raise RotaryExportError(f"the input {value.name} must be a tensor of known rank")
        return TensorInfo(value.name, dtype, (f"{value.name}_shape",))
    dims = [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_{axis}"
        for axis, dim in enumerate(tensor.shape.dim)
    ]
    return TensorInfo(value.name, dtype, tuple(dims))


def name_dims(inputs: Iterable[TensorInfo]) -> dict[str, str]:
    """Choose a manifest's name for each dynamic size of a file; others keep their own.

    1. By the name of the size: batch, sequence_length, past_sequence_length, total_sequence_length.
    2. By the input: the two sizes of ids, the rows of a cache, the last size of a mask.
    """
    kinds: dict[str, str] = {}
    for info in inputs:
        for axis, dim in enumerate(info.shape):
            if isinstance(dim, str) and not kinds.get(dim):
                kinds[dim] = _find_kind(dim.lower()) or _find_kind_by_input(info, axis)
    found: dict[str, str] = {}
    for wanted in (BATCH, SEQ, PAST):  # the first of a kind: two may be different sizes
        found |= {dim: wanted for dim in [d for d, kind in kinds.items() if kind == wanted][:1]}
    total = TOTAL if PAST in found.values() else SEQ
    if SEQ in found.values():
        found |= {dim: total for dim, kind in kinds.items() if kind == TOTAL}
    return found


def _find_kind(dim: str) -> str:
    if "batch" in dim:
        return BATCH
    if _TOTAL.search(dim):
        return TOTAL
    if "past" in dim:
        return PAST
    return SEQ if "seq" in dim or "len" in dim else ""


def _find_kind_by_input(info: TensorInfo, axis: int) -> str:
    """Return what a size is whose name tells nothing."""
    if axis == 0:
        return BATCH
    if "mask" in info.name and axis == len(info.shape) - 1:
        return TOTAL
    if _CACHE.search(info.name):
        return PAST
    return SEQ if len(info.shape) == 2 and _IDS.search(info.name) else ""


def _rename(info: TensorInfo, names: Mapping[str, str]) -> TensorInfo:
    dims = [names.get(dim, dim) if isinstance(dim, str) else dim for dim in info.shape]
    return TensorInfo(info.name, info.dtype, tuple(dims))
