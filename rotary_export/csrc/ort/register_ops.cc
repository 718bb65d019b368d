// RegisterCustomOps: what ONNX Runtime calls for every session that the library is registered with.
#include <atomic>
#include <climits>
#include <cstdlib>

#include "kernel/isa_dispatch.h"
#include "ort/rotary_cuda_op.h"
#include "ort/rotary_op.h"
#include "rotary_export.h"

namespace rotary_export {
namespace {

using ort::OrtApi;
using ort::OrtApiBase;

// ORT picks the op whose types fit a node, and refuses a node that none fits.
constexpr ort::ElementType kTypePairs[][2] = {
    {ort::kFloat, ort::kFloat},       {ort::kFloat16, ort::kFloat16}, {ort::kFloat16, ort::kFloat},
    {ort::kBFloat16, ort::kBFloat16}, {ort::kBFloat16, ort::kFloat},  {ort::kDouble, ort::kDouble},
    {ort::kDouble, ort::kFloat},
};
constexpr size_t kTypePairCount = sizeof kTypePairs / sizeof kTypePairs[0];

// A kernel for each provider that it was built for. One for a provider that a session does not have
// is never asked for.
using Describe = void (*)(const OrtApi*, ort::ElementType, ort::ElementType, Op*);
#ifdef ROTARY_EXPORT_HAS_CUDA
constexpr Describe kProviders[] = {DescribeOp, DescribeCudaOp};
#else
constexpr Describe kProviders[] = {DescribeOp};
#endif
constexpr size_t kOpCount = kTypePairCount * (sizeof kProviders / sizeof kProviders[0]);

// Sessions keep plain pointers to the domain and its ops, and nobody says when the last one is
// gone: a registration lives as long as the process. There is one for each runtime in the process,
// usually one in all.
struct Registration {
  const OrtApi* api;
  OrtCustomOpDomain* domain;
  Registration* next;
  Op ops[kOpCount];
};
std::atomic<Registration*> registrations{nullptr};

// Reads "1.<minor>.<patch>". (Asking GetApi for a version that is not there prints to stderr.)
int ParseMinorVersion(const char* version) {
  int minor = 0;
  if (version[0] != '1' || version[1] != '.') return INT_MAX;  // A release after 1.x.
  for (const char* c = version + 2; *c >= '0' && *c <= '9'; ++c) minor = 10 * minor + (*c - '0');
  return minor;
}

// Before 1.24, ORT crashes in shape inference at an optional input that is left out before one that
// is given. Without our function it infers the types alone, which is all that it must know.
constexpr int kSafeInference = 24;

OrtStatus* FillDomain(const OrtApi* api, int ort_minor, Registration* registration) {
  OrtStatus* status = api->CreateCustomOpDomain("rotary_export", &registration->domain);
  for (size_t i = 0; i < kOpCount && status == nullptr; ++i) {
    Op* op = &registration->ops[i];
    const auto& [x_type, table_type] = kTypePairs[i % kTypePairCount];
    kProviders[i / kTypePairCount](api, x_type, table_type, op);
    op->fast_api = ort_minor >= int{ort::kFastApiVersion};
    if (ort_minor < kSafeInference) op->InferOutputShapeFn = nullptr;
    status = api->CustomOpDomain_Add(registration->domain, op);
  }
  return status;
}

// Finds this runtime's registration, or makes it. Two threads that both make one do no harm.
OrtStatus* GetRegistration(const OrtApi* api, int ort_minor, Registration** out) {
  for (Registration* known = registrations.load(); known != nullptr; known = known->next) {
    if (known->api == api) {
      *out = known;
      return nullptr;
    }
  }
  auto* created = static_cast<Registration*>(std::calloc(1, sizeof(Registration)));
  if (created == nullptr) return api->CreateStatus(ort::kFail, "out of memory");
  created->api = api;
  if (OrtStatus* status = FillDomain(api, ort_minor, created)) {
    if (created->domain != nullptr) api->ReleaseCustomOpDomain(created->domain);
    std::free(created);
    return status;
  }
  created->next = registrations.load();
  while (!registrations.compare_exchange_weak(created->next, created)) {
  }
  *out = created;
  return nullptr;
}

OrtStatus* Register(OrtSessionOptions* options, const OrtApiBase* base) {
  const int ort_minor = ParseMinorVersion(base->GetVersionString());
  const bool fast_api = ort_minor >= int{ort::kFastApiVersion};
  const OrtApi* api = base->GetApi(fast_api ? ort::kFastApiVersion : ort::kApiVersion);
  if (api == nullptr) {
    Message message;
    Fail(&message, "rotary_export's op library needs ONNX Runtime 1.%u or newer, got %s",
         ort::kApiVersion, base->GetVersionString());
    return base->GetApi(1)->CreateStatus(ort::kFail, message.text);
  }
  const Selection& selection = SelectedInstructionSet();
  if (selection.name == nullptr) return api->CreateStatus(ort::kFail, selection.problem.text);
  Registration* registration = nullptr;
  if (OrtStatus* status = GetRegistration(api, ort_minor, &registration)) return status;
  return api->AddCustomOpDomain(options, registration->domain);
}

}  // namespace
}  // namespace rotary_export

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const void* api_base) {
  using rotary_export::ort::OrtApiBase;
  return rotary_export::Register(options, static_cast<const OrtApiBase*>(api_base));
}
