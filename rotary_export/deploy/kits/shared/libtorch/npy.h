// Tensors from and to numpy's .npy files.
#ifndef ROTARY_EXPORT_NPY_H_
#define ROTARY_EXPORT_NPY_H_

#include <ATen/Tensor.h>
#include <ATen/ops/empty.h>

#include <fstream>
#include <map>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

// By numpy's name without the byte order. It has no bfloat16: those are raw items of two bytes.
inline const std::map<std::string, at::ScalarType> kNpyTypes = {
    {"f4", at::kFloat}, {"f8", at::kDouble}, {"f2", at::kHalf}, {"V2", at::kBFloat16},
    {"i8", at::kLong},  {"i4", at::kInt},    {"b1", at::kBool},
};

inline at::Tensor ReadNpy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " can't be read");
  char head[8] = {};
  file.read(head, sizeof(head));
  if (std::string(head, 6) != "\x93NUMPY") throw std::runtime_error(path + " is not an .npy file");
  unsigned char bytes[4] = {};
  file.read(reinterpret_cast<char*>(bytes), head[6] == 1 ? 2 : 4);
  std::string text(bytes[0] | bytes[1] << 8 | bytes[2] << 16, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));

  std::smatch found;
  const std::regex pattern(
      ".*'descr': '[<|](..)', 'fortran_order': False, 'shape': \\((.*)\\).*\\s*");
  if (!std::regex_match(text, found, pattern) || !kNpyTypes.count(found[1])) {
    throw std::runtime_error(path + " must be a C-contiguous array of a type of torch, got " +
                             text.substr(0, text.find('}') + 1));
  }
  std::vector<int64_t> shape;
  const std::string sizes = found[2];
  const std::regex number("\\d+");
  for (std::sregex_iterator size(sizes.begin(), sizes.end(), number), end; size != end; ++size) {
    shape.push_back(std::stoll(size->str()));
  }
  at::Tensor tensor = at::empty(shape, kNpyTypes.at(found[1]));
  file.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  if (!file) throw std::runtime_error(path + " is cut short");
  return tensor;
}

inline void WriteNpy(const std::string& path, const at::Tensor& value) {
  const at::Tensor tensor = value.contiguous();
  std::string text = "{'descr': '<";
  for (const auto& [descr, type] : kNpyTypes) {
    if (type == tensor.scalar_type()) text += descr;
  }
  text += "', 'fortran_order': False, 'shape': (";
  for (int64_t size : tensor.sizes()) text += std::to_string(size) + ", ";
  text += "), }";
  text.append(63 - (10 + text.size()) % 64, ' ');  // data starts at a multiple of 64
  text += '\n';
  std::ofstream file(path, std::ios::binary);
  const char head[] = {'\x93',
                       'N',
                       'U',
                       'M',
                       'P',
                       'Y',
                       1,
                       0,
                       static_cast<char>(text.size() & 255),
                       static_cast<char>(text.size() >> 8)};
  file.write(head, sizeof(head)) << text;
  file.write(static_cast<const char*>(tensor.data_ptr()),
             static_cast<std::streamsize>(tensor.nbytes()));
  if (!file) throw std::runtime_error(path + " can't be written");
}

#endif  // ROTARY_EXPORT_NPY_H_
