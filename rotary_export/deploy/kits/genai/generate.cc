// Generates token ids with this folder's model, greedily, with onnxruntime-genai. Its wheel has no
// header: what is called here is named and typed at each call.
//
//   g++ -std=c++17 generate.cc -o generate -ldl
#include <dlfcn.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "decoder.h"

// The C functions of libonnxruntime-genai.so. Those that can fail return a result, or null.
class Genai {
 public:
  // `runtime` is the library of ONNX Runtime, which genai opens.
  Genai(const std::string& library, const std::string& runtime) {
    setenv("ORT_LIB_PATH", runtime.c_str(), 1);
    library_ = dlopen(library.c_str(), RTLD_NOW);
    if (library_ == nullptr) Refuse(std::string("GENAI: ") + dlerror());
  }

  template <typename Function>
  Function* Find(const char* name) const {
    void* found = dlsym(library_, name);
    if (found == nullptr) Refuse(std::string("GENAI: there is no function ") + name);
    return reinterpret_cast<Function*>(found);
  }

  template <typename... Types>
  void Call(const char* name, Types... values) const {
    void* result = Find<void*(Types...)>(name)(values...);
    if (result == nullptr) return;
    const std::string message = Find<const char*(void*)>("OgaResultGetError")(result);
    Find<void(void*)>("OgaDestroyResult")(result);
    Refuse(message);
  }

  using Handle = std::unique_ptr<void, void (*)(void*)>;

  // Calls OgaCreate... of a kind of object.
  template <typename... Types>
  Handle Create(const std::string& kind, const std::string& suffix, Types... values) const {
    void* made = nullptr;
    Call(("OgaCreate" + kind + suffix).c_str(), values..., &made);
    return {made, Find<void(void*)>(("OgaDestroy" + kind).c_str())};
  }

 private:
  void* library_;
};

void Generate(const Genai& genai, void* model, Ids* row, int64_t count) {
  const auto params = genai.Create("GeneratorParams", "", model);
  const char* set_number = "OgaGeneratorParamsSetSearchNumber";
  genai.Call(set_number, params.get(), "max_length", static_cast<double>(row->size() + count));
  genai.Call("OgaGeneratorParamsSetSearchBool", params.get(), "do_sample", false);
  const auto generator = genai.Create("Generator", "", model, params.get());
  const std::vector<int32_t> ids(row->begin(), row->end());
  genai.Call("OgaGenerator_AppendTokens", generator.get(), ids.data(), ids.size());
  const auto is_done = genai.Find<bool(void*)>("OgaGenerator_IsDone");
  while (!is_done(generator.get())) {
    const int32_t* tokens = nullptr;
    size_t size = 0;
    genai.Call("OgaGenerator_GenerateNextToken", generator.get());
    genai.Call("OgaGenerator_GetNextTokens", generator.get(), &tokens, &size);
    row->push_back(tokens[0]);
  }
}

int main(int argc, char** argv) try {
  std::vector<std::string> words(argv + 1, argv + argc);
  const bool has_library = !words.empty() && words.back() == "--op-library";
  if (has_library) words.pop_back();
  if (words.size() < 5) {
    Refuse("usage: generate GENAI RUNTIME FOLDER MAX_NEW_TOKENS IDS... [--op-library]");
  }
  const Decoder decoder = ReadDecoder(words[2] + "/decoder.txt");
  const Request request = ReadRequest(decoder, {words.begin() + 3, words.end()});
  const Genai genai(words[0], words[1]);
  const auto config = genai.Create("Config", "", words[2].c_str());
  const char* overlay =
      R"({"model": {"decoder": {"session_options": {"custom_ops_library": "librotary_export.so"}}}})";
  if (has_library) genai.Call("OgaConfigOverlay", config.get(), overlay);
  const auto model = genai.Create("Model", "FromConfig", config.get());
  GenerateRows(request,
               [&](Ids* row) { Generate(genai, model.get(), row, request.max_new_tokens); });
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
