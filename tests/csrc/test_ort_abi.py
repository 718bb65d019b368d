"""The binary interfaces: ORT's C ABI as we declare it, our own C functions, the file itself."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cases import ID_FORMS, make_inputs
from helpers.kernel_calls import Call, rotate
from helpers.op_library import check_against_oracle
from helpers.oracles import Tensors, assert_same_bits, compute_eager
from helpers.paths import CSRC, ROOT

from rotary_export.op import library as op_library
from rotary_export.op import spec

FETCH_HEADERS = "tools/fetch_ort_headers"
HEADERS = ROOT / "build" / "ort_headers"
LIBRARY = op_library.op_library_path()

# ---- ort_abi.h against the official header

# Opaque handles are the same types in both headers; our structs and enums are our own, so types are
# compared up to that: a pointer to some struct, an enum or integer of some size.
ABI_CHECK = r"""
#include <type_traits>
#include "onnxruntime_c_api.h"
#include "ort_abi.h"

namespace ours = rotary_export::ort;

template <typename T> constexpr bool is_struct_pointer =
    std::is_pointer_v<T> && std::is_class_v<std::remove_pointer_t<T>>;
template <typename T> constexpr bool is_number = std::is_enum_v<T> || std::is_integral_v<T>;

template <typename A, typename B> struct Same {
  using PlainA = std::remove_pointer_t<A>;
  using PlainB = std::remove_pointer_t<B>;
  static constexpr bool value =
      std::is_same_v<A, B> ||
      (is_struct_pointer<A> && is_struct_pointer<B> &&
       std::is_const_v<PlainA> == std::is_const_v<PlainB>) ||
      ((std::is_enum_v<A> || std::is_enum_v<B>) && is_number<A> && is_number<B> &&
       sizeof(A) == sizeof(B));
};
template <typename R, typename... A, typename S, typename... B>
struct Same<R (*)(A...), S (*)(B...)> {
  static constexpr bool value = sizeof...(A) == sizeof...(B) && Same<R, S>::value &&
                                (Same<A, B>::value && ...);
};
template <typename R, typename... A, typename S, typename... B>
struct Same<R (*)(A...), S (*)(B...) noexcept> : Same<R (*)(A...), S (*)(B...)> {};

#define CHECK_MEMBER(type, name) \
  static_assert(offsetof(ours::type, name) == offsetof(::type, name), #name ": offset"); \
  static_assert(Same<decltype(ours::type::name), decltype(::type::name)>::value, #name ": type")
#define CHECK_SLOT(name, slot) CHECK_MEMBER(OrtApi, name);
#define CHECK_VALUE(mine, official) static_assert(int(mine) == int(official), #official)

ROTARY_EXPORT_ORT_SLOTS(CHECK_SLOT)
#if ORT_API_VERSION >= 24
ROTARY_EXPORT_ORT_SLOTS_SINCE_24(CHECK_SLOT)
static_assert(ours::kFastApiVersion <= ORT_API_VERSION);
#endif
CHECK_MEMBER(OrtApiBase, GetApi);
CHECK_MEMBER(OrtApiBase, GetVersionString);
CHECK_MEMBER(OrtCustomOp, version);
CHECK_MEMBER(OrtCustomOp, GetName);
CHECK_MEMBER(OrtCustomOp, GetExecutionProviderType);
CHECK_MEMBER(OrtCustomOp, GetInputType);
CHECK_MEMBER(OrtCustomOp, GetInputTypeCount);
CHECK_MEMBER(OrtCustomOp, GetOutputType);
CHECK_MEMBER(OrtCustomOp, GetOutputTypeCount);
CHECK_MEMBER(OrtCustomOp, KernelDestroy);
CHECK_MEMBER(OrtCustomOp, GetInputCharacteristic);
CHECK_MEMBER(OrtCustomOp, GetOutputCharacteristic);
CHECK_MEMBER(OrtCustomOp, GetInputMemoryType);
CHECK_MEMBER(OrtCustomOp, CreateKernelV2);
CHECK_MEMBER(OrtCustomOp, KernelComputeV2);
CHECK_MEMBER(OrtCustomOp, InferOutputShapeFn);
CHECK_MEMBER(OrtCustomOp, GetStartVersion);
CHECK_MEMBER(OrtCustomOp, GetEndVersion);
CHECK_MEMBER(OrtCustomOp, GetMayInplace);
CHECK_MEMBER(OrtCustomOp, ReleaseMayInplace);
static_assert(offsetof(ours::OrtCustomOp, CreateKernel) == offsetof(::OrtCustomOp, CreateKernel));
static_assert(offsetof(ours::OrtCustomOp, KernelCompute) == offsetof(::OrtCustomOp, KernelCompute));
static_assert(offsetof(ours::OrtCustomOp, GetAliasMap) == offsetof(::OrtCustomOp, GetAliasMap));
static_assert(offsetof(ours::OrtCustomOp, ReleaseAliasMap) ==
              offsetof(::OrtCustomOp, ReleaseAliasMap));
static_assert(sizeof(ours::OrtCustomOp) <= sizeof(::OrtCustomOp), "what this version reads");
static_assert(ours::kApiVersion <= ORT_API_VERSION);
CHECK_VALUE(ours::kFail, ORT_FAIL);
CHECK_VALUE(ours::kInvalidArgument, ORT_INVALID_ARGUMENT);
CHECK_VALUE(ours::kFloat, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
CHECK_VALUE(ours::kInt64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
CHECK_VALUE(ours::kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
CHECK_VALUE(ours::kDouble, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE);
CHECK_VALUE(ours::kBFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
CHECK_VALUE(ours::kRequired, INPUT_OUTPUT_REQUIRED);
CHECK_VALUE(ours::kOptional, INPUT_OUTPUT_OPTIONAL);
CHECK_VALUE(ours::kDefaultMemory, OrtMemTypeDefault);
CHECK_VALUE(ours::kCpuInput, OrtMemTypeCPUInput);
"""


def compile_check(folder: Path, source_folder: Path) -> subprocess.CompletedProcess[str]:
    if not (HEADERS / "onnxruntime_c_api.h").exists():
        message = f"needs ONNX Runtime's C headers: run {FETCH_HEADERS}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    source = folder / "check.cc"
    source.write_text(ABI_CHECK)
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof"]
    includes = [f"-I{source_folder}", f"-I{HEADERS}"]
    command = [compiler, *flags, *includes, str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_slot_offset_and_type_is_the_official_one(tmp_path):
    run = compile_check(tmp_path, CSRC / "ort")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("slots_29_50[22]", "slots_29_50[21]", "GetTensorMutableData"),
        ("size_t max_batches", "int max_batches", "KernelContext_ParallelFor: type"),
        ("kBFloat16 = 16", "kBFloat16 = 15", "BFLOAT16"),
        ("slots_102_192[91]", "slots_102_192[90]", "KernelContext_GetGPUComputeStream: offset"),
        ("void* KernelCompute; ", "", "KernelDestroy: offset"),
    ],
)
def test_the_check_sees_a_wrong_declaration(tmp_path, right, wrong, complaint):
    header = (CSRC / "ort" / "ort_abi.h").read_text()
    assert right in header
    (tmp_path / "ort_abi.h").write_text(header.replace(right, wrong))
    run = compile_check(tmp_path, tmp_path)
    assert run.returncode != 0
    assert complaint in run.stderr


# Hands the op library an OrtApiBase that says it is older than it is.
OLDER_RUNTIME = r"""
#include <dlfcn.h>
struct Base { const void* (*GetApi)(unsigned); const char* (*GetVersionString)(); };
extern "C" void* RegisterCustomOps(void* options, const Base* base) {
  static Base older = {base->GetApi, [] { return "1.23.0"; }};
  void* library = dlopen(LIBRARY, RTLD_NOW);
  return reinterpret_cast<void* (*)(void*, Base*)>(dlsym(library, "RegisterCustomOps"))(
      options, &older);
}
"""


def test_a_runtime_without_version_24_gives_the_same_bits(tmp_path):
    library = shutil.copy(LIBRARY, tmp_path)  # A copy, as a library registers its ops once.
    source = tmp_path / "older.cc"
    source.write_text(OLDER_RUNTIME)
    shim = tmp_path / "older.so"
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-shared", "-fPIC", f'-DLIBRARY="{library}"', "-ldl"]
    subprocess.run([compiler, *flags, str(source), "-o", str(shim)], check=True)
    for form in ID_FORMS:
        inputs = make_inputs(np.random.default_rng(2), form=form, kv_heads=2)
        check_against_oracle(inputs, form, library=str(shim))


# ---- the file


def run_tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]} (binutils)")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_only_the_c_interface_is_exported():
    exported = {
        line.split()[-1] for line in run_tool("nm", "-D", "--defined-only", LIBRARY).splitlines()
    }
    assert exported == {
        "RegisterCustomOps",
        "RotaryExportInstructionSet",
        "RotaryExportProviders",
        "RotaryExportRotate",
    }


def test_it_needs_libc_alone_and_an_old_one():
    needed = re.findall(r"NEEDED.*\[(.*)\]", run_tool("readelf", "-dW", LIBRARY))
    assert [
        name for name in needed if not name.startswith(("libc.so", "libm.so", "ld-linux"))
    ] == []
    versions = re.findall(r"GLIBC_([0-9.]+)", run_tool("readelf", "-VW", LIBRARY))
    highest = max(tuple(int(part) for part in version.split(".")) for version in versions)
    # 2.17 is that of manylinux2014, the oldest images in use (and the first glibc for aarch64).
    assert highest <= (2, 17), highest


def test_no_product_is_fused_with_a_sum():
    # GCC's vectoriser fuses in spite of -ffp-contract=off (see rotary_kernel.cc): look at the code.
    code = run_tool("objdump", "-d", "--no-show-raw-insn", LIBRARY)
    assert not re.findall(r"\s(?:v?fn?m(?:add|sub)\w*|fml[as]|fn?m(?:add|sub))\s", code)


# ---- RotaryExportRotate


@pytest.fixture
def tensors() -> Tensors:
    inputs = make_inputs(np.random.default_rng(1), kv_heads=2, rotary_dim=4, scaled=True)
    outputs = {"Y": torch.full((2, 3, 5, 8), -77.0), "key_out": torch.full((2, 2, 5, 8), -77.0)}
    return inputs | outputs


def test_rotate_gives_the_bits_of_the_oracle(tensors):
    assert rotate(tensors, rotary_embedding_dim=4) == ""
    for name, want in zip(spec.OUTPUTS, compute_eager(tensors, False), strict=True):
        assert_same_bits(tensors[name], want)


@pytest.mark.parametrize("parts", [1, 2, 3, 10, 17])
def test_rotate_in_parts(tensors, parts):
    wanted = compute_eager(tensors, False)
    untouched = []
    for part in range(parts):
        assert rotate(tensors, rotary_embedding_dim=4, part=part, parts=parts) == ""
        untouched.append(int((tensors["Y"] == -77).sum()))
    rows = [10 * part // parts for part in range(1, parts + 1)]  # of batch 2 and S 5
    assert untouched == [(10 - done) * 3 * 8 for done in rows]
    for name, want in zip(spec.OUTPUTS, wanted, strict=True):
        assert_same_bits(tensors[name], want)


@pytest.mark.parametrize(("part", "parts"), [(-1, 2), (2, 2), (1, 0), (0, -1)])
def test_rotate_refuses_a_part_that_is_none(tensors, part, parts):
    message = rotate(tensors, rotary_embedding_dim=4, part=part, parts=parts)
    assert message == f"part must be in [0, parts), got part={part}, parts={parts}"
    assert (tensors["Y"] == -77).all()


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotate_in_place(tensors, interleaved):
    wanted = compute_eager(tensors, bool(interleaved))
    tensors |= {"Y": tensors["X"], "key_out": tensors["key"]}
    assert rotate(tensors, rotary_embedding_dim=4, interleaved=interleaved) == ""
    for name, want in zip(spec.OUTPUTS, wanted, strict=True):
        assert_same_bits(tensors[name], want)


def test_rotate_walks_strides_and_writes_nothing_else(tensors):
    wanted = compute_eager(tensors, False)
    for name in ("X", "key", "Y", "key_out"):  # (B, S, N, H) in memory, in rows of 11.
        x = tensors[name]
        wide = torch.full((x.shape[0], x.shape[2], x.shape[1], 11), -77.0)
        tensors[name] = wide.transpose(1, 2)[..., 2:10]
        tensors[name].copy_(x)
    assert rotate(tensors, rotary_embedding_dim=4) == ""
    for name, want in zip(spec.OUTPUTS, wanted, strict=True):
        assert_same_bits(tensors[name].contiguous(), want)
        whole = tensors[name]._base
        assert (whole[..., :2] == -77).all()
        assert (whole[..., 10:] == -77).all()


def test_rotate_writes_nothing_when_an_id_is_bad(tensors):
    tensors["position_ids"][1, 4] = 8
    message = rotate(tensors, rotary_embedding_dim=4)
    assert message == spec.bad_id_message(8, 1, 4, 8)
    assert (tensors["Y"] == -77).all()
    assert (tensors["key_out"] == -77).all()


def as_type(name: str, dtype: torch.dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("sin_cache"), "X, cos_cache and sin_cache must be given"),
        (lambda t: t.pop("Y"), "Y must be given"),
        (lambda t: t.pop("key"), "key_out must be given if and only if key is, got key_out but no"),
        (lambda t: t.pop("key_out"), "key_out must be given if and only if key is, got key but no"),
        (as_type("X", torch.int64), "X must be float32, float16, bfloat16 or float64, got int64"),
        (as_type("key", torch.float16), spec.bad_type_message("key", "float16", "float32")),
        (
            as_type("cos_cache", torch.bfloat16),
            spec.bad_type_message("cos_cache", "bfloat16", "float32"),
        ),
        (as_type("sin_cache", torch.float16), "sin_cache must have the type of cos_cache, got f"),
        (as_type("position_ids", torch.float32), "position_ids must be int64, got float32"),
        (as_type("Y", torch.float64), "Y must have the type and shape of X, got float64 (2, 3, 8"),
        (lambda t: t.update(X=t["X"].mT), "X must be contiguous in its last dimension, got strid"),
        (lambda t: t.update(cos_cache=t["cos_cache"].mT.contiguous().mT), "cos_cache must be con"),
    ],
)
def test_rotate_says_what_is_wrong(tensors, spoil, message):
    tensors["X"] = torch.zeros(2, 3, 8, 8)  # Square, for its transpose to have a fitting shape.
    tensors |= {"Y": torch.zeros(2, 3, 8, 8), "position_ids": torch.zeros(1, 8, dtype=torch.int64)}
    tensors |= {"key": torch.zeros(2, 2, 8, 8), "key_out": torch.zeros(2, 2, 8, 8)}
    spoil(tensors)
    assert rotate(tensors, rotary_embedding_dim=4).startswith(message)


def test_a_null_call_reports_whether_the_library_can_be_used(tmp_path, monkeypatch):
    library = op_library._load_library(LIBRARY)
    assert library.RotaryExportRotate(None, None, 0) == 0
    monkeypatch.setenv("ROTARY_EXPORT_ISA", "none")
    spoiled = ctypes.CDLL(shutil.copy(LIBRARY, tmp_path))
    message = ctypes.create_string_buffer(24)
    assert spoiled.RotaryExportRotate(None, message, len(message)) == 1
    assert message.value == b"ROTARY_EXPORT_ISA must "  # Cut to the caller's buffer.


def test_spec_names_the_structs_fields():
    header = (CSRC / "rotary_export.h").read_text()
    body = header.split("struct RotaryExportCall {")[1].split("};")[0]
    fields = re.findall(r"(\w+);", body)
    assert fields == [name.lower() for name, _ in Call._fields_]
