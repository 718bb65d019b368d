// Runs the CUDA kernel's code on the CPU: every thread of every block of a launch, one after the
// other, behind an emulated NVIDIA driver. Each memory access is checked: it must be inside a
// tensor, aligned as the GPU requires, and not read what another thread may have written. Each
// output element must be written once.
//
// tests/helpers/cuda_emulator.py compiles it together with the library's own sources, once. It
// exports EmulateRotation, for calls with plain pointers, and RegisterCustomOps, with which ONNX
// Runtime runs the op for CUDA, kernel included, on its CPU provider.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/cuda_driver.h"
#include "cuda/launch_rotation.h"
#include "cuda/rotate_thread.h"
#include "cuda_emulator_memory.h"
#include "kernel/input_checks.h"
#include "kernel/isa_dispatch.h"
#include "ort/rotary_cuda_op.h"

namespace rotary_export {
namespace {

// ---- the driver

using RunThread = void (*)(const Launch& launch, const cuda::ThreadIndex& index);

template <typename T, typename Table, int kWidth>
void Run(const Launch& launch, const cuda::ThreadIndex& index) {
  cuda::RotateThread<T, Table, kWidth>(launch, index, CheckedMemory());
}

struct NamedKernel {
  const char* name;
  RunThread run;
  bool is_vector;
};
#define ROTARY_EXPORT_EMULATED(T, Table)                              \
  {"Rotate" #T #Table "Vector", Run<T, Table, 16 / sizeof(T)>, true}, \
      {"Rotate" #T #Table "Scalar", Run<T, Table, 1>, false},
const NamedKernel kKernels[] = {ROTARY_EXPORT_TYPE_PAIRS(ROTARY_EXPORT_EMULATED)};

int LoadLibrary(CUlib_st** library, const void* code, int*, void**, unsigned, int*, void**,
                unsigned) {
  *library = reinterpret_cast<CUlib_st*>(const_cast<void*>(code));
  return 0;
}

int GetKernel(CUkern_st** kernel, CUlib_st*, const char* name) {
  for (const NamedKernel& known : kKernels) {
    if (std::strcmp(known.name, name) == 0) {
      *kernel = reinterpret_cast<CUkern_st*>(const_cast<NamedKernel*>(&known));
      return 0;
    }
  }
  return 500;  // CUDA_ERROR_NOT_FOUND
}

int LaunchKernel(CUfunc_st* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                 unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                 CUstream_st*, void** arguments, void**) {
  const auto& kernel = *reinterpret_cast<NamedKernel*>(function);
  const Launch& launch = *static_cast<Launch*>(arguments[0]);
  if (emulator.launch_error != 0) return emulator.launch_error;
  if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_x > 0x7fffffff || grid_y > 65535 ||
      grid_z > 65535 || block_x == 0 || block_y == 0 || block_z != 1 || shared_bytes != 0 ||
      block_x * block_y > kThreadsPerBlock) {
    return 1;  // CUDA_ERROR_INVALID_VALUE
  }
  ++emulator.launches;
  emulator.vector_launches += kernel.is_vector;
  const int64_t grid = int64_t{grid_x} * grid_y * grid_z;
  if (grid > emulator.largest_grid) emulator.largest_grid = grid;
  cuda::ThreadIndex at;
  // From the last thread to the first: the result must not depend on the order.
  for (at.block_z = grid_z; at.block_z-- > 0;) {
    for (at.block_y = grid_y; at.block_y-- > 0;) {
      for (at.block_x = grid_x; at.block_x-- > 0;) {
        for (at.thread_y = block_y; at.thread_y-- > 0;) {
          for (at.thread_x = block_x; at.thread_x-- > 0;) kernel.run(launch, at);
        }
      }
    }
  }
  return 0;
}

constexpr CudaDriver kDriver = {[](int, const char** name) {
                                  *name = "CUDA_ERROR_EMULATED";
                                  return 0;
                                },
                                [](unsigned) { return 0; },
                                LoadLibrary,
                                GetKernel,
                                [](CUstream_st*, int* status) {
                                  *status = emulator.capture_status;
                                  return 0;
                                },
                                LaunchKernel};

// ---- calls with plain pointers

void AddRegion(const RotaryExportTensor* tensor, bool is_written) {
  if (tensor == nullptr) return;
  size_t elements = 1;
  for (int i = 0; i < tensor->rank; ++i) {
    if (tensor->shape[i] == 0) return;
    elements += static_cast<size_t>((tensor->shape[i] - 1) * tensor->strides[i]);
  }
  const auto* begin = static_cast<const unsigned char*>(tensor->data);
  const size_t size = elements * static_cast<size_t>(SizeOf(tensor->type));
  Region region = {begin, size, {}};
  if (is_written) region.writes.resize(size);
  // Outputs first, so that an access to an input in the same memory is checked against writes.
  emulator.regions.insert(is_written ? emulator.regions.begin() : emulator.regions.end(), region);
}

// Checks that each element was written once: its bytes, and no others, have a count of 1. In place,
// the channels past rotary_dim are not written.
void CheckWrites(const RotaryExportTensor* tensor, const Heads& heads, const RotaryParams& params) {
  if (tensor == nullptr) return;
  const Region* region = FindRegion(tensor->data, 1, true);
  if (region == nullptr) return;
  std::vector<unsigned char> wanted(region->size);
  const auto size = static_cast<size_t>(SizeOf(tensor->type));
  const bool in_place = heads.in == heads.out;
  const int64_t channels = in_place ? params.rotary_dim : params.head_dim;
  for (int64_t b = 0; b < params.batch_size; ++b) {
    for (int64_t n = 0; n < heads.count; ++n) {
      for (int64_t s = 0; s < params.seq_len; ++s) {
        const HeadStrides& to = heads.out_strides;
        const int64_t first = b * to.batch + n * to.head + s * to.row;
        std::memset(&wanted[static_cast<size_t>(first) * size], 1,
                    static_cast<size_t>(channels) * size);
      }
    }
  }
  if (wanted != region->writes) Complain("element not written", tensor->data, size);
}

bool Emulate(const RotaryExportCall& call, Message* message) {
  RotaryParams params;
  if (!CheckCall(call, &params, message)) return false;
  for (const auto* tensor : {call.x, call.cos_cache, call.sin_cache, call.key, call.scale_cache}) {
    AddRegion(tensor, false);
  }
  AddRegion(call.y, true);
  AddRegion(call.key_out, true);
  if (!LaunchRotation(params, nullptr, message)) return false;
  CheckWrites(call.y, params.query, params);
  CheckWrites(call.key_out, params.key, params);
  return emulator.problem.text[0] == '\0' || Fail(message, "%s", emulator.problem.text);
}

}  // namespace

const CudaDriver* FindCudaDriver(Message*) { return &kDriver; }
const void* CudaDeviceCode() { return "emulated"; }

// rotary_op.cc, which describes the op for CUDA too, links to the CPU kernel.
const Selection& SelectedInstructionSet() {
  static const Selection none = {};
  return none;
}
int64_t OutputBytes(const RotaryParams&) { return 0; }
RotateRowsFunction ChooseRotation(RotaryParams*) { return nullptr; }
void RotatePart(const RotaryParams&, RotateRowsFunction, int64_t, int64_t) {}

namespace {

// ---- ONNX Runtime's calls

OrtStatus* RegisterOnCpu(OrtSessionOptions* options, const ort::OrtApi* api) {
  static Op ops[kTypePairCount];
  static OrtCustomOpDomain* domain = nullptr;
  if (domain == nullptr) {
    if (OrtStatus* status = api->CreateCustomOpDomain("rotary_export", &domain)) return status;
    for (int i = 0; i < kTypePairCount; ++i) {
      DescribeCudaOp(api, kTypePairs[i], &ops[i]);
      ops[i].GetExecutionProviderType = [](const ort::OrtCustomOp*) {
        return "CPUExecutionProvider";
      };
      if (OrtStatus* status = api->CustomOpDomain_Add(domain, &ops[i])) return status;
    }
  }
  return api->AddCustomOpDomain(options, domain);
}

}  // namespace

}  // namespace rotary_export

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const void* api_base) {
  const auto* base = static_cast<const rotary_export::ort::OrtApiBase*>(api_base);
  return rotary_export::RegisterOnCpu(options, base->GetApi(rotary_export::ort::kApiVersion));
}

using rotary_export::emulator;

struct EmulatorStatistics {
  int64_t launches;
  int64_t vector_launches;
  int64_t largest_grid;
};

// Returns 0, or 1 with a sentence. The emulated driver returns `capture_status` and `launch_error`.
extern "C" __attribute__((visibility("default"))) int EmulateRotation(
    const RotaryExportCall* call, int capture_status, int launch_error,
    EmulatorStatistics* statistics, char* text, size_t text_size) {
  emulator = {};
  emulator.is_checked = true;
  emulator.capture_status = capture_status;
  emulator.launch_error = launch_error;
  rotary_export::Message message;
  const bool done = rotary_export::Emulate(*call, &message);
  *statistics = {emulator.launches, emulator.vector_launches, emulator.largest_grid};
  emulator = {};
  std::snprintf(text, text_size, "%s", message.text);
  return done ? 0 : 1;
}
