// Stands between ONNX Runtime and the op library and counts the outputs that ORT lets the op write
// over their inputs. ORT tells nobody else: what a node's buffers alias is in no log and no
// profile.
//
// It hands the library a copy of OrtApi in which KernelContext_GetOutput is its own, so that it
// needs to know nothing of the kernel. tools/bench/measure_in_place.py builds and reads it.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>

#include "ort/ort_abi.h"

namespace {

using rotary_export::ort::OrtApi;
using rotary_export::ort::OrtApiBase;

constexpr size_t kInputOf[] = {0, 4};  // X of Y, key of key_out.

const OrtApiBase* real_base;
const OrtApi* real;
OrtApi doctored;
OrtApiBase doctored_base;
std::atomic<int64_t> outputs{0};
std::atomic<int64_t> aliased{0};

void* FindData(const OrtValue* value) {
  void* data = nullptr;
  if (value != nullptr) real->GetTensorMutableData(const_cast<OrtValue*>(value), &data);
  return data;
}

OrtStatus* GetOutput(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank,
                     OrtValue** value) {
  OrtStatus* status = real->KernelContext_GetOutput(context, index, dims, rank, value);
  const OrtValue* input = nullptr;
  if (status != nullptr || *value == nullptr || index > 1) return status;
  status = real->KernelContext_GetInput(context, kInputOf[index], &input);
  if (status != nullptr) return status;
  ++outputs;
  if (FindData(*value) == FindData(input)) ++aliased;
  return nullptr;
}

const OrtApi* GetApi(uint32_t version) {
  real = real_base->GetApi(version);
  if (real == nullptr) return nullptr;
  doctored = *real;
  doctored.KernelContext_GetOutput = GetOutput;
  return &doctored;
}

}  // namespace

#define PUBLIC extern "C" __attribute__((visibility("default")))

// ROTARY_EXPORT_LIBRARY is the path of the op library, given when this file is compiled.
PUBLIC OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const void* base) {
  using Register = OrtStatus* (*)(OrtSessionOptions*, const void*);
  void* library = dlopen(ROTARY_EXPORT_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  real_base = static_cast<const OrtApiBase*>(base);
  doctored_base = {GetApi, real_base->GetVersionString};
  return reinterpret_cast<Register>(dlsym(library, "RegisterCustomOps"))(options, &doctored_base);
}

PUBLIC int64_t CountOutputs() { return outputs.exchange(0); }
PUBLIC int64_t CountAliased() { return aliased.exchange(0); }
