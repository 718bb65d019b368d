#include "cuda/cuda_driver.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>

// glibc 2.34 added a new version of these two, which older images lack. The old version exists in
// all of them.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver dlopen, dlopen@GLIBC_2.17");
__asm__(".symver dlsym, dlsym@GLIBC_2.17");
#endif

// ROTARY_EXPORT_FATBIN is the file that nvcc wrote.
__asm__(
    ".pushsection .rodata\n"
    ".balign 16\n"
    "rotary_export_device_code:\n"
    ".incbin \"" ROTARY_EXPORT_FATBIN
    "\"\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) const unsigned char rotary_export_device_code[];

namespace rotary_export {
namespace {

std::atomic<CudaDriver*> known{nullptr};

template <typename Function>
bool Find(void* library, const char* name, Function* function, Message* message) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr ||
         Fail(message, "the NVIDIA driver must be that of CUDA 12 or newer, this one has no %s",
              name);
}

}  // namespace

const CudaDriver* FindCudaDriver(Message* message) {
  if (const CudaDriver* driver = known.load()) return driver;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    Fail(message, "the NVIDIA driver is not installed (libcuda.so.1 is not found)");
    return nullptr;
  }
  CudaDriver found;
  if (!Find(library, "cuGetErrorName", &found.GetErrorName, message) ||
      !Find(library, "cuInit", &found.Init, message) ||
      !Find(library, "cuLibraryLoadData", &found.LibraryLoadData, message) ||
      !Find(library, "cuLibraryGetKernel", &found.LibraryGetKernel, message) ||
      !Find(library, "cuStreamIsCapturing", &found.StreamIsCapturing, message) ||
      !Find(library, "cuLaunchKernel", &found.LaunchKernel, message)) {
    return nullptr;
  }
  auto* driver = static_cast<CudaDriver*>(std::malloc(sizeof(CudaDriver)));
  if (driver == nullptr) {
    Fail(message, "out of memory");
    return nullptr;
  }
  *driver = found;
  CudaDriver* other = nullptr;  // The driver that another thread found first, if any.
  if (known.compare_exchange_strong(other, driver)) return driver;
  std::free(driver);
  return other;
}

const void* CudaDeviceCode() { return rotary_export_device_code; }

}  // namespace rotary_export
