#include "cuda/cuda_rotate.h"

#include <atomic>

#include "cuda/cuda_driver.h"
#include "cuda/launch_plan.h"

namespace rotary_export {
namespace {

struct KernelName {
  DataType x_type;
  DataType table_type;
  const char* names[2];  // With 16-byte accesses, and one element at a time.
};

#define ROTARY_EXPORT_NAMES(T, Table) \
  {DataType::k##T, DataType::k##Table, {"Rotate" #T #Table "Vector", "Rotate" #T #Table "Scalar"}},
constexpr KernelName kKernels[] = {ROTARY_EXPORT_CUDA_TYPES(ROTARY_EXPORT_NAMES)};
#undef ROTARY_EXPORT_NAMES
constexpr int kKernelCount = sizeof kKernels / sizeof kKernels[0];

// Loaded once per process, not per device: the driver brings a kernel to each context that it is
// launched in. Two threads that both load the code leave one copy unused.
std::atomic<CUlib_st*> loaded_library{nullptr};
std::atomic<CUkern_st*> loaded_kernels[kKernelCount][2];

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
  for (int i = 0; i < kKernelCount; ++i) {
    if (kKernels[i].x_type != params.x_type || kKernels[i].table_type != params.table_type) {
      continue;
    }
    const int variant = is_vector ? 0 : 1;
    CUkern_st* kernel = loaded_kernels[i][variant].load();
    if (kernel != nullptr) return kernel;
    CUlib_st* library = GetLibrary(driver, message);
    if (library == nullptr) return nullptr;
    const char* name = kKernels[i].names[variant];
    const int error = driver.LibraryGetKernel(&kernel, library, name);
    if (!Check(driver, error, name, message)) return nullptr;
    loaded_kernels[i][variant].store(kernel);
    return kernel;
  }
  Fail(message, "there is no CUDA kernel for these types");
  return nullptr;
}

// A captured graph would repeat the positions of its first run.
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
  Launch launch;  // Not set to zero: 3 KB of it are runs, mostly unused.
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
