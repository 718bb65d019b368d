// Run a graph of a rotary_export bundle with libtorch.
//
//   run GRAPH.pt signature.txt FOLDER...
//   run GRAPH.pt signature.txt --generate MAX_NEW_TOKENS IDS...
//
// NAME.npy in each FOLDER are the inputs. Outputs go to FOLDER/out/NAME.npy and are compared with
// FOLDER/expected/NAME.npy, where that file exists. A decoder generates after prompts of
// token ids, as 5,6,7.
#include <torch/script.h>

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
  const c10::IValue result = module.forward({inputs.begin(), inputs.end()});
  std::vector<at::Tensor> outputs;
  for (const auto& output : result.toTuple()->elements()) outputs.push_back(output.toTensor());
  return outputs;
}

int main(int argc, char** argv) {
  torch::jit::setGraphExecutorOptimize(false);  // It would specialise the graph again and again.
  return RunProgram(argc, argv, "GRAPH.pt", [](const std::string& path) {
    return [module = Load(path)](const std::vector<at::Tensor>& inputs) mutable {
      return Run(module, inputs);
    };
  });
}
