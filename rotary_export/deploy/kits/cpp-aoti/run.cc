// Run a graph of a rotary_export bundle that AOTInductor compiled.
//
//   run GRAPH.aoti.pt2 signature.txt FOLDER...
//
// Of each FOLDER, NAME.npy are the inputs; outputs go to FOLDER/out/NAME.npy, and are compared with
// FOLDER/expected/NAME.npy where that is there.
#include <ATen/Version.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>
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
  if (argc < 4) {
    std::cerr << "usage: run GRAPH.aoti.pt2 signature.txt FOLDER...\n";
    return 2;
  }
  try {
    const Signature signature = ReadSignature(argv[2]);
    CheckMachine(argv[1]);
    AOTIModelPackageLoader loader(argv[1]);
    for (int i = 3; i < argc; ++i) {
      const std::vector<at::Tensor> inputs = ReadInputs(signature, argv[i]);
      const c10::InferenceMode guard;
      WriteOutputs(signature, argv[i], loader.run(inputs));
    }
  } catch (const c10::Error& error) {
    std::cerr << "error: " << Describe(error) << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
