// Runs a bundle's ONNX graph on .npy files: all tokens at once or, as a decoder does, one by one.
#define ORT_API_MANUAL_INIT  // OpenRuntime finds ONNX Runtime, of whatever version.
#include <onnxruntime_cxx_api.h>

#include <chrono>
#include <filesystem>
#include <iostream>

#include "array.h"
#include "manifest.h"
#include "runtime.h"

struct Tensor {
  std::string name;
  int axis = -1;  // Of the tokens, where they come one by one.
  Array all{};
  Ort::Value bound{nullptr};  // Memory for one token, or for all.

  void Copy(int64_t token, bool to_bound) {
    CopyIndex(&all, axis, token, bound.GetTensorMutableData<char>(), to_bound);
  }
};

struct Graph {
  Ort::Session* session;
  Ort::IoBinding binding{*session};
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<Tensor> inputs, outputs;
  int64_t tokens = 1;  // That come one by one.

  Graph(Ort::Session* session, const Manifest& manifest, const std::string& folder, bool decode)
      : session(session) {
    for (size_t i = 0; i < session->GetInputCount(); ++i) {
      Tensor& in = inputs.emplace_back();
      in.name = session->GetInputNameAllocated(i, allocator).get();
      in.all = ReadNpy(folder + "/" + in.name + ".npy");
      std::vector<int64_t> shape = in.all.shape;
      if (decode) {
        Require(i > 0 || in.name == "query", "decode accepts rotate, not a graph of " + in.name);
        const size_t rank = in.name == "position_ids" ? 2 : 4;
        in.axis = rank / 2;  // (batch_size, num_heads, seq_len, head_dim); (batch_size, seq_len)
        if (i == 0) tokens = shape.size() == rank ? shape[in.axis] : 0;
        Require(shape.size() == rank && shape[in.axis] == tokens && tokens > 0,
                in.name + " must have tokens, as many as query, got shape " + ToText(shape));
        shape[in.axis] = 1;
      }
      manifest.CheckInput(in.name, in.all, shape);
      in.bound = Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), in.all.type);
      binding.BindInput(in.name.c_str(), in.bound);
    }
    for (size_t i = 0; i < session->GetOutputCount(); ++i) {
      Tensor& out = outputs.emplace_back();
      out.name = session->GetOutputNameAllocated(i, allocator).get();
      if (decode) out.axis = 2;
      binding.BindOutput(out.name.c_str(), allocator.GetInfo());
    }
  }

  // Runs steps 0 to count - 1: one token each, starting over after the last, or all tokens.
  void Run(int64_t count) {
    for (int64_t step = 0; step < count; ++step) {
      for (Tensor& in : inputs) in.Copy(step % tokens, true);
      session->Run(Ort::RunOptions(nullptr), binding);
      if (!outputs[0].bound) KeepOutputs();
      for (Tensor& out : outputs) out.Copy(step % tokens, false);
    }
  }

  // The first run allocated the outputs; bound, they are what the next ones write to.
  void KeepOutputs() {
    std::vector<Ort::Value> values = binding.GetOutputValues();
    for (size_t i = 0; i < values.size(); ++i) {
      Tensor& out = outputs[i];
      out.bound = std::move(values[i]);
      binding.BindOutput(out.name.c_str(), out.bound);
      const auto info = out.bound.GetTensorTypeAndShapeInfo();
      out.all = {info.GetElementType(), info.GetShape(), {}};
      if (out.axis >= 0) out.all.shape[out.axis] = tokens;
      out.all.data.resize(CountBytes(out.all));
    }
  }
};

int main(int argc, char** argv) try {
  const std::vector<std::string> words(argv + 1, argv + argc);
  const std::string mode = words.empty() ? "" : words[0];
  Require((mode == "run" || mode == "decode" || mode == "time") && (argc == 6 || argc == 7),
          "usage: rotary_run run|decode|time RUNTIME GRAPH.onnx INPUTS OUTPUTS [OP_LIBRARY]");
  const std::string version = OpenRuntime(words[1]);
  const Manifest manifest(words[2]);
  manifest.CheckVersion(version, argc == 7);
  Ort::Env env(ORT_LOGGING_LEVEL_FATAL);
  Ort::SessionOptions options;
  if (argc == 7) options.RegisterCustomOpsLibrary(words[5].c_str());
  Ort::Session session(env, words[2].c_str(), options);
  Graph graph(&session, manifest, words[3], mode != "run");
  graph.Run(graph.tokens);
  for (int64_t count; mode == "time" && std::cin >> count;) {  // tools/bench/measure_cpp_latency.py
    const auto start = std::chrono::steady_clock::now();
    graph.Run(count);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::cout << seconds.count() / count << std::endl;
  }
  std::filesystem::create_directories(words[4]);
  for (const Tensor& out : graph.outputs) {
    WriteNpy(words[4] + "/" + out.name + ".npy", out.all);
    std::cout << words[4] << "/" << out.name << ".npy " << ToText(out.all.shape) << "\n";
  }
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
