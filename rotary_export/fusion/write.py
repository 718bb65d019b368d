"""Files with external data: the data is named by its content, so that two files are never mixed."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from onnxscript import ir

from rotary_export.bundle.manifest import DATA_SUFFIX, hash_file
from rotary_export.bundle.paths import cut_name
from rotary_export.fusion.read import list_external_tensors, list_initializers

_HASH_DIGITS = 16
_INLINE_BYTES = 256  # smaller tensors stay in the graph
_SUFFIX = ".data"
_NAME_BYTES = 255 - _HASH_DIGITS - len(f".{_SUFFIX}")  # of the file's name in that of its data


def write_external(model: ir.Model, file: Path) -> None:
    """Write a model, and its weights beside it into `NAME.HASH.data`.

    Args:
        model: Its weights may be external; they then become those that are written.
        file: The file NAME, in a folder that is being made.
    """
    data = file.with_name("data" if file.name != "data" else "weights")
    ir.external_data.unload_from_model(
        model, file.parent, data.name, size_threshold_bytes=_INLINE_BYTES
    )
    name = f"{cut_name(file.name, _NAME_BYTES)}.{hash_file(data)[:_HASH_DIGITS]}{_SUFFIX}"
    for value in list_initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name or "",
                base_dir=file.parent,
            )
    data.rename(file.with_name(name))
    ir.save(model, file)


def list_data(path: Path) -> set[Path]:
    """Return the external data that a file names, if it belongs to that file alone.

    This is `NAME.HASH.data`, and `NAME.data` or `NAME_data` as other exporters write it.
    """
    if not path.is_file():
        return set()
    try:
        model = ir.serde.deserialize_model(onnx.load(path, load_external_data=False))
    except Exception:  # it is replaced, whatever it is
        return set()
    own = rf"{re.escape(cut_name(path.name, _NAME_BYTES))}\.[0-9a-f]{{{_HASH_DIGITS}}}"
    pattern = re.compile(
        rf"({own}|{re.escape(path.name)}){re.escape(_SUFFIX)}|"
        rf"{re.escape(path.name)}{re.escape(DATA_SUFFIX)}"
    )
    names = {str(tensor.location) for tensor in list_external_tensors(model)}
    return {path.with_name(name) for name in names if pattern.fullmatch(name)}
