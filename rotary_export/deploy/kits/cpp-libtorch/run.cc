// Run a graph of a rotary_export bundle with libtorch.
//
//   run GRAPH.pt signature.txt FOLDER...
//
// Of each FOLDER, NAME.npy are the inputs; outputs go to FOLDER/out/NAME.npy, and are compared with
// FOLDER/expected/NAME.npy where that is there.
#include <torch/script.h>

#include <iostream>
#include <string>
#include <vector>

#include "folder.h"

torch::jit::Module Load(const std::string& path) {
  try {
    return torch::jit::load(path);
  } catch (const c10::Error& error) {
    throw std::runtime_error(path + " must be a TorchScript file, GRAPH.pt; " + Describe(error));
  }
}

std::vector<at::Tensor> Run(torch::jit::Module& module, const std::vector<at::Tensor>& inputs) {
  const c10::InferenceMode guard;
  const c10::IValue result = module.forward({inputs.begin(), inputs.end()});
  std::vector<at::Tensor> outputs;
  for (const auto& output : result.toTuple()->elements()) outputs.push_back(output.toTensor());
  return outputs;
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: run GRAPH.pt signature.txt FOLDER...\n";
    return 2;
  }
  try {
    const Signature signature = ReadSignature(argv[2]);
    torch::jit::Module module = Load(argv[1]);
    for (int i = 3; i < argc; ++i) {
      const std::vector<at::Tensor> inputs = ReadInputs(signature, argv[i]);
      WriteOutputs(signature, argv[i], Run(module, inputs));
    }
  } catch (const c10::Error& error) {
    std::cerr << "error: " << Describe(error) << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
