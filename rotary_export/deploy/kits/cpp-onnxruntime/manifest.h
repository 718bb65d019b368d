// What a bundle's manifest.json requires of a run: the version of ONNX Runtime, and inputs in their
// limits. Older versions read outside the tables at a bad position.
#ifndef ROTARY_EXPORT_MANIFEST_H_
#define ROTARY_EXPORT_MANIFEST_H_

#include <cctype>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "array.h"

// A value of JSON: a text (a string, number, true, false or null), or items, which an object's keys
// name.
struct Json {
  std::string text;
  std::vector<std::string> keys;
  std::vector<Json> items;

  const Json* Find(const std::string& key) const {
    for (size_t i = 0; i < keys.size(); ++i) {
      if (keys[i] == key) return &items[i];
    }
    return nullptr;
  }
  const Json& At(const std::string& key) const {
    const Json* item = Find(key);
    Require(item != nullptr, "manifest.json must have " + key);
    return *item;
  }
  int64_t ToInteger() const { return std::strtoll(text.c_str(), nullptr, 10); }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : at_(text.c_str()) {}

  Json ReadAll() {
    Json value = Read(0);
    RequireNext(Peek() == '\0');
    return value;
  }

 private:
  static constexpr int kMaxDepth = 64;
  const char* at_;

  void RequireNext(bool holds) {
    Require(holds, "manifest.json must be JSON, got " + std::string(at_).substr(0, 20));
  }
  char Peek() {
    while (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t') ++at_;
    return *at_;
  }
  bool Skip(char wanted) { return Peek() == wanted && ++at_; }

  Json Read(int depth) {
    RequireNext(depth < kMaxDepth);
    Json value;
    const bool is_object = Peek() == '{';
    if (is_object || *at_ == '[') {
      const char end = *at_++ == '{' ? '}' : ']';
      for (bool more = !Skip(end); more; more = Skip(',')) {
        if (is_object) value.keys.push_back(ReadString());
        RequireNext(!is_object || Skip(':'));
        value.items.push_back(Read(depth + 1));
        if (Skip(end)) return value;
        RequireNext(*at_ == ',');
      }
      return value;
    }
    if (*at_ == '"') {
      value.text = ReadString();
      return value;
    }
    while (std::isalnum(static_cast<unsigned char>(*at_)) || *at_ == '-' || *at_ == '+' ||
           *at_ == '.') {
      value.text += *at_++;
    }
    RequireNext(!value.text.empty());
    return value;
  }

  std::string ReadString() {
    RequireNext(Skip('"'));
    std::string text;
    for (; *at_ != '"'; ++at_) {
      RequireNext(*at_ != '\0');
      if (*at_ != '\\') {
        text += *at_;
      } else if (*++at_ == 'u') {
        AppendCodePoint(&text);
      } else {
        RequireNext(*at_ != '\0');
        text += *at_;  // Control characters stay letters: no name has one.
      }
    }
    ++at_;
    return text;
  }

  // Of four digits, as UTF-8. The halves of a pair stay two code points, which no name equals.
  void AppendCodePoint(std::string* text) {
    const std::string digits = std::string(at_ + 1).substr(0, 4);
    RequireNext(digits.find_first_not_of("0123456789abcdefABCDEF") == std::string::npos &&
                digits.size() == 4);
    at_ += 4;
    const int code = static_cast<int>(std::strtol(digits.c_str(), nullptr, 16));
    if (code < 0x80) {
      *text += static_cast<char>(code);
      return;
    }
    if (code >= 0x800) *text += static_cast<char>(0xe0 | code >> 12);
    *text += static_cast<char>(code >= 0x800 ? 0x80 | (code >> 6 & 0x3f) : 0xc0 | code >> 6);
    *text += static_cast<char>(0x80 | (code & 0x3f));
  }
};

class Manifest {
 public:
  // Reads the manifest beside a graph's file.
  explicit Manifest(const std::string& graph) {
    const std::filesystem::path file(graph);
    const std::string path = (file.parent_path() / "manifest.json").string();
    std::ifstream stream(path, std::ios::binary);
    Require(stream.is_open(), path + " can't be opened");
    whole_ = JsonReader({std::istreambuf_iterator<char>(stream), {}}).ReadAll();
    for (const Json& info : whole_.At("graphs").items) {
      const Json* name = info.At("files").Find("onnx");
      if (name != nullptr && name->text == file.filename()) graph_ = &info;
    }
    Require(graph_ != nullptr, path + " must describe " + file.filename().string());
  }
  Manifest(const Manifest&) = delete;

  void CheckVersion(const std::string& version, bool fused) const {
    const Json& minimum = whole_.At("minimum_onnxruntime").At(fused ? "fused" : "portable");
    int got[2] = {}, wanted[2] = {};
    std::sscanf(version.c_str(), "%d.%d", &got[0], &got[1]);
    const bool read = std::sscanf(minimum.text.c_str(), "%d.%d", &wanted[0], &wanted[1]) == 2;
    const bool older = got[0] != wanted[0] ? got[0] < wanted[0] : got[1] < wanted[1];
    Require(read && !older,
            "the bundle needs ONNX Runtime >= " + minimum.text + ", got " + version);
  }

  // `all` are the values of all tokens; `shape` is that of one run.
  void CheckInput(const std::string& name, const Array& all,
                  const std::vector<int64_t>& shape) const {
    for (const Json& info : graph_->At("inputs").items) {
      if (info.At("name").text != name) continue;
      const std::vector<Json>& dims = info.At("shape").items;
      for (size_t i = 0; i < dims.size() && i < shape.size(); ++i) {
        CheckSize(dims[i].text, shape[i]);
      }
      if (info.At("limits").items.size() == 2) CheckLimits(name, info.At("limits").items, all);
      return;
    }
    throw std::runtime_error("manifest.json must describe the input " + name);
  }

 private:
  Json whole_;
  const Json* graph_ = nullptr;

  void CheckSize(const std::string& dim, int64_t size) const {
    for (const char* kind : {"max_size", "min_size"}) {
      const bool is_max = kind[1] == 'a';
      const Json* sizes = graph_->Find(kind);
      const Json* limit = sizes != nullptr ? sizes->Find(dim) : nullptr;
      if (limit == nullptr) continue;
      Require(is_max ? size <= limit->ToInteger() : size >= limit->ToInteger(),
              dim + (is_max ? " must be <= " : " must be >= ") + limit->text + ", got " +
                  std::to_string(size));
    }
  }

  static void CheckLimits(const std::string& name, const std::vector<Json>& limits,
                          const Array& all) {
    Require(all.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, name + " must be int64");
    const int64_t low = limits[0].ToInteger(), high = limits[1].ToInteger();
    const size_t rank = all.shape.size();
    for (size_t i = 0; i < all.data.size() / sizeof(int64_t); ++i) {
      int64_t value;
      std::memcpy(&value, &all.data[i * sizeof value], sizeof value);
      if (low <= value && value <= high) continue;
      std::string where;
      if (rank > 1) {
        const size_t rows = all.shape[rank - 1], batches = all.shape[rank - 2];
        where =
            " at batch " + std::to_string(i / rows % batches) + ", row " + std::to_string(i % rows);
      }
      throw std::runtime_error(name + " must be in [" + std::to_string(low) + ", " +
                               std::to_string(high + 1) + "), got " + std::to_string(value) +
                               where);
    }
  }
};

#endif  // ROTARY_EXPORT_MANIFEST_H_
