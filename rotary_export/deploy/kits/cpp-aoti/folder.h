// Inputs from a folder of .npy files, outputs into its folder out/.
#ifndef ROTARY_EXPORT_FOLDER_H_
#define ROTARY_EXPORT_FOLDER_H_

#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "npy.h"
#include "signature.h"

inline std::vector<at::Tensor> ReadInputs(const Signature& signature,
                                          const std::filesystem::path& folder) {
  std::vector<at::Tensor> inputs;
  for (const auto& input : signature.inputs) {
    inputs.push_back(ReadNpy((folder / (input.name + ".npy")).string()));
  }
  CheckInputs(signature, inputs);
  return inputs;
}

// Also says how far each is from expected/NAME.npy, where that is there.
inline void WriteOutputs(const Signature& signature, const std::filesystem::path& folder,
                         const std::vector<at::Tensor>& outputs) {
  std::filesystem::create_directories(folder / "out");
  for (size_t i = 0; i < outputs.size(); ++i) {
    const std::string file = signature.outputs[i] + ".npy";
    const auto path = folder / "out" / file, expected = folder / "expected" / file;
    WriteNpy(path.string(), outputs[i]);
    std::cout << path.string() << " " << outputs[i].sizes();
    if (std::filesystem::exists(expected)) {
      const at::Tensor want = ReadNpy(expected.string());
      const at::Tensor error = outputs[i].to(at::kDouble).sub(want.to(at::kDouble)).abs();
      std::cout << ", differs from expected by " << error.max().item<double>();
    }
    std::cout << "\n";
  }
}

inline std::string Describe(const c10::Error& error) {
  const std::string text = error.what_without_backtrace();
  return "torch: " + text.substr(0, text.find('\n'));
}

#endif  // ROTARY_EXPORT_FOLDER_H_
