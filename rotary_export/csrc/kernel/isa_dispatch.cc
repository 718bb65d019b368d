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
  RotateRowsFunction rotate_few;
  bool (*is_supported)();
};

bool Always() { return true; }

// The sets this library was compiled for, from the plainest to the widest. CMakeLists.txt has their
// compiler flags; the two must agree.
#if defined(__x86_64__)
bool HasAvx2() {
  // Older compilers' __builtin_cpu_supports does not know f16c.
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

// Measured with a reader after the op: below this, on the machine at hand, it would rather find the
// output in the cache. ROTARY_EXPORT_LARGE_BYTES replaces it, for benchmarks and tests.
constexpr int64_t kLargeBytes = 8 << 20;

// Below this, 512-bit vectors save less than they cost: the processor lowers its frequency for
// them, and all that runs after the call is slower for a while. Measured: 3 us of a decoding step
// of 60.
constexpr int64_t kFewBytes = 64 * 1024;

Selection Select() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // Static initialisers run in no fixed order, so not to be relied on.
#endif
  const char* wanted = std::getenv("ROTARY_EXPORT_ISA");
  if (wanted != nullptr && wanted[0] == '\0') wanted = nullptr;  // An empty variable is unset.
  Selection selection = {};
  const char* large_bytes = std::getenv("ROTARY_EXPORT_LARGE_BYTES");
  selection.large_bytes = large_bytes != nullptr ? std::atoll(large_bytes) : kLargeBytes;
  char available[64] = "";
  for (const InstructionSet& set : kInstructionSets) {
    if (!set.is_supported()) continue;
    if (available[0] != '\0') std::strcat(available, ", ");
    std::strcat(available, set.name);
    if (wanted == nullptr || std::strcmp(wanted, set.name) == 0) {
      selection.name = set.name;
      selection.rotate_rows = set.rotate_rows;
      // What is asked for by name is used for all.
      selection.rotate_few = wanted == nullptr ? set.rotate_few : set.rotate_rows;
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
  const int64_t element_size = params.x_type == DataType::kFloat64   ? 8
                               : params.x_type == DataType::kFloat32 ? 4
                                                                     : 2;
  const int64_t heads = params.query.count + params.key.count;
  return params.batch_size * params.seq_len * heads * params.head_dim * element_size;
}

RotateRowsFunction ChooseRotation(RotaryParams* params) {
  const int64_t bytes = OutputBytes(*params);
  params->large = bytes >= selected.large_bytes;
  return bytes < kFewBytes ? selected.rotate_few : selected.rotate_rows;
}

}  // namespace rotary_export
