// The command line. A graph runs on folders of .npy files: inputs from a folder, outputs into its
// folder out/. Or a decoder generates.
#ifndef ROTARY_EXPORT_FOLDER_H_
#define ROTARY_EXPORT_FOLDER_H_

#include <c10/core/InferenceMode.h>

#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "generate.h"
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

// Also prints the difference from expected/NAME.npy, where that file exists.
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

// The program `run`. `load` accepts the path of the graph and returns a function from inputs to
// outputs. Returns the exit code.
template <typename Load>
int RunProgram(int argc, char** argv, const std::string& graph, Load load) {
  const bool is_generate = argc > 3 && std::string(argv[3]) == "--generate";
  if (argc < (is_generate ? 6 : 4)) {
    std::cerr << "usage: run " << graph << " signature.txt FOLDER...\n       run " << graph
              << " signature.txt --generate MAX_NEW_TOKENS IDS...\n";
    return 2;
  }
  try {
    const Signature signature = ReadSignature(argv[2]);
    if (is_generate) {
      const auto file = std::filesystem::path(argv[2]).replace_filename("decoder.txt");
      const Decoder decoder = ReadDecoder(file.string());
      const Request request = ReadRequest(decoder, {argv + 4, argv + argc});
      DecoderGraph decoder_graph(signature, decoder, load(std::string(argv[1])));
      const c10::InferenceMode guard;
      GenerateRows(request, [&](Ids* row) {
        Generate(decoder, row, request.max_new_tokens, decoder_graph);
      });
      return 0;
    }
    auto run = load(std::string(argv[1]));
    for (int i = 3; i < argc; ++i) {
      const std::vector<at::Tensor> inputs = ReadInputs(signature, argv[i]);
      const c10::InferenceMode guard;
      WriteOutputs(signature, argv[i], run(inputs));
    }
    return 0;
  } catch (const c10::Error& error) {
    std::cerr << "error: " << Describe(error) << "\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
  }
  return 1;
}

#endif  // ROTARY_EXPORT_FOLDER_H_
