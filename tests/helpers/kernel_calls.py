"""Calls the op library's kernel through its C interface, without ONNX Runtime.

A copy of the library reads its environment variables when it is loaded: the instruction set and
from which size on it uses streaming stores. So one process can run every combination.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from helpers.function_bodies import ONNX_TYPES
from helpers.oracles import Tensors

from rotary_export.op import library as op_library
from rotary_export.op import spec

LIBRARY = op_library.op_library_path()


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 8),
        ("strides", ctypes.c_int64 * 8),
    )


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.POINTER(Tensor)) for name in (*spec.INPUTS, *spec.OUTPUTS)),
        *((name, ctypes.c_int64) for name in spec.ATTRIBUTES),
    )


class Team(ctypes.Structure):
    _fields_ = (
        ("call", ctypes.POINTER(Call)),
        *((name, ctypes.c_int64) for name in ("parts", "begun", "ended", "failed")),
        ("message", ctypes.c_char * 1024),
    )


class Kernel(NamedTuple):
    """A copy of the library, loaded with its own settings."""

    name: str
    library: ctypes.CDLL

    def rotate(self, tensors: dict[str, Tensor], **attributes: int) -> str:
        """Call the kernel; return its message, empty on success."""
        call = Call(**attributes)
        for name, tensor in tensors.items():
            setattr(call, name, ctypes.pointer(tensor))
        message = ctypes.create_string_buffer(1024)
        failed = self.library.RotaryExportRotate(ctypes.byref(call), message, len(message))
        assert bool(failed) == bool(message.value)
        return message.value.decode()


def describe(x: torch.Tensor, address: int | None = None) -> Tensor:
    """Return the kernel's description of `x`, or of a tensor like it at `address`."""
    dims = ctypes.c_int64 * 8
    data = x.data_ptr() if address is None else address
    return Tensor(data, ONNX_TYPES[x.dtype], x.dim(), dims(*x.shape), dims(*x.stride()))


def load_kernel(folder: Path, isa: str, streaming_bytes: int | None = None) -> Kernel:
    """Load a copy of the library; with `streaming_bytes` 0 it always uses streaming stores."""
    settings = {"ROTARY_EXPORT_ISA": isa}
    if streaming_bytes is not None:
        settings["ROTARY_EXPORT_STREAMING_BYTES"] = str(streaming_bytes)
    name = isa if streaming_bytes is None else f"{isa}-{streaming_bytes}"
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        library = ctypes.CDLL(shutil.copy(LIBRARY, folder / f"{name}.so"))
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
    library.RotaryExportRotate.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
    return Kernel(name, library)


def instruction_sets(folder: Path) -> list[str]:
    """Return the sets of this machine, which the library lists when asked for an unknown one."""
    message = load_kernel(folder, "none").rotate({})
    return message.split("one of ")[1].split(" on this machine")[0].split(", ")


def make_call(tensors: Tensors, **attributes: int) -> Call:
    """Describe a call. The tensors must outlive it."""
    call = Call(**attributes)
    for name, x in tensors.items():
        setattr(call, name, ctypes.pointer(describe(x)))
    return call


def rotate(tensors: Tensors, **attributes: int) -> str:
    """Call the kernel; return its message, empty on success."""
    call = make_call(tensors, **attributes)
    library = op_library.load_library()
    message = ctypes.create_string_buffer(1024)
    failed = library.RotaryExportRotate(ctypes.byref(call), message, len(message))
    assert bool(failed) == bool(message.value)
    return message.value.decode()
