// The inputs and outputs of a graph, from signature.txt, and the check of its inputs.
#ifndef ROTARY_EXPORT_SIGNATURE_H_
#define ROTARY_EXPORT_SIGNATURE_H_

#include <ATen/Tensor.h>

#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

inline const std::map<std::string, at::ScalarType> kDtypes = {
    {"float32", at::kFloat},     {"float64", at::kDouble}, {"float16", at::kHalf},
    {"bfloat16", at::kBFloat16}, {"int64", at::kLong},     {"int32", at::kInt},
    {"bool", at::kBool},
};

struct Input {
  std::string name, dtype, shape;  // shape: "(batch_size, 4, seq_len, 24)"
  std::vector<std::string> dims;
  int64_t low = 0, high = -1;  // smallest and largest legal value, where there is a limit
};

struct Signature {
  std::vector<Input> inputs;
  std::vector<std::string> outputs;
  std::map<std::string, int64_t> max_size, min_size;  // of a dynamic axis, where it has a limit
};

// Lines: "input NAME DTYPE DIM... [in LOW HIGH]", "output NAME", "max_size DIM SIZE",
// "min_size DIM SIZE".
inline Signature ReadSignature(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + " can't be read");
  Signature signature;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string kind, word;
    Input input;
    words >> kind >> input.name >> input.dtype;
    if (kind == "output") {
      signature.outputs.push_back(input.name);
      continue;
    }
    if (kind == "max_size" || kind == "min_size") {
      auto& limits = kind == "max_size" ? signature.max_size : signature.min_size;
      limits[input.name] = std::stoll(input.dtype);
      continue;
    }
    while (words >> word && word != "in") input.dims.push_back(word);
    words >> input.low >> input.high;
    for (const auto& dim : input.dims) input.shape += (input.shape.empty() ? "" : ", ") + dim;
    input.shape = "(" + input.shape + ")";
    signature.inputs.push_back(input);
  }
  if (signature.outputs.empty()) throw std::runtime_error(path + " is not a signature");
  return signature;
}

// A size is a number or a name; a sum, "2+seq_len"; or a multiple, "8*height". Names that are not
// known yet get the value that the actual size has for them.
inline int64_t ResolveDim(const std::string& dim, std::map<std::string, int64_t>& sizes,
                          int64_t got) {
  const size_t plus = dim.find('+');
  if (plus != std::string::npos) {
    return ResolveDim(dim.substr(0, plus), sizes, 0) + ResolveDim(dim.substr(plus + 1), sizes, 0);
  }
  if (dim.find_first_not_of("0123456789") == std::string::npos) return std::stoll(dim);
  const size_t times = dim.find('*');
  if (times != std::string::npos) {
    const int64_t factor = std::stoll(dim.substr(0, times));
    return factor * ResolveDim(dim.substr(times + 1), sizes, got / factor);
  }
  return sizes.emplace(dim, got).first->second;
}

inline void CheckLimits(const Input& input, const at::Tensor& value) {
  const at::Tensor items = value.to(at::kLong).contiguous();
  const int64_t* ids = items.data_ptr<int64_t>();
  for (int64_t i = 0; i < items.numel(); ++i) {
    if (input.low <= ids[i] && ids[i] <= input.high) continue;
    std::ostringstream text;
    text << input.name << " must be in [" << input.low << ", " << input.high + 1 << "), got "
         << ids[i];
    if (value.dim() > 1) {
      const int64_t rows = value.size(-1);
      text << " at batch " << i / rows % value.size(-2) << ", row " << i % rows;
    }
    throw std::invalid_argument(text.str());
  }
}

inline void CheckInput(const Input& input, const at::Tensor& value,
                       std::map<std::string, int64_t>& sizes) {
  std::ostringstream text;
  if (kDtypes.at(input.dtype) != value.scalar_type()) {
    text << " must be " << input.dtype << ", got " << value.scalar_type();
    throw std::invalid_argument(input.name + text.str());
  }
  bool fits = value.dim() == static_cast<int64_t>(input.dims.size());
  for (int64_t axis = 0; fits && axis < value.dim(); ++axis) {
    fits = ResolveDim(input.dims[axis], sizes, value.size(axis)) == value.size(axis);
  }
  if (!fits) {
    text << " must have shape " << input.shape;
    for (const auto& [name, size] : sizes) text << ", " << name << "=" << size;
    text << ", got " << value.sizes();
    throw std::invalid_argument(input.name + text.str());
  }
  if (input.low <= input.high) CheckLimits(input, value);
}

// Compiled graphs check nothing: another shape or type would be read out of bounds.
inline void CheckInputs(const Signature& signature, const std::vector<at::Tensor>& tensors) {
  std::map<std::string, int64_t> sizes;
  for (const bool sums : {false, true}) {  // a sum is known once the other shapes are
    for (size_t i = 0; i < signature.inputs.size(); ++i) {
      const Input& input = signature.inputs[i];
      const bool has_sum = input.shape.find('+') != std::string::npos;
      if (has_sum == sums) CheckInput(input, tensors[i], sizes);
    }
  }
  for (const auto& [dim, largest] : signature.max_size) {
    if (sizes[dim] > largest) {
      throw std::invalid_argument(dim + " must be <= " + std::to_string(largest) + ", got " +
                                  std::to_string(sizes[dim]));
    }
  }
  for (const auto& [dim, smallest] : signature.min_size) {
    if (sizes[dim] < smallest) {
      throw std::invalid_argument(dim + " must be >= " + std::to_string(smallest) + ", got " +
                                  std::to_string(sizes[dim]));
    }
  }
}

#endif  // ROTARY_EXPORT_SIGNATURE_H_
