// The slice of NVIDIA's driver, libcuda.so.1, that launching a kernel takes, looked up when the
// first kernel is launched. So the library needs no CUDA runtime: it loads on machines without a
// driver, and nothing in it asks for a recent glibc (the static CUDA runtime 13 asks for 2.34).
// tests/csrc/test_cuda_build.py holds the signatures against the toolkit's cuda.h.
#ifndef ROTARY_EXPORT_CUDA_CUDA_DRIVER_H_
#define ROTARY_EXPORT_CUDA_CUDA_DRIVER_H_

#include "kernel/message.h"

// The driver's own opaque types, at global scope, as cuda.h has them.
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

// Returns the driver, the same one every time, or null with a message.
const CudaDriver* FindCudaDriver(Message* message);

// The device code of rotary_kernel.cu: a fatbin, for all architectures.
const void* CudaDeviceCode();

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_CUDA_CUDA_DRIVER_H_
