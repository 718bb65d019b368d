"""ORT's C ABI as `ort_abi.h` declares it, against the official header."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.paths import CSRC, ROOT

FETCH_HEADERS = "tools/fetch_ort_headers"
HEADERS = ROOT / "build" / "ort_headers"

# ---- ort_abi.h against the official header

# Opaque handles are the same types in both headers. Structs and enums differ, so they are compared
# up to that: any pointer to a struct, any pointer to an enum, any number of the same size.
ABI_CHECK = r"""
#include <type_traits>
#include "onnxruntime_c_api.h"
#include "ort_abi.h"

namespace ours = rotary_export::ort;

template <typename T> constexpr bool is_struct_pointer =
    std::is_pointer_v<T> && std::is_class_v<std::remove_pointer_t<T>>;
template <typename T, bool = std::is_enum_v<T>> constexpr size_t enum_size = 0;
template <typename T> constexpr size_t enum_size<T, true> = sizeof(T);
template <typename T> constexpr bool is_number = std::is_enum_v<T> || std::is_integral_v<T>;

template <typename A, typename B> struct Same {
  using PlainA = std::remove_pointer_t<A>;
  using PlainB = std::remove_pointer_t<B>;
  static constexpr bool value =
      std::is_same_v<A, B> ||
      (is_struct_pointer<A> && is_struct_pointer<B> &&
       std::is_const_v<PlainA> == std::is_const_v<PlainB>) ||
      (std::is_pointer_v<A> && std::is_pointer_v<B> && enum_size<PlainA> > 0 &&
       enum_size<PlainA> == enum_size<PlainB>) ||
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
CHECK_VALUE(ROTARY_EXPORT_FLOAT32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
CHECK_VALUE(ROTARY_EXPORT_INT64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
CHECK_VALUE(ROTARY_EXPORT_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
CHECK_VALUE(ROTARY_EXPORT_FLOAT64, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE);
CHECK_VALUE(ROTARY_EXPORT_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
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
    includes = [f"-I{source_folder}", f"-I{CSRC}", f"-I{HEADERS}"]
    command = [compiler, *flags, *includes, str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_slot_offset_and_type_is_the_official_one(tmp_path):
    run = compile_check(tmp_path, CSRC / "ort")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("header", "right", "wrong", "complaint"),
    [
        ("ort/ort_abi.h", "slots_29_50[22]", "slots_29_50[21]", "GetTensorMutableData"),
        (
            "ort/ort_abi.h",
            "size_t max_batches",
            "int max_batches",
            "KernelContext_ParallelFor: type",
        ),
        ("rotary_export.h", "BFLOAT16 = 16", "BFLOAT16 = 15", "BFLOAT16"),
        (
            "ort/ort_abi.h",
            "slots_102_192[91]",
            "slots_102_192[90]",
            "KernelContext_GetGPUComputeStream: offset",
        ),
        ("ort/ort_abi.h", "void* KernelCompute; ", "", "KernelDestroy: offset"),
    ],
)
def test_the_check_detects_a_wrong_declaration(tmp_path, header, right, wrong, complaint):
    for name in ("ort/ort_abi.h", "rotary_export.h"):
        shutil.copy(CSRC / name, tmp_path)
    text = (CSRC / header).read_text()
    assert right in text
    (tmp_path / Path(header).name).write_text(text.replace(right, wrong))
    run = compile_check(tmp_path, tmp_path)
    assert run.returncode != 0
    assert complaint in run.stderr
