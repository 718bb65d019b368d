// The exported functions that do not need ONNX Runtime. rotary_export.h documents them.
#include <cinttypes>
#include <cstdio>

#include "kernel/input_checks.h"
#include "kernel/isa_dispatch.h"
#include "rotary_export.h"

namespace rotary_export {
namespace {

bool Rotate(const RotaryExportCall* call, Message* message) {
  const Selection& selection = SelectedInstructionSet();
  if (selection.rotate_rows == nullptr) return Fail(message, "%s", selection.problem.text);
  if (call == nullptr) return true;
  RotaryParams params;
  if (!CheckCall(*call, &params, message)) return false;
  const int64_t parts = call->parts != 0 ? call->parts : 1;
  if (call->part < 0 || call->part >= parts) {
    return Fail(message, "part must be in [0, parts), got part=%" PRId64 ", parts=%" PRId64,
                call->part, call->parts);
  }
  const RotateRowsFunction rotate_rows = ChooseRotation(&params);
  RotatePart(params, rotate_rows, call->part, parts);
  return true;
}

}  // namespace
}  // namespace rotary_export

const char* RotaryExportInstructionSet() { return rotary_export::SelectedInstructionSet().name; }

#ifdef ROTARY_EXPORT_HAS_CUDA
const char* RotaryExportProviders() { return "CPUExecutionProvider,CUDAExecutionProvider"; }
#else
const char* RotaryExportProviders() { return "CPUExecutionProvider"; }
#endif

int RotaryExportRotate(const RotaryExportCall* call, char* message, size_t message_size) {
  rotary_export::Message problem;
  const bool done = rotary_export::Rotate(call, &problem);
  if (message != nullptr && message_size > 0) {
    std::snprintf(message, message_size, "%s", problem.text);
  }
  return done ? 0 : 1;
}
