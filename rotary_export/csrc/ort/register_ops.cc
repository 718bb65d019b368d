// RegisterCustomOps: ONNX Runtime calls it for every session that the library is registered with.
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

// One op for each provider and each of kTypePairs. ORT chooses the op whose types fit a node, and
// refuses a node that none fits. It ignores the ops of providers that a session does not have.
using Describe = void (*)(const OrtApi*, const TypePair&, Op*);
#ifdef ROTARY_EXPORT_HAS_CUDA
constexpr Describe kProviders[] = {DescribeOp, DescribeCudaOp};
#else
constexpr Describe kProviders[] = {DescribeOp};
#endif
constexpr int kOpCount = kTypePairCount * (sizeof kProviders / sizeof kProviders[0]);

// Sessions keep plain pointers to the domain and its ops, and ORT does not report when the last
// session ends: a registration lives as long as the process. So does the library, which ORT would
// unload with that session (nodelete in CMakeLists.txt). Each runtime in the process has one
// registration; usually there is one runtime.
struct Registration {
  const OrtApi* api;
  OrtCustomOpDomain* domain;
  Registration* next;
  Op ops[kOpCount];
};
std::atomic<Registration*> registrations{nullptr};

// Reads "1.<minor>.<patch>". (GetApi prints to stderr for a version that the runtime lacks.)
int ParseMinorVersion(const char* version) {
  int minor = 0;
  if (version[0] != '1' || version[1] != '.') return INT_MAX;  // A release after 1.x.
  for (const char* c = version + 2; *c >= '0' && *c <= '9'; ++c) minor = 10 * minor + (*c - '0');
  return minor;
}

// Before 1.24, ORT's shape inference crashes at an absent optional input that precedes a given one.
// Without our function it infers only the types, which is enough.
constexpr int kSafeInference = 24;

OrtStatus* FillDomain(const OrtApi* api, int ort_minor, Registration* registration) {
  OrtStatus* status = api->CreateCustomOpDomain("rotary_export", &registration->domain);
  for (int i = 0; i < kOpCount && status == nullptr; ++i) {
    Op* op = &registration->ops[i];
    kProviders[i / kTypePairCount](api, kTypePairs[i % kTypePairCount], op);
    op->fast_api = ort_minor >= int{ort::kFastApiVersion};
    if (ort_minor < kSafeInference) op->InferOutputShapeFn = nullptr;
    status = api->CustomOpDomain_Add(registration->domain, op);
  }
  return status;
}

// Finds this runtime's registration, or creates it. If two threads create one each, both are valid.
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
