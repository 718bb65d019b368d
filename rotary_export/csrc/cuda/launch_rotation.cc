#include "cuda/launch_rotation.h"

#include <atomic>

#include "cuda/cuda_driver.h"
#include "cuda/launch_plan.h"

namespace rotary_export {
namespace {

// For each of kTypePairs, the kernel with 16-byte accesses and the one with single elements.
#define ROTARY_EXPORT_NAMES(T, Table) {"Rotate" #T #Table "Vector", "Rotate" #T #Table "Scalar"},
constexpr const char* kKernelNames[][2] = {ROTARY_EXPORT_TYPE_PAIRS(ROTARY_EXPORT_NAMES)};
#undef ROTARY_EXPORT_NAMES

// Loaded once per process, not per device: the driver loads a kernel into each context that
// launches it. If two threads load the code at the same time, one copy stays unused.
std::atomic<CUlib_st*> loaded_library{nullptr};
std::atomic<CUkern_st*> loaded_kernels[kTypePairCount][2];

bool Check(const CudaDriver& driver, int error, const char* what, Message* message) {
  if (error == 0) return true;
  const char* name = nullptr;
  driver.GetErrorName(error, &name);
  return Fail(message, "%s failed with error %d, %s", what, error, name != nullptr ? name : "?");
}

CUlib_st* GetLibrary(const CudaDriver& driver, Message* message) {
  CUlib_st* library = loaded_library.load();
  if (library != nullptr) return library;
  if (!Check(driver, driver.Init(0), "cuInit", message)) return nullptr;
  const int error =
      driver.LibraryLoadData(&library, CudaDeviceCode(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (!Check(driver, error, "loading the CUDA kernels", message)) return nullptr;
  loaded_library.store(library);
  return library;
}

CUkern_st* GetKernel(const CudaDriver& driver, const RotaryParams& params, bool is_vector,
                     Message* message) {
  int pair = 0;  // CheckInputs made sure that the types are one of the pairs.
  while (kTypePairs[pair].x_type != params.x_type ||
         kTypePairs[pair].table_type != params.table_type) {
    ++pair;
  }
  const int variant = is_vector ? 0 : 1;
  CUkern_st* kernel = loaded_kernels[pair][variant].load();
  if (kernel != nullptr) return kernel;
  CUlib_st* library = GetLibrary(driver, message);
  if (library == nullptr) return nullptr;
  const char* name = kKernelNames[pair][variant];
  const int error = driver.LibraryGetKernel(&kernel, library, name);
  if (!Check(driver, error, name, message)) return nullptr;
  loaded_kernels[pair][variant].store(kernel);
  return kernel;
}

// A captured CUDA graph would repeat the positions of its first run.
bool CheckNotCaptured(const CudaDriver& driver, CUstream_st* stream, Message* message) {
  int capture_status = 0;
  const int error = driver.StreamIsCapturing(stream, &capture_status);
  if (!Check(driver, error, "cuStreamIsCapturing", message)) return false;
  return capture_status == 0 ||
         Fail(message,
              "position_ids are read on the host, which a CUDA graph does not repeat: must not be "
              "captured with position_ids, but may be with tables of one row for each position");
}

}  // namespace

bool LaunchRotation(const RotaryParams& params, CUstream_st* stream, Message* message) {
  if (params.batch_size == 0 || params.seq_len == 0) return true;
  if (params.query.count == 0 && params.key.count == 0) return true;
  const CudaDriver* driver = FindCudaDriver(message);
  if (driver == nullptr) return false;
  if (params.position_ids != nullptr && !CheckNotCaptured(*driver, stream, message)) return false;
  const int64_t rows = CountRows(params);
  Launch launch;  // Not zeroed: 3 KB of it are runs, mostly unused.
  for (int64_t row = 0; row < rows;) {
    row = PlanLaunch(params, row, &launch);
    CUkern_st* kernel = GetKernel(*driver, params, launch.is_vector, message);
    if (kernel == nullptr) return false;
    void* arguments[] = {&launch};
    const int error = driver->LaunchKernel(reinterpret_cast<CUfunc_st*>(kernel), launch.blocks_x,
                                           launch.blocks_y, launch.blocks_z, launch.threads_x,
                                           launch.threads_y, 1, 0, stream, arguments, nullptr);
    if (!Check(*driver, error, "cuLaunchKernel", message)) return false;
  }
  return true;
}

}  // namespace rotary_export
