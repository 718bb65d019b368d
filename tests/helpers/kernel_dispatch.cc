// Prints what isa_dispatch.cc chooses on an x86-64 with the features in environment variable
// FAKE_CPU. tests/csrc/test_isa_dispatch.py compiles it with kernel_dispatch_cpu.h.
#include <cstdio>
#include <cstring>

#include "kernel/isa_dispatch.h"

namespace rotary_export {
namespace baseline {
void RotateRows(const RotaryParams&, int64_t, int64_t) { std::printf("baseline"); }
}  // namespace baseline
namespace avx2 {
void RotateRows(const RotaryParams&, int64_t, int64_t) { std::printf("avx2"); }
}  // namespace avx2
namespace avx512 {
void RotateRows(const RotaryParams&, int64_t, int64_t) { std::printf("avx512"); }
}  // namespace avx512
namespace avx512bf16 {
void RotateRows(const RotaryParams&, int64_t, int64_t) { std::printf("avx512bf16"); }
}  // namespace avx512bf16
}  // namespace rotary_export

int FakeCpuSupports(const char* feature) {
  const char* features = std::getenv("FAKE_CPU");
  const size_t length = std::strlen(feature);
  for (const char* at = features; (at = std::strstr(at, feature)) != nullptr; at += length) {
    const bool is_start = at == features || at[-1] == ' ';
    if (is_start && (at[length] == ' ' || at[length] == '\0')) return 1;
  }
  return 0;
}

// Arguments: output sizes in bytes. Prints the selection, then a line for each size.
int main(int count, char** arguments) {
  using namespace rotary_export;
  const Selection& selection = SelectedInstructionSet();
  std::printf("%s\n", selection.name != nullptr ? selection.name : selection.problem.text);
  if (selection.name == nullptr) return 0;
  for (int i = 1; i < count; ++i) {
    RotaryParams params = {};
    params.x_type = ROTARY_EXPORT_FLOAT32;
    params.batch_size = params.seq_len = params.query.count = 1;
    params.head_dim = std::atoll(arguments[i]) / 4;
    const RotateRowsFunction rotate_rows = ChooseRotation(&params);
    rotate_rows(params, 0, 1);
    std::printf(" %s\n", params.use_streaming ? "streaming" : "plain");
  }
}
