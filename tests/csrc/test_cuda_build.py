"""The code that nvcc compiles rotary_kernel.cu to, and the build with it. No GPU is needed."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from helpers.paths import CSRC

from rotary_export.op import library as op_library
from rotary_export.op import spec
from rotary_export.runtime.providers import CPU, CUDA

FLAGS = "-fatbin -std=c++17 -O3 -fmad=false -ftz=false -prec-div=true"  # Those of cuda.cmake.
ARCHITECTURES = ("80", "90", "100")
TYPE_NAMES = {
    "float32": "Float32",
    "float16": "Float16",
    "bfloat16": "BFloat16",
    "float64": "Float64",
}
KERNELS = {
    f"Rotate{TYPE_NAMES[x]}{TYPE_NAMES[table]}{variant}"
    for x, table in spec.TYPE_PAIRS
    for variant in ("Vector", "Scalar")
}


def require_nvcc() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        message = "needs nvcc on the PATH (NVIDIA's CUDA toolkit; no GPU)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return nvcc


@functools.cache
def compile_kernels() -> tuple[dict[tuple[str, str], str], dict[str, str]]:
    """Return ptxas' report by (kernel, architecture), and the PTX by kernel."""
    nvcc = require_nvcc()
    with tempfile.TemporaryDirectory() as folder:
        return compile_kernels_in(Path(folder), nvcc)


def compile_kernels_in(
    folder: Path, nvcc: str
) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    source = str(CSRC / "cuda" / "rotary_kernel.cu")
    fatbin = [
        nvcc,
        *FLAGS.split(),
        f"-I{CSRC}",
        "-Xptxas",
        "-v",
        *targets,
        source,
        "-o",
        str(folder / "fatbin"),
    ]
    run = subprocess.run(fatbin, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    entry = r"Compiling entry function '(\w+)' for 'sm_(\d+)'\n(.*?Used \d+ registers)"
    reports = {
        (name, architecture): report
        for name, architecture, report in re.findall(entry, run.stderr, re.DOTALL)
    }
    flags = [*FLAGS.replace("-fatbin", "-ptx").split(), f"-I{CSRC}"]
    ptx = [nvcc, *flags, "-arch=compute_80", source, "-o", str(folder / "ptx")]
    subprocess.run(ptx, check=True)
    bodies = re.findall(r"\.entry (\w+)\((.*?)\n}\n", (folder / "ptx").read_text(), re.DOTALL)
    return reports, dict(bodies)


def test_the_build_uses_the_flags_that_are_tested_here():
    assert FLAGS in (CSRC / "cuda" / "cuda.cmake").read_text()


def test_every_kernel_exists_for_every_architecture():
    reports, bodies = compile_kernels()
    assert set(reports) == {(name, a) for name in KERNELS for a in ARCHITECTURES}
    assert set(bodies) == KERNELS


def test_no_kernel_spills_registers():
    for kernel, report in compile_kernels()[0].items():
        numbers = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
        assert numbers in report, (kernel, report)
        registers = re.search(r"Used (\d+) registers", report)
        assert registers is not None
        # Three blocks of 256 threads fit a multiprocessor's 65536 registers.
        assert int(registers[1]) <= 80, (kernel, registers[0])


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_memory_is_moved_16_bytes_at_a_time(kernel):
    body = compile_kernels()[1][kernel]
    accesses = Counter(re.findall(r"\b(?:ld|st)\.(?:global|local|shared)[.\w]*", body))
    widths = {"v4.u32": 16, "v4.f32": 16, "v2.f64": 16, "v2.u64": 16, "v2.u32": 8, "f64": 8}
    widths |= {"u32": 4, "f32": 4, "u16": 2, "b16": 2}
    sizes = {
        access: next(size for suffix, size in widths.items() if access.endswith(suffix))
        for access in accesses
    }
    assert not [access for access in sizes if "local" in access or "shared" in access]
    # A rotated chunk's two vectors and one of the tail, each read and written in one place.
    assert sum(accesses[access] for access in sizes if access.startswith("st")) == 3
    if kernel.endswith("Scalar"):
        return
    tables = {access for access in sizes if ".nc" in access}
    assert {sizes[access] for access in set(sizes) - tables} == {16}
    # A table entry of float32 beside float64 is half as wide as its pair's.
    wanted = 8 if kernel == "RotateFloat64Float32Vector" else 16
    assert {sizes[access] for access in tables} == {wanted}


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_no_product_is_fused_with_a_sum_and_no_subnormal_flushed(kernel):
    body = compile_kernels()[1][kernel]
    assert not re.findall(r"\bfma\.\S*f(?:32|64)|\.ftz|\.approx", body)
    assert re.findall(r"\bmul\.rn\.f", body)
    assert re.findall(r"\brcp\.rn\.f", body)  # The key's 1 / scale.


SIGNATURES = r"""
#include <cuda.h>
#include <type_traits>
#include "cuda_driver.h"

template <typename A, typename B> struct Same {
  static constexpr bool value =
      sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
};
template <typename R, typename... A, typename S, typename... B>
struct Same<R (*)(A...), S (*)(B...)> {
  static constexpr bool value = sizeof...(A) == sizeof...(B) && Same<R, S>::value &&
                                (Same<A, B>::value && ...);
};
#define CHECK(member, official)                                                           \
  static_assert(Same<decltype(rotary_export::CudaDriver::member), decltype(&official)>::value, \
                #official)
CHECK(GetErrorName, cuGetErrorName);
CHECK(Init, cuInit);
CHECK(LibraryLoadData, cuLibraryLoadData);
CHECK(LibraryGetKernel, cuLibraryGetKernel);
CHECK(StreamIsCapturing, cuStreamIsCapturing);
CHECK(LaunchKernel, cuLaunchKernel);
static_assert(std::is_same_v<CUstream, CUstream_st*> && std::is_same_v<CUkernel, CUkern_st*> &&
              std::is_same_v<CUlibrary, CUlib_st*> && std::is_same_v<CUfunction, CUfunc_st*>);
static_assert(CU_STREAM_CAPTURE_STATUS_NONE == 0 && CUDA_SUCCESS == 0);
"""


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("", "", ""),
        ("int (*Init)(unsigned flags)", "int (*Init)(void* flags)", "cuInit"),
        ("unsigned shared_bytes,", "", "cuLaunchKernel"),
    ],
    ids=["ours", "wrong-type", "wrong-count"],
)
def test_the_driver_s_functions_are_declared_as_in_cuda_h(tmp_path, right, wrong, complaint):
    nvcc = require_nvcc()
    header = (CSRC / "cuda" / "cuda_driver.h").read_text()
    assert right in header
    (tmp_path / "cuda_driver.h").write_text(header.replace(right, wrong) if right else header)
    source = tmp_path / "check.cu"
    source.write_text(SIGNATURES)
    command = [nvcc, "-std=c++17", "-arch=sm_80", f"-I{tmp_path}", f"-I{CSRC}", "-c", str(source)]
    run = subprocess.run(
        [*command, "-o", str(tmp_path / "check.o")], capture_output=True, text=True, check=False
    )
    assert (run.returncode == 0) == (not complaint), run.stderr
    assert complaint in run.stdout + run.stderr


# ---- the library


def test_with_nvcc_the_library_has_a_cuda_kernel():
    require_nvcc()
    assert op_library.library_providers() == (CPU, CUDA)


def test_without_nvcc_the_library_has_only_a_cpu_kernel(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake on the PATH (pip installs its own if there is none)")
    settings = ["-DROTARY_EXPORT_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Debug"]
    configure = ["cmake", "-S", str(CSRC), "-B", str(tmp_path), *settings]
    for command in (configure, ["cmake", "--build", str(tmp_path), "--parallel", "2"]):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
    library = ctypes.CDLL(str(tmp_path / op_library.LIBRARY_NAME))
    library.RotaryExportProviders.restype = ctypes.c_char_p
    assert library.RotaryExportProviders() == CPU.encode()
