// Opens ONNX Runtime, of whatever version: nothing is linked to it.
#ifndef ROTARY_EXPORT_RUNTIME_H_
#define ROTARY_EXPORT_RUNTIME_H_

#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "array.h"

// That of RegisterCustomOpsLibrary_V2, the newest function used here; later versions have it, too.
constexpr uint32_t kApiVersion = 14;

// Returns its version: "1.25.0".
inline std::string OpenRuntime(const std::string& file) {
  void* library = dlopen(file.c_str(), RTLD_NOW);
  if (library == nullptr) throw std::runtime_error(std::string("RUNTIME: ") + dlerror());
  auto get_base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
  Require(get_base != nullptr, "RUNTIME: " + file + " is not ONNX Runtime");
  const OrtApi* api = get_base()->GetApi(kApiVersion);
  Require(api != nullptr, "RUNTIME: " + file + " must be ONNX Runtime 1.14 or newer");
  Ort::InitApi(api);
  return get_base()->GetVersionString();
}

#endif  // ROTARY_EXPORT_RUNTIME_H_
