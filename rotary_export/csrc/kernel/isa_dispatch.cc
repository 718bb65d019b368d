#include "kernel/isa_dispatch.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rotary_export {
namespace {

struct InstructionSet {
  const char* name;
  RotateRowsFunction rotate_rows;
  RotateRowsFunction rotate_small;
  bool (*is_supported)();
};

bool Always() { return true; }

// The sets that this library was compiled for, from the narrowest to the widest; the last supported
// one is used. CMakeLists.txt has their compiler flags; the two must agree.
#if defined(__x86_64__)
bool HasAvx2() {
  // Older compilers' __builtin_cpu_supports lacks f16c.
  unsigned eax, ebx, ecx, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2");
}

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool HasAvx512Bf16() { return HasAvx512() && __builtin_cpu_supports("avx512bf16"); }

constexpr InstructionSet kInstructionSets[] = {
    {"baseline", baseline::RotateRows, baseline::RotateRows, Always},
    {"avx2", avx2::RotateRows, avx2::RotateRows, HasAvx2},
    {"avx512", avx512::RotateRows, avx2::RotateRows, HasAvx512},
    {"avx512bf16", avx512bf16::RotateRows, avx2::RotateRows, HasAvx512Bf16},
};
#elif defined(__aarch64__)
constexpr InstructionSet kInstructionSets[] = {
    {"neon", neon::RotateRows, neon::RotateRows, Always}};
#else
constexpr InstructionSet kInstructionSets[] = {
    {"baseline", baseline::RotateRows, baseline::RotateRows, Always}};
#endif

// Measured with a reader after the op: below this size, on the machine at hand, the reader is
// faster if it finds the output in the cache. ROTARY_EXPORT_STREAMING_BYTES replaces it in
// benchmarks and tests.
constexpr int64_t kStreamingBytes = 8 << 20;

// Below this size, 512-bit vectors save less than they cost: the processor lowers its frequency for
// them, which slows down what runs after the call. Measured: 3 us of a decoding step of 60.
constexpr int64_t kSmallBytes = 64 * 1024;

Selection Select() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // This is a static initialiser too, and those run in no fixed order.
#endif
  const char* wanted = std::getenv("ROTARY_EXPORT_ISA");
  if (wanted != nullptr && wanted[0] == '\0') wanted = nullptr;  // An empty variable is unset.
  Selection selection = {};
  const char* bytes = std::getenv("ROTARY_EXPORT_STREAMING_BYTES");
  selection.streaming_bytes = bytes != nullptr ? std::atoll(bytes) : kStreamingBytes;
  char available[256] = "";
  for (const InstructionSet& set : kInstructionSets) {
    if (!set.is_supported()) continue;
    if (available[0] != '\0') std::strcat(available, ", ");
    std::strcat(available, set.name);
    if (wanted == nullptr || std::strcmp(wanted, set.name) == 0) {
      selection.name = set.name;
      selection.rotate_rows = set.rotate_rows;
      // A set that the variable names rotates outputs of every size.
      selection.rotate_small = wanted == nullptr ? set.rotate_small : set.rotate_rows;
    }
  }
  if (selection.name == nullptr) {
    Fail(&selection.problem, "ROTARY_EXPORT_ISA must be one of %s on this machine, got %s",
         available, wanted);
  }
  return selection;
}

const Selection selected = Select();

}  // namespace

const Selection& SelectedInstructionSet() { return selected; }

int64_t OutputBytes(const RotaryParams& params) {
  const int64_t heads = params.query.count + params.key.count;
  return params.batch_size * params.seq_len * heads * params.head_dim * SizeOf(params.x_type);
}

RotateRowsFunction ChooseRotation(RotaryParams* params) {
  const int64_t bytes = OutputBytes(*params);
  params->use_streaming = bytes >= selected.streaming_bytes;
  return bytes < kSmallBytes ? selected.rotate_small : selected.rotate_rows;
}

void RotatePart(const RotaryParams& params, RotateRowsFunction rotate_rows, int64_t part,
                int64_t parts) {
  const int64_t rows = params.batch_size * params.seq_len;
  rotate_rows(params, rows * part / parts, rows * (part + 1) / parts);
}

}  // namespace rotary_export
