// Arrays in memory and in .npy files, of the types that bundles have.
#ifndef ROTARY_EXPORT_ARRAY_H_
#define ROTARY_EXPORT_ARRAY_H_

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

struct NpyType {
  ONNXTensorElementDataType type;
  const char* descr;  // As numpy calls it; its last character is the number of bytes.
};
constexpr NpyType kNpyTypes[] = {
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "<f4"},  {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "<f2"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, "<f8"}, {ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, "<V2"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, "<i8"},  {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, "|b1"}};

struct Array {
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
  std::vector<char> data;
};

inline void Require(bool holds, const std::string& message) {
  if (!holds) throw std::runtime_error(message);
}

inline std::string GetDescr(ONNXTensorElementDataType type) {
  for (const NpyType& known : kNpyTypes) {
    if (known.type == type) return known.descr;
  }
  throw std::runtime_error("no .npy file for values of ONNX type " + std::to_string(type));
}

// Counts the bytes of all axes from the given one on.
inline size_t CountBytes(const Array& array, size_t axis = 0) {
  size_t bytes = GetDescr(array.type).back() - '0';
  for (size_t i = axis; i < array.shape.size(); ++i) {
    Require(!__builtin_mul_overflow(bytes, array.shape[i], &bytes), "a shape is too large");
  }
  return bytes;
}

// Copies the items at one index of an axis, or all if the axis is -1, between an array and
// memory.
inline void CopyIndex(Array* array, int axis, int64_t index, char* memory, bool to_memory) {
  const size_t size = axis < 0 ? array->data.size() : CountBytes(*array, axis + 1);
  const size_t stride = axis < 0 ? size : CountBytes(*array, axis);
  char* const end = array->data.data() + array->data.size();
  for (char* at = array->data.data() + index * size; at < end; at += stride, memory += size) {
    std::memcpy(to_memory ? memory : at, to_memory ? at : memory, size);
  }
}

inline std::string ToText(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + (shape.size() == 1 ? ",)" : ")");
}

inline Array ReadNpy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  Require(file.is_open(), path + " can't be opened");
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  Require(bytes.size() > 10 && bytes.rfind("\x93NUMPY\x01", 0) == 0,
          path + " must be a .npy file of version 1");
  const auto byte = [&bytes](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const size_t start = 10 + byte(8) + 256 * byte(9);
  Require(bytes.size() >= start, path + " ends within its header");
  const std::string header = bytes.substr(10, start - 10);
  const auto find = [&](const std::string& key) {  // The text from the key's value on.
    const size_t at = header.find("'" + key + "': ");
    Require(at != std::string::npos, path + " has no " + key + " in its header");
    return header.substr(at + key.size() + 4);
  };
  Require(find("fortran_order").rfind("False", 0) == 0, path + " must be in C order");

  Array array{};
  const std::string descr = find("descr"), shape = find("shape");
  for (const NpyType& known : kNpyTypes) {
    if (descr.rfind("'" + std::string(known.descr) + "'", 0) == 0) array.type = known.type;
  }
  Require(array.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED,
          path + " must hold float16, bfloat16, float32, float64, int64 or bool, got " +
              descr.substr(0, descr.find(',')));
  for (const char* at = shape.c_str() + 1; *at >= '0' && *at <= '9';) {
    char* end;
    array.shape.push_back(std::strtoll(at, &end, 10));
    for (at = end; *at == ',' || *at == ' ';) ++at;
  }
  Require(bytes.size() - start == CountBytes(array),
          path + " must hold values of shape " + ToText(array.shape) + ", which is " +
              std::to_string(CountBytes(array)) + " bytes, got " +
              std::to_string(bytes.size() - start));
  array.data.assign(bytes.data() + start, bytes.data() + bytes.size());
  return array;
}

// Writes the bytes that numpy.save does.
inline void WriteNpy(const std::string& path, const Array& array) {
  std::string header = "{'descr': '" + GetDescr(array.type) +
                       "', 'fortran_order': False, 'shape': " + ToText(array.shape) + ", }";
  // numpy leaves room for the first size to grow, then fills up to a multiple of 64.
  if (!array.shape.empty()) header.append(21 - std::to_string(array.shape[0]).size(), ' ');
  header.append(64 - (11 + header.size()) % 64, ' ').push_back('\n');
  std::ofstream file(path, std::ios::binary);
  file << "\x93NUMPY\x01" << '\0' << static_cast<char>(header.size() % 256)
       << static_cast<char>(header.size() / 256) << header;
  file.write(array.data.data(), static_cast<std::streamsize>(array.data.size()));
  Require(!!file.flush(), path + " can't be written");
}

#endif  // ROTARY_EXPORT_ARRAY_H_
