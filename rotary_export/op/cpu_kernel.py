"""The op library's kernel on torch tensors in CPU memory: plain pointers, no link to libtorch.

`csrc/rotary_export.h` documents `RotaryExportRotate` and `RotaryExportRotateTeam`, which this file
calls. The threads of a team run compiled code alone: no exception can end one before its rows are
written, as Ctrl-C could end Python code.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from rotary_export.errors import RotaryExportError
from rotary_export.op import library as op_library  # standard library only
from rotary_export.op import spec

_TYPES = {  # ONNX's numbers
    torch.float32: 1,
    torch.int64: 7,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
_MAX_RANK = 8
_MESSAGE_SIZE = 1024

# From here on, malloc takes memory fresh from the system, zeroed page by page.
_FRESH_BYTES = 2**23

# Bytes of query and key per thread below which starting a thread costs more than it saves.
_THREAD_BYTES = 2**21


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * _MAX_RANK),
        ("strides", ctypes.c_int64 * _MAX_RANK),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.POINTER(_Tensor)) for name in (*spec.INPUTS, *spec.OUTPUTS)),
        *((name, ctypes.c_int64) for name in spec.ATTRIBUTES),
    )


class _Team(ctypes.Structure):
    _fields_ = (
        ("call", ctypes.POINTER(_Call)),
        *((name, ctypes.c_int64) for name in ("parts", "begun", "ended", "failed")),
        ("message", ctypes.c_char * _MESSAGE_SIZE),
    )
    tensors: Sequence[Tensor]  # Keeps the memory that the threads use.


_PROCESS = os.getpid()


@functools.cache
def _load_process() -> ctypes.CDLL:
    """Return the process's own symbols: all libraries loaded so far, libc included."""
    return ctypes.CDLL(None)


@functools.cache
def _find_openmp() -> ctypes.CDLL | None:
    """Return GNU's OpenMP as torch loaded it; None if torch uses other threads."""
    loaded = _load_process()
    if not torch.backends.openmp.is_available() or not hasattr(loaded, "GOMP_parallel"):
        return None
    loaded.GOMP_parallel.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
    )
    loaded.GOMP_parallel.restype = None
    return loaded


@functools.cache
def _find_library() -> ctypes.CDLL | None:
    """Return the op library; None if it is not installed or can't be loaded."""
    try:
        return op_library.load_library()
    except RotaryExportError:
        return None


def can_rotate(inputs: Sequence[Tensor | None]) -> bool:
    """Whether the library is usable and all inputs are strided tensors in CPU memory."""
    return _find_library() is not None and all(
        t is None or (t.device.type == "cpu" and t.layout == torch.strided) for t in inputs
    )


def rotate(inputs: Sequence[Tensor | None], attributes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Run the op on checked inputs for which `can_rotate`.

    It uses as many threads as torch does (`torch.get_num_threads`) where the tensors are large.

    Args:
        inputs: In the order of `spec.INPUTS`. X and key are copied first if they are strided in
            the last dimension; tables and ids if they are not contiguous.
        attributes: In the order of `spec.ATTRIBUTES`.

    Returns:
        Y and key_out, contiguous; without a key, key_out is empty, of shape (0,).

    Raises:
        RotaryExportError: An id is outside the tables, or ROTARY_EXPORT_ISA names an instruction
            set that this machine does not have.
    """
    given = dict(zip(spec.INPUTS, inputs, strict=True))
    tensors = {name: _make_readable(name, t) for name, t in given.items() if t is not None}
    x, key = tensors["X"], tensors.get("key")
    y, key_out = _allocate_like(x), x.new_empty(0)
    tensors["Y"] = y
    if key is not None:
        tensors["key_out"] = key_out = _allocate_like(key)
    call = _Call(*(_describe(tensors.get(name)) for name in (*spec.INPUTS, *spec.OUTPUTS)))
    for name, value in zip(spec.ATTRIBUTES, attributes, strict=True):
        setattr(call, name, int(value))
    count = (y.numel() + key_out.numel()) * x.element_size() // _THREAD_BYTES
    parts = min(count, torch.get_num_threads())
    if parts > 1:
        _rotate_in_threads(call, parts, [*tensors.values()])
    else:
        _rotate_here(call)
    return y, key_out


def _make_readable(name: str, tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)  # with plain strides
    if name in ("X", "key") and tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def _allocate_like(x: Tensor) -> Tensor:
    """Return contiguous memory; Linux is advised to use large pages for fresh memory.

    Fresh memory costs more than the rotation: the system zeroes it, with a page fault for every
    4 KiB. Memory that the allocator kept is resident already, and advice would only take time.
    """
    y = torch.empty(x.shape, dtype=x.dtype)
    size = y.numel() * y.element_size()
    if sys.platform == "linux" and size >= _FRESH_BYTES:
        start = -(-y.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = y.data_ptr() + size - start
        if not _is_resident(start + length // 2):
            # Only advice: the return value does not matter.
            _load_process().madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE
            )
    return y


def _is_resident(address: int) -> bool:
    """Whether the page of an address is resident; False if unknown."""
    page = address // mmap.PAGESIZE * mmap.PAGESIZE
    state = ctypes.c_ubyte(0)
    _load_process().mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), ctypes.byref(state))
    return bool(state.value & 1)


def _describe(tensor: Tensor | None) -> ctypes._Pointer[_Tensor] | None:
    if tensor is None:
        return None
    dims = ctypes.c_int64 * _MAX_RANK
    return ctypes.pointer(
        _Tensor(
            tensor.data_ptr(),
            _TYPES[tensor.dtype],
            tensor.dim(),
            dims(*tensor.shape),
            dims(*tensor.stride()),
        )
    )


def _load_library() -> ctypes.CDLL:
    library = _find_library()
    assert library is not None  # `can_rotate`
    return library


def _rotate_here(call: _Call) -> None:
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    if _load_library().RotaryExportRotate(ctypes.byref(call), message, _MESSAGE_SIZE):
        raise RotaryExportError(message.value.decode())


def _rotate_in_threads(call: _Call, parts: int, tensors: Sequence[Tensor]) -> None:
    """Rotate in up to `parts` threads, this one included; return when all have ended.

    These are torch's own OpenMP threads if torch has them: idle, they would spin for some time
    after each of torch's operators, on the cores that ours need. They do not survive a fork.
    """
    rotate_team = _load_library().RotaryExportRotateTeam
    team = _Team(ctypes.pointer(call), parts)
    team.tensors = tensors
    try:
        openmp = _find_openmp()
        if openmp is not None and os.getpid() == _PROCESS:
            openmp.GOMP_parallel(rotate_team, ctypes.byref(team), parts, 0)
        else:
            for _ in range(parts - 1):
                threading.Thread(target=rotate_team, args=(ctypes.byref(team),)).start()
    finally:  # Rotates what no thread has begun, and waits for the others.
        rotate_team(ctypes.byref(team))
    if team.failed:
        raise RotaryExportError(team.message.decode())
