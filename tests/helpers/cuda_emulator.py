"""Builds cuda_emulator.cc, once per test run, and calls it with torch tensors."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers.kernel_calls import Call, describe, rotate
from helpers.oracles import Tensors, assert_same_bits
from helpers.paths import CSRC

SOURCES = (
    "kernel/element_types",
    "message",
    "kernel/input_checks",
    "cuda/launch_rotation",
    "cuda/launch_plan",
    "ort/rotary_cuda_op",
    "ort/rotary_op",
)


class Statistics(ctypes.Structure):
    _fields_ = (
        ("launches", ctypes.c_int64),
        ("vector_launches", ctypes.c_int64),
        ("largest_grid", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Emulated:
    """The result of a call; without a message, every check passed."""

    message: str
    launches: int
    vector_launches: int
    largest_grid: int


def compile_emulator(folder: Path, sources: Path = CSRC) -> Path:
    """Compile the emulator with the sources in a folder, by default the library's."""
    library = folder / "emulator.so"
    command = [
        *(os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-ffp-contract=off", "-Wall"),
        *("-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,--no-undefined"),
        *(f"-I{sources}", str(Path(__file__).with_suffix(".cc")), "-o", str(library)),
        *(str(sources / f"{name}.cc") for name in SOURCES),
    ]
    subprocess.run(command, check=True)
    return library


@functools.cache
def get_emulator() -> Path:
    folder = tempfile.mkdtemp(prefix="rotary_emulator_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return compile_emulator(Path(folder))


def emulate(
    tensors: Tensors,
    *,
    library: Path | None = None,
    capture_status: int = 0,
    launch_error: int = 0,
    **attributes: int,
) -> Emulated:
    """Run the op on `tensors`, outputs included, as `LaunchRotation` would on a GPU."""
    call = Call(**attributes)
    for name, x in tensors.items():
        setattr(call, name, ctypes.pointer(describe(x)))
    statistics = Statistics()
    message = ctypes.create_string_buffer(1024)
    ctypes.CDLL(str(library or get_emulator())).EmulateRotation(
        ctypes.byref(call),
        capture_status,
        launch_error,
        ctypes.byref(statistics),
        message,
        ctypes.c_size_t(len(message)),
    )
    return Emulated(
        message.value.decode(),
        statistics.launches,
        statistics.vector_launches,
        statistics.largest_grid,
    )


SENTINEL = -77.0
OUTPUT_OF = {"X": "Y", "key": "key_out"}


def make_outputs(inputs: Tensors) -> Tensors:
    """Return outputs like X and key, strides included, full of a sentinel."""
    return {
        output: torch.empty_strided(
            inputs[name].shape, inputs[name].stride(), dtype=inputs[name].dtype
        ).fill_(SENTINEL)
        for name, output in OUTPUT_OF.items()
        if name in inputs
    }


def check_against_cpu(
    inputs: Tensors, what: object = "", *, in_place: bool = False, **attributes: int
) -> Emulated:
    """Run the emulator and the CPU kernel on the same tensors and compare the bits."""
    want = make_outputs(inputs)
    assert rotate({**inputs, **want}, **attributes) == ""
    got = make_outputs(inputs)
    if in_place:
        inputs = dict(inputs)
        for name, output in OUTPUT_OF.items():
            if name in inputs:
                inputs[name] = got[output].copy_(inputs[name])
    ran = emulate({**inputs, **got}, **attributes)
    assert ran.message == "", what
    for name, y in got.items():
        assert_same_bits(y, want[name], f"{name} {what}")
    return ran
