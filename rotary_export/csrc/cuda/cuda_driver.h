// The functions of NVIDIA's driver, libcuda.so.1, that a launch needs. They are looked up at the
// first launch. So the library needs no CUDA runtime: it loads on machines without a driver, and it
// does not require a recent glibc (the static CUDA runtime 13 requires 2.34).
// tests/csrc/test_cuda_build.py compares the signatures with the toolkit's cuda.h.
#ifndef ROTARY_EXPORT_CUDA_CUDA_DRIVER_H_
#define ROTARY_EXPORT_CUDA_CUDA_DRIVER_H_

#include "message.h"

// The driver's opaque types, at global scope as in cuda.h.
struct CUfunc_st;
struct CUkern_st;
struct CUlib_st;
struct CUstream_st;

namespace rotary_export {

struct CudaDriver {
  int (*GetErrorName)(int error, const char** name);
  int (*Init)(unsigned flags);
  int (*LibraryLoadData)(CUlib_st** library, const void* code, int* jit_options, void** jit_values,
                         unsigned jit_count, int* options, void** values, unsigned count);
  int (*LibraryGetKernel)(CUkern_st** kernel, CUlib_st* library, const char* name);
  int (*StreamIsCapturing)(CUstream_st* stream, int* status);
  int (*LaunchKernel)(CUfunc_st* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                      unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                      CUstream_st* stream, void** arguments, void** extra);
};

// Returns the driver, the same pointer at each call, or null with a message.
const CudaDriver* FindCudaDriver(Message* message);

// The device code of rotary_kernel.cu: a fatbin, for all architectures.
const void* CudaDeviceCode();

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_CUDA_CUDA_DRIVER_H_
