// The exported functions that do not need ONNX Runtime. rotary_export.h documents them.
#include <sched.h>

#include <cinttypes>
#include <cstdio>

#include "kernel/input_checks.h"
#include "kernel/isa_dispatch.h"
#include "rotary_export.h"

namespace rotary_export {
namespace {

bool RotateOnePart(const RotaryExportCall* call, int64_t part, int64_t parts, Message* message) {
  const Selection& selection = SelectedInstructionSet();
  if (selection.rotate_rows == nullptr) return Fail(message, "%s", selection.problem.text);
  if (call == nullptr) return true;
  RotaryParams params;
  if (!CheckCall(*call, &params, message)) return false;
  const RotateRowsFunction rotate_rows = ChooseRotation(&params);
  RotatePart(params, rotate_rows, part, parts);
  return true;
}

// Returns the value before. The fields of a team are plain integers, since its header is plain C.
int64_t AddAtomically(int64_t* value, int64_t summand) {
  return __atomic_fetch_add(value, summand, __ATOMIC_ACQ_REL);
}

void CountFailure(const Message& problem, RotaryExportTeam* team) {
  if (AddAtomically(&team->failed, 1) == 0) {
    std::snprintf(team->message, sizeof team->message, "%s", problem.text);
  }
}

void RotateTeam(RotaryExportTeam* team) {
  Message problem;
  if (team->parts < 1) {
    Fail(&problem, "parts must be at least 1, got parts=%" PRId64, team->parts);
    return CountFailure(problem, team);
  }
  for (int64_t part; (part = AddAtomically(&team->begun, 1)) < team->parts;) {
    if (!RotateOnePart(team->call, part, team->parts, &problem)) CountFailure(problem, team);
    AddAtomically(&team->ended, 1);  // After the last access to the tensors and to the message.
  }
  while (__atomic_load_n(&team->ended, __ATOMIC_ACQUIRE) < team->parts) sched_yield();
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
  const bool done = rotary_export::RotateOnePart(call, 0, 1, &problem);
  if (message != nullptr && message_size > 0) {
    std::snprintf(message, message_size, "%s", problem.text);
  }
  return done ? 0 : 1;
}

void RotaryExportRotateTeam(void* team) {
  rotary_export::RotateTeam(static_cast<RotaryExportTeam*>(team));
}
