// Generates token ids with a decoder, greedily, in memory that is allocated once.
#define ORT_API_MANUAL_INIT  // OpenRuntime finds ONNX Runtime, of whatever version.
#include <onnxruntime_cxx_api.h>

#include <memory>

#include "array.h"
#include "decoder.h"
#include "manifest.h"
#include "runtime.h"

// Keys or values of a layer, (1, kv_num_heads, positions, head_dim). A run reads one of the sets
// and writes the other, which is longer; of a static cache it writes new slots into what it reads.
struct Cache {
  std::string input, output;
  ONNXTensorElementDataType type;
  Ids shape;
  size_t size;  // Of one position, in bytes.
  std::unique_ptr<char[]> sets[2];
};

class Graph {
 public:
  Graph(Ort::Session* session, const Decoder& decoder)
      : session_(session),
        decoder_(decoder),
        binding_(*session),
        is_static_(decoder.max_cache_len > 0),
        is_half_(decoder.logits_dtype == "float16") {
    Ort::AllocatorWithDefaultOptions allocator;
    for (size_t i = 0; i < session->GetInputCount(); ++i) {
      const std::string name = session->GetInputNameAllocated(i, allocator).get();
      const auto info = session->GetInputTypeInfo(i);
      const auto tensor = info.GetTensorTypeAndShapeInfo();
      has_mask_ |= name == "attention_mask";
      has_positions_ |= name == "position_ids";
      if (name.rfind(kPast, 0) != 0) continue;
      const std::string output = "present" + name.substr(std::string(kPast).size());
      Cache& cache = caches_.emplace_back();
      cache = {name, output, tensor.GetElementType(), tensor.GetShape(), 0, {}};
      cache.shape[0] = cache.shape[2] = 1;
      cache.size = CountBytes({cache.type, cache.shape, {}});
    }
    Require(is_half_ || decoder.logits_dtype == "float32",
            decoder.logits + " must be float32 or float16, got " + decoder.logits_dtype);
    logits_.type =
        is_half_ ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }

  // Makes room for so many positions. Nothing else allocates for a step.
  void Begin(int64_t length) {
    if (is_static_) length = decoder_.max_cache_len;
    if (length > capacity_) {
      capacity_ = length;
      mask_.assign(length, 1);
      if (is_static_ && has_mask_) BindIds("attention_mask", &mask_, length);
      for (Cache& cache : caches_) {
        cache.sets[0].reset(new char[length * cache.size]);
        if (!is_static_) cache.sets[1].reset(new char[length * cache.size]);
        if (is_static_) BindCache(&cache, length, length);
      }
    }
    for (Cache& cache : caches_) {
      if (is_static_) std::memset(cache.sets[0].get(), 0, length * cache.size);
    }
  }

  float* Run(const int64_t* ids, int64_t count, int64_t past) {
    if (count != static_cast<int64_t>(ids_.size())) BindTokens(count);
    for (int64_t i = 0; i < count; ++i) {
      ids_[i] = ids[i];
      positions_[i] = past + i;
    }
    if (is_static_) {
      for (int64_t slot = 0; slot < capacity_; ++slot) mask_[slot] = slot < past + count;
    } else {
      if (has_mask_) BindIds("attention_mask", &mask_, past + count);
      for (Cache& cache : caches_) BindCache(&cache, past, past + count);
      current_ = 1 - current_;
    }
    session_->Run(Ort::RunOptions(nullptr), binding_);
    if (!is_half_) return reinterpret_cast<float*>(last_logits_);
    const auto* halves = reinterpret_cast<const Ort::Float16_t*>(last_logits_);
    for (int64_t id = 0; id < decoder_.vocab_size; ++id) scores_[id] = halves[id].ToFloat();
    return scores_.data();
  }

 private:
  static constexpr const char* kPast = "past_key_values";
  Ort::Session* session_;
  const Decoder& decoder_;
  Ort::IoBinding binding_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  std::vector<Cache> caches_;
  const bool is_static_, is_half_;  // The cache; the logits.
  bool has_mask_ = false, has_positions_ = false;
  int64_t capacity_ = 0;
  int current_ = 0;  // The set of each cache that holds the past.
  Ids ids_, positions_, mask_;
  Array logits_{};
  char* last_logits_ = nullptr;
  std::vector<float> scores_;

  Ort::Value Wrap(void* data, size_t bytes, const Ids& shape, ONNXTensorElementDataType type) {
    return Ort::Value::CreateTensor(memory_, data, bytes, shape.data(), shape.size(), type);
  }

  void BindCache(Cache* cache, int64_t past, int64_t total) {
    char* source = cache->sets[current_].get();
    char* target = cache->sets[is_static_ ? 0 : 1 - current_].get();
    cache->shape[2] = past;
    binding_.BindInput(cache->input.c_str(),
                       Wrap(source, past * cache->size, cache->shape, cache->type));
    cache->shape[2] = total;
    binding_.BindOutput(cache->output.c_str(),
                        Wrap(target, total * cache->size, cache->shape, cache->type));
  }

  void BindIds(const char* name, Ids* ids, int64_t count) {
    const int64_t shape[] = {1, count};
    binding_.BindInput(name, Ort::Value::CreateTensor(memory_, ids->data(), count, shape, 2));
  }

  void BindTokens(int64_t count) {
    ids_.resize(count);
    positions_.resize(count);
    BindIds(decoder_.tokens.c_str(), &ids_, count);
    if (has_positions_) BindIds("position_ids", &positions_, count);
    logits_.shape = {1, decoder_.last_logits ? 1 : count, decoder_.vocab_size};
    logits_.data.resize(CountBytes(logits_));
    last_logits_ = &logits_.data[CountBytes(logits_) - CountBytes(logits_, 2)];
    scores_.resize(is_half_ ? decoder_.vocab_size : 0);
    binding_.BindOutput(decoder_.logits.c_str(), Wrap(logits_.data.data(), logits_.data.size(),
                                                      logits_.shape, logits_.type));
  }
};

int main(int argc, char** argv) try {
  std::vector<std::string> words(argv + 1, argv + argc);
  std::string library;
  if (words.size() > 1 && words[words.size() - 2] == "--op-library") {
    library = words.back();
    words.resize(words.size() - 2);
  }
  Require(words.size() > 4,
          "usage: rotary_generate RUNTIME GRAPH.onnx decoder.txt MAX_NEW_TOKENS IDS... "
          "[--op-library FILE]");
  Manifest(words[1]).CheckVersion(OpenRuntime(words[0]), !library.empty());
  const Decoder decoder = ReadDecoder(words[2]);
  const Request request = ReadRequest(decoder, {words.begin() + 3, words.end()});
  Ort::Env env(ORT_LOGGING_LEVEL_FATAL);
  Ort::SessionOptions options;
  if (!library.empty()) options.RegisterCustomOpsLibrary(library.c_str());
  Ort::Session session(env, words[1].c_str(), options);
  Graph graph(&session, decoder);
  GenerateRows(request, [&](Ids* row) { Generate(decoder, row, request.max_new_tokens, graph); });
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
