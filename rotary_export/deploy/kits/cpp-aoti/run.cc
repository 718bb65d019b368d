// Run a graph of a rotary_export bundle that AOTInductor compiled.
//
//   run GRAPH.aoti.pt2 signature.txt FOLDER...
//   run GRAPH.aoti.pt2 signature.txt --generate MAX_NEW_TOKENS IDS...
//
// NAME.npy in each FOLDER are the inputs. Outputs go to FOLDER/out/NAME.npy and are compared with
// FOLDER/expected/NAME.npy, where that file exists. A decoder generates after prompts of
// token ids, as 5,6,7.
#include <ATen/Version.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "folder.h"

using torch::inductor::AOTIModelPackageLoader;

// Code for another instruction set would end the process.
void CheckMachine(const std::string& package) {
  std::unordered_map<std::string, std::string> needs;
  try {
    needs = AOTIModelPackageLoader::load_metadata_from_package(package, "model");
  } catch (const c10::Error& error) {
    throw std::runtime_error(package + " must be a compiled graph, GRAPH.aoti.pt2; " +
                             Describe(error));
  }
  const std::string needed = needs["AOTI_CPU_ISA"], has = at::get_cpu_capability();
  if (needed != has && !(needed == "AVX2" && has == "AVX512")) {
    throw std::runtime_error(package + " can't run here: it needs " + needed +
                             ", this machine has " + has);
  }
}

int main(int argc, char** argv) {
  return RunProgram(argc, argv, "GRAPH.aoti.pt2", [](const std::string& path) {
    CheckMachine(path);
    auto loader = std::make_shared<AOTIModelPackageLoader>(path);
    return [loader](const std::vector<at::Tensor>& inputs) { return loader->run(inputs); };
  });
}
