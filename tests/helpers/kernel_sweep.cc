// Sweeps the CPU kernel where Python does not run: under AddressSanitizer,
// UndefinedBehaviorSanitizer and ThreadSanitizer, and on another processor in an emulator. Every
// buffer is a separate allocation that ends with the numbers, so a sanitizer detects an access past
// it; without one, guards around the outputs do, or pages that can't be accessed
// (KERNEL_SWEEP_GUARD_PAGES). The oracle computes one number at a time and shares no code with the
// kernel. Prints the number of calls, or the first that is wrong.
//
//   kernel_sweep                every head dimension and alignment
//   kernel_sweep SEED CALLS     random calls
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "rotary_export.h"

namespace {

using Bytes = std::vector<unsigned char>;

constexpr unsigned char kSentinel = 0xa5;
#if defined(__SANITIZE_ADDRESS__) || defined(KERNEL_SWEEP_GUARD_PAGES)
constexpr size_t kGuard = 0;  // The allocation's own end is watched.
#else
constexpr size_t kGuard = 192;
#endif

uint64_t random_state = 1;
uint64_t Draw(uint64_t below) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (random_state >> 33) % below;
}

size_t SizeOf(int type) {
  return type == ROTARY_EXPORT_FLOAT64 ? 8 : type == ROTARY_EXPORT_FLOAT32 ? 4 : 2;
}

// ---- The half types, by arithmetic: bits after the leading one, smallest normal exponent

struct Format {
  int fraction_bits;
  int lowest;
};
Format FormatOf(int type) {
  return type == ROTARY_EXPORT_FLOAT16 ? Format{10, -14} : Format{7, -126};
}

double DecodeHalf(uint16_t bits, Format format) {
  const int exponent_bits = 15 - format.fraction_bits;
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const int exponent = (bits >> format.fraction_bits) & ((1 << exponent_bits) - 1);
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = fraction == 0 ? HUGE_VAL : NAN;
  } else if (exponent == 0) {
    value = std::ldexp(fraction, format.lowest - format.fraction_bits);
  } else {
    value = std::ldexp(fraction + (1 << format.fraction_bits),
                       exponent - 1 + format.lowest - format.fraction_bits);
  }
  return (bits & 0x8000) != 0 ? -value : value;
}

uint16_t EncodeHalf(double value, Format format) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const int infinity = (1 << 15) - (1 << format.fraction_bits);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | infinity | 1);
  if (std::isinf(value)) return static_cast<uint16_t>(sign | infinity);
  int exponent = format.lowest;
  if (value != 0 && std::ilogb(value) > exponent) exponent = std::ilogb(value);
  // In units of the last place, rounded to nearest even; a carry increments the exponent.
  const double units =
      std::nearbyint(std::ldexp(std::fabs(value), format.fraction_bits - exponent));
  const double bits = units + std::ldexp(exponent - format.lowest, format.fraction_bits);
  return static_cast<uint16_t>(sign | static_cast<int>(bits < infinity ? bits : infinity));
}

double Get(const unsigned char* from, int type) {
  if (type == ROTARY_EXPORT_FLOAT64) {
    double value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  if (type == ROTARY_EXPORT_FLOAT32) {
    float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return DecodeHalf(bits, FormatOf(type));
}

void Put(double value, int type, unsigned char* to) {
  const float single = static_cast<float>(value);
  const uint16_t half = SizeOf(type) == 2 ? EncodeHalf(value, FormatOf(type)) : 0;
  const void* from = &value;
  if (type == ROTARY_EXPORT_FLOAT32) from = &single;
  if (SizeOf(type) == 2) from = &half;
  std::memcpy(to, from, SizeOf(type));
}

// ---- One call

struct Case {
  int type, table_type;
  bool interleaved, scaled, in_place;
  int64_t heads, seq_len, head_dim, rotary_dim;
  size_t in_offset, out_offset;
  int64_t parts;
};

// a * b, rounded to the type of the computation. Volatile, so that no compiler fuses it with a sum.
double Multiply(double a, double b, int type) {
  volatile float single = static_cast<float>(a) * static_cast<float>(b);
  volatile double both = a * b;
  return type == ROTARY_EXPORT_FLOAT64 ? both : double{single};
}

double Add(double a, double b, int type) {
  volatile float single = static_cast<float>(a) + static_cast<float>(b);
  return type == ROTARY_EXPORT_FLOAT64 ? a + b : double{single};
}

// x (heads, seq_len, head_dim), tables (seq_len, rotary_dim / 2); `inverse`: scaled like a key.
Bytes Expect(const Case& c, const Bytes& x, const Bytes* tables, bool inverse) {
  const size_t size = SizeOf(c.type), table_size = SizeOf(c.table_type);
  Bytes y = x;
  for (int64_t vector = 0; vector < c.heads * c.seq_len; ++vector) {
    for (int64_t i = 0; i < c.rotary_dim / 2; ++i) {
      const int64_t first = vector * c.head_dim + (c.interleaved ? 2 * i : i);
      const int64_t second = first + (c.interleaved ? 1 : c.rotary_dim / 2);
      const int64_t entry = vector % c.seq_len * (c.rotary_dim / 2) + i;
      const double x1 = Get(&x[first * size], c.type), x2 = Get(&x[second * size], c.type);
      double factors[3];
      for (int t = 0; t < 3; ++t) factors[t] = Get(&tables[t][entry * table_size], c.table_type);
      double a = Multiply(x1, factors[0], c.type), b = Multiply(x2, factors[1], c.type);
      double d = Multiply(x2, factors[0], c.type), e = Multiply(x1, factors[1], c.type);
      if (c.scaled) {
        double scale = factors[2];
        if (inverse && c.type == ROTARY_EXPORT_FLOAT64) scale = 1 / scale;
        if (inverse && c.type != ROTARY_EXPORT_FLOAT64) scale = 1 / static_cast<float>(scale);
        for (double* product : {&a, &b, &d, &e}) *product = Multiply(*product, scale, c.type);
      }
      Put(Add(a, -b, c.type), c.type, &y[first * size]);
      Put(Add(d, e, c.type), c.type, &y[second * size]);
    }
  }
  return y;
}

bool SameNumbers(const unsigned char* got, const Bytes& want, int type) {
  for (size_t i = 0; i < want.size(); i += SizeOf(type)) {
    if (std::memcmp(got + i, &want[i], SizeOf(type)) == 0) continue;
    if (!std::isnan(Get(got + i, type)) || !std::isnan(Get(&want[i], type))) return false;
  }
  return true;
}

Bytes DrawNumbers(int64_t count, int type) {
  Bytes numbers(static_cast<size_t>(count) * SizeOf(type));
  for (size_t i = 0; i < numbers.size(); i += SizeOf(type)) {
    double value = (static_cast<double>(Draw(2000001)) - 1e6) * std::pow(10, -double(Draw(13)));
    const uint64_t special = Draw(300);
    if (special < 3) value = special == 0 ? NAN : special == 1 ? HUGE_VAL : -HUGE_VAL;
    Put(value, type, &numbers[i]);
  }
  return numbers;
}

RotaryExportTensor Describe(const void* data, int type, std::vector<int64_t> shape) {
  RotaryExportTensor tensor = {};
  tensor.data = const_cast<void*>(data);
  tensor.type = type;
  tensor.rank = static_cast<int32_t>(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) {
    tensor.shape[i] = shape[i];
    tensor.strides[i] = stride;
  }
  return tensor;
}

// Memory for numbers that start `offset` bytes past a multiple of 64, between guards.
class Buffer {
 public:
#ifdef KERNEL_SWEEP_GUARD_PAGES
  // The numbers end where a page begins that can't be accessed; for an odd offset, they begin where
  // one ends.
  Buffer(size_t size, size_t offset) : size_(size) {
    constexpr size_t kPage = 4096;
    const size_t pages = (size / kPage + 1) * kPage;
    mapped_ = pages + 2 * kPage;
    memory_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) std::abort();
    unsigned char* first = static_cast<unsigned char*>(memory_) + kPage;
    if (mprotect(first, pages, PROT_READ | PROT_WRITE) != 0) std::abort();
    std::memset(first, kSentinel, pages);
    data_ = offset % 2 == 0 ? first + (pages - size) : first;
  }
  ~Buffer() { munmap(memory_, mapped_); }
#else
  Buffer(size_t size, size_t offset) : size_(size), mapped_(offset + size + 2 * kGuard) {
    if (posix_memalign(&memory_, 64, mapped_) != 0) std::abort();
    std::memset(memory_, kSentinel, mapped_);
    data_ = static_cast<unsigned char*>(memory_) + offset + kGuard;
  }
  ~Buffer() { std::free(memory_); }
#endif
  Buffer(const Bytes& numbers, size_t offset) : Buffer(numbers.size(), offset) {
    if (size_ > 0) std::memcpy(data_, numbers.data(), size_);
  }
  Buffer(const Buffer&) = delete;

  unsigned char* data() const { return data_; }
  bool GuardsHold() const {
    for (size_t i = 1; i <= kGuard; ++i) {
      if (data_[-static_cast<ptrdiff_t>(i)] != kSentinel || data_[size_ + i - 1] != kSentinel) {
        return false;
      }
    }
    return true;
  }

 private:
  void* memory_ = nullptr;
  unsigned char* data_ = nullptr;
  size_t size_, mapped_;
};

// Rotates on this thread, or in parts on this and another one. Returns whether it succeeded.
bool Rotate(const RotaryExportCall& call, int64_t parts) {
  RotaryExportTeam team = {};
  team.call = &call;
  team.parts = parts;
  if (parts == 1) {
    team.failed = RotaryExportRotate(&call, team.message, sizeof team.message);
  } else {
    std::thread other(RotaryExportRotateTeam, &team);
    RotaryExportRotateTeam(&team);
    other.join();
  }
  if (team.failed != 0) std::printf("%s\n", team.message);
  return team.failed == 0;
}

// Runs `c` with `c.heads` query heads and one key head. Returns whether the outputs are right.
bool Run(const Case& c) {
  const int64_t half = c.rotary_dim / 2;
  Bytes tables[3];
  for (Bytes& table : tables) table = DrawNumbers(c.seq_len * half, c.table_type);
  const Buffer cos(tables[0], c.in_offset), sin(tables[1], 0), scale(tables[2], c.out_offset);
  const RotaryExportTensor cos_cache = Describe(cos.data(), c.table_type, {1, c.seq_len, half});
  const RotaryExportTensor sin_cache = Describe(sin.data(), c.table_type, {1, c.seq_len, half});
  const RotaryExportTensor scale_cache = Describe(scale.data(), c.table_type, {1, c.seq_len, half});

  Case key_case = c;
  key_case.heads = 1;
  const Bytes x = DrawNumbers(c.heads * c.seq_len * c.head_dim, c.type);
  const Bytes key = DrawNumbers(c.seq_len * c.head_dim, c.type);
  const Buffer x_in(x, c.in_offset), key_in(key, c.in_offset);
  const Buffer y_out(x.size(), c.out_offset), key_out(key.size(), c.out_offset);
  const Buffer& y_used = c.in_place ? x_in : y_out;
  const Buffer& key_used = c.in_place ? key_in : key_out;
  const std::vector<int64_t> shape = {1, c.heads, c.seq_len, c.head_dim};
  const std::vector<int64_t> key_shape = {1, 1, c.seq_len, c.head_dim};
  const RotaryExportTensor tensors[] = {
      Describe(x_in.data(), c.type, shape), Describe(key_in.data(), c.type, key_shape),
      Describe(y_used.data(), c.type, shape), Describe(key_used.data(), c.type, key_shape)};

  RotaryExportCall call = {};
  call.x = &tensors[0];
  call.key = &tensors[1];
  call.y = &tensors[2];
  call.key_out = &tensors[3];
  call.cos_cache = &cos_cache;
  call.sin_cache = &sin_cache;
  call.scale_cache = c.scaled ? &scale_cache : nullptr;
  call.interleaved = c.interleaved;
  call.rotary_embedding_dim = c.rotary_dim;
  if (!Rotate(call, c.parts)) return false;
  return SameNumbers(y_used.data(), Expect(c, x, tables, false), c.type) &&
         SameNumbers(key_used.data(), Expect(key_case, key, tables, true), c.type) &&
         y_used.GuardsHold() && key_used.GuardsHold();
}

int calls = 0;

// Runs `c` in both layouts, with random options. Exits at the first failure.
void Try(Case c) {
  for (int interleaved = 0; interleaved < 2; ++interleaved) {
    c.interleaved = interleaved != 0;
    c.scaled = Draw(2) != 0;
    c.in_place = Draw(3) == 0;
    c.parts = Draw(4) == 0 ? 1 + static_cast<int64_t>(Draw(4)) : 1;
    c.table_type = Draw(2) != 0 ? c.type : int{ROTARY_EXPORT_FLOAT32};
    ++calls;
    if (Run(c)) continue;
    std::printf(
        "wrong: type=%d table_type=%d interleaved=%d scaled=%d in_place=%d heads=%d "
        "seq_len=%d head_dim=%d rotary_dim=%d offsets=%d, %d parts=%d\n",
        c.type, c.table_type, c.interleaved, c.scaled, c.in_place, int(c.heads), int(c.seq_len),
        int(c.head_dim), int(c.rotary_dim), int(c.in_offset), int(c.out_offset), int(c.parts));
    std::exit(1);
  }
}

int64_t DrawSize(uint64_t below) { return static_cast<int64_t>(Draw(below)); }

// Small sizes mostly; now and then several blocks of rows, or a row of many channels.
void TryAny() {
  Case c = {};
  constexpr int kTypes[] = {ROTARY_EXPORT_FLOAT32, ROTARY_EXPORT_FLOAT16, ROTARY_EXPORT_BFLOAT16,
                            ROTARY_EXPORT_FLOAT64};
  c.type = kTypes[Draw(4)];
  c.heads = DrawSize(4);
  c.seq_len = DrawSize(Draw(200) == 0 ? 400 : 5);
  c.head_dim = 2 + DrawSize(Draw(100) == 0 ? 5000 : Draw(4) == 0 ? 320 : 66);
  c.rotary_dim =
      Draw(2) == 0 ? c.head_dim / 2 * 2 : 2 + 2 * DrawSize(static_cast<uint64_t>(c.head_dim / 2));
  c.in_offset = Draw(64), c.out_offset = Draw(64);
  Try(c);
}

void Sweep() {
  for (const int type : {ROTARY_EXPORT_FLOAT32, ROTARY_EXPORT_FLOAT16, ROTARY_EXPORT_BFLOAT16,
                         ROTARY_EXPORT_FLOAT64}) {
    Case c = {};
    c.type = type;
    for (size_t offset = 0; offset < 64; ++offset) {
      c.heads = 2, c.seq_len = 3, c.head_dim = 42, c.rotary_dim = 38;
      c.in_offset = offset, c.out_offset = offset * 37 % 64;
      Try(c);
    }
    for (c.head_dim = 2; c.head_dim <= 320; ++c.head_dim) {
      c.in_offset = Draw(64), c.out_offset = Draw(64);
      c.heads = static_cast<int64_t>(Draw(3)), c.seq_len = 1 + static_cast<int64_t>(Draw(3));
      c.rotary_dim = c.head_dim / 2 * 2;
      Try(c);
      c.rotary_dim = 2 + static_cast<int64_t>(Draw(static_cast<uint64_t>(c.head_dim / 2))) * 2;
      Try(c);
    }
    c.heads = 2, c.seq_len = 0, c.head_dim = 20, c.rotary_dim = 20;
    Try(c);
    c.seq_len = 300;  // Several blocks of rows.
    Try(c);
    c.seq_len = 2, c.head_dim = c.rotary_dim = 5000;  // A row that is too long for one block.
    Try(c);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3) {
    random_state = std::strtoull(argv[1], nullptr, 10);
    for (const int count = std::atoi(argv[2]); calls < count;) TryAny();
  } else {
    Sweep();
  }
  std::printf("%d calls, instruction set %s\n", calls, RotaryExportInstructionSet());
}
