"""Read a model to fuse; refuse what is not a model, is damaged, or is too new or too old."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnxscript import ir

from rotary_export.bundle.paths import check_path
from rotary_export.compat.quiet import quiet_torch
from rotary_export.errors import RotaryExportError, first_line
from rotary_export.fusion.sort_nodes import sort_nodes
from rotary_export.op import spec
from rotary_export.op.onnx_signature import OLDEST_OPSET
from rotary_export.runtime.onnx_file import check_location

Model = onnx.ModelProto | str | os.PathLike[str]
SMALL = 1024  # bytes of a tensor that is loaded, although it is in external data

# ONNX Runtime writes it, into files that it saves, for each domain of a registered op library.
ORT_CUSTOM_VERSION = 1000


@contextmanager
def explain(model: Model, what: str) -> Iterator[None]:
    """Turn what onnx-ir and the rules raise for a damaged model into one clear error.

    Args:
        model: As `read_model`.
        what: What such an error means.

    Raises:
        RotaryExportError: Naming the model and what was found.
    """
    try:
        with quiet_torch():  # onnx-ir's logger too, and onnxscript's
            yield
    except RotaryExportError:
        raise
    except Exception as error:  # SerdeError, RuntimeError, TypeError, ... by the damage
        cause: BaseException = error
        while cause.__cause__ is not None:  # onnx-ir reports first what it found, last where
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        raise RotaryExportError(f"{_name(model)} {what}: {reason}") from error


def _name(model: Model) -> str:
    return "the model" if isinstance(model, onnx.ModelProto) else str(model)


def read_model(model: Model) -> ir.Model:
    """Read a model or a file; external data stays where it is.

    Raises:
        RotaryExportError: It is not a model that can be fused here, or external data is missing.
    """
    name = _name(model)
    if isinstance(model, onnx.ModelProto):
        proto = model
    elif not isinstance(model, (str, os.PathLike)):
        raise RotaryExportError(
            f"model must be an onnx.ModelProto or a path, got {type(model).__name__}"
        )
    else:
        check_path(model)
        try:
            proto = onnx.load(model, load_external_data=False)
        except DecodeError:
            raise RotaryExportError(f"{name} is not an ONNX file") from None
        except OSError as error:
            raise RotaryExportError(f"{name} can't be read: {error.strerror or error}") from None
    versions = {o.domain: o.version for o in proto.opset_import}
    opset = versions.get("", versions.get("ai.onnx"))
    newest = onnx.defs.onnx_opset_version()
    if opset is None or not proto.graph.node:
        raise RotaryExportError(f"{name} is not an ONNX model: it has no ai.onnx opset or no nodes")
    if opset > newest or proto.ir_version > onnx.IR_VERSION:
        raise RotaryExportError(
            f"{name} has opset {opset} and IR version {proto.ir_version}; the installed onnx "
            f"{onnx.__version__} supports up to {newest} and {onnx.IR_VERSION}"
        )
    own = versions.get(spec.DOMAIN, 0)
    if own > spec.OP_VERSION and own != ORT_CUSTOM_VERSION:
        raise RotaryExportError(
            f"{name} has version {own} of {spec.DOMAIN}, this release supports up to "
            f"{spec.OP_VERSION}"
        )
    if opset < OLDEST_OPSET:
        raise RotaryExportError(
            f"{name} has opset {opset}, it must be >= {OLDEST_OPSET}: "
            "onnx.version_converter raises it"
        )
    proto = sort_nodes(proto, name)
    with explain(model, "is damaged"):
        source = ir.serde.deserialize_model(proto)
        if own == ORT_CUSTOM_VERSION:
            source.graph.opset_imports[spec.DOMAIN] = spec.OP_VERSION
    if not isinstance(model, onnx.ModelProto):
        folder = Path(model).absolute().parent
        ir.external_data.set_base_dir(source.graph, folder)
        _check_external(source, name)
    elif has_external(source):
        raise RotaryExportError(
            "the model has external data, which a ModelProto does not locate: pass its path"
        )
    return source


def load_small_tensors(model: ir.Model) -> None:
    """Load the small tensors of external data, in place.

    Sizes, axes and slices are among them, which shape inference and constant folding read.
    """
    for value in list_initializers(model):
        if _is_small(value.const_value):
            value.const_value = _load(value.const_value)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if _is_small(attribute.value):
                node.attributes[name] = ir.AttrTensor(name, _load(attribute.value))


def _is_small(tensor: object) -> bool:
    return isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= SMALL


def _load(tensor: Any) -> ir.Tensor[Any]:
    return ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)


def list_initializers(model: ir.Model) -> list[ir.Value]:
    """List the initializers of a model, those of its subgraphs among them."""
    return [value for graph in model.graphs() for value in graph.initializers.values()]


def list_files(model: Model, source: ir.Model) -> tuple[Path, ...]:
    """List the files that a model was read from, or still is."""
    if isinstance(model, onnx.ModelProto):
        return ()
    data = {Path(tensor.path).absolute() for tensor in list_external_tensors(source)}
    return (Path(model).absolute(), *sorted(data))


def list_external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """List the tensors that are in files of their own."""
    tensors: list[object] = [value.const_value for value in list_initializers(model)]
    tensors += [a.value for n in model.graph.all_nodes() for a in n.attributes.values()]
    return [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]


def has_external(model: ir.Model) -> bool:
    """Return whether some weights are in files of their own."""
    return bool(list_external_tensors(model))


def _check_external(model: ir.Model, name: str) -> None:
    ends: dict[str, int] = {}
    for tensor in list_external_tensors(model):
        check_location(str(tensor.location), name)
        end = (tensor.offset or 0) + (tensor.length or 0)
        ends[str(tensor.path)] = max(end, ends.get(str(tensor.path), 0))
    for path, end in ends.items():
        if not os.path.isfile(path):
            raise RotaryExportError(f"the external data of {name} is missing: {path}")
        if os.path.getsize(path) < end:
            raise RotaryExportError(
                f"the external data of {name} is cut off: {path} has {os.path.getsize(path)} "
                f"bytes, {end} are needed"
            )
