// Runs a decoder's graph with libtorch, for the loop in decoder.h.
#ifndef ROTARY_EXPORT_GENERATE_H_
#define ROTARY_EXPORT_GENERATE_H_

#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "decoder.h"
#include "signature.h"

// Keys and values are tensors: what a run returns, the next one reads.
template <typename RunGraph>
class DecoderGraph {
 public:
  DecoderGraph(const Signature& signature, const Decoder& decoder, RunGraph run)
      : signature_(signature), decoder_(decoder), run_(std::move(run)) {}

  void Begin(int64_t) {}  // libtorch allocates.

  float* Run(const int64_t* ids, int64_t count, int64_t past) {
    const int64_t total = past + count, slots = decoder_.max_cache_len;
    std::vector<at::Tensor> inputs;
    for (const Input& input : signature_.inputs) {
      if (input.name == decoder_.tokens) {
        inputs.push_back(at::tensor(at::IntArrayRef(ids, count), at::kLong).unsqueeze(0));
      } else if (input.name == "position_ids") {
        inputs.push_back(at::arange(past, total, at::kLong).unsqueeze(0));
      } else if (input.name == "attention_mask") {
        const at::Tensor places = at::arange(slots > 0 ? slots : total, at::kLong);
        inputs.push_back(places.lt(total).to(at::kLong).unsqueeze(0));
      } else {
        inputs.push_back(past > 0 ? std::move(caches_.at(input.name)) : MakeCache(input));
      }
    }
    std::vector<at::Tensor> outputs = run_(inputs);
    for (size_t i = 0; i < outputs.size(); ++i) {
      std::string name = signature_.outputs.at(i);
      if (name == decoder_.logits) scores_ = outputs[i].select(1, -1).to(at::kFloat).contiguous();
      if (name.rfind("present", 0) == 0) name.replace(0, 7, "past_key_values");
      caches_[name] = std::move(outputs[i]);
    }
    return scores_.template data_ptr<float>();
  }

 private:
  const Signature& signature_;
  const Decoder& decoder_;
  RunGraph run_;
  std::map<std::string, at::Tensor> caches_;
  at::Tensor scores_;

  // Of no position, or the zeros of a static cache.
  at::Tensor MakeCache(const Input& input) const {
    const int64_t heads = std::stoll(input.dims.at(1)), size = std::stoll(input.dims.at(3));
    return at::zeros({1, heads, decoder_.max_cache_len, size}, kDtypes.at(input.dtype));
  }
};

#endif  // ROTARY_EXPORT_GENERATE_H_
