/* The C interface of librotary_export.so: everything it exports. Plain C.
 *
 * ONNX Runtime calls RegisterCustomOps. The other functions do not need ONNX Runtime: other
 * runtimes, the torch op, tests and `rotary-export doctor` call them. */
#ifndef ROTARY_EXPORT_ROTARY_EXPORT_H_
#define ROTARY_EXPORT_ROTARY_EXPORT_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ROTARY_EXPORT_PUBLIC __attribute__((visibility("default")))

struct OrtSessionOptions;
struct OrtStatus;

/* Adds the op to a session's options. `api_base` is the result of OrtGetApiBase().
 *
 * ONNX Runtime prefers a registered kernel to the node's function body. This holds for the CUDA
 * provider too if the library has a kernel for it (RotaryExportProviders). That kernel has never
 * run on a GPU (see tools/gpu/README.md): register the library with a CUDA session to try it. */
ROTARY_EXPORT_PUBLIC struct OrtStatus* RegisterCustomOps(struct OrtSessionOptions* options,
                                                         const void* api_base);

/* The instruction set in use: "baseline", "avx2", "avx512", "avx512bf16" or "neon". It is chosen
 * when the library is loaded. Null if the environment variable ROTARY_EXPORT_ISA names a set that
 * is not available.
 *
 * ROTARY_EXPORT_STREAMING_BYTES is read at the same time, for benchmarks and tests: outputs of at
 * least this size are written with non-temporal (streaming) stores. */
ROTARY_EXPORT_PUBLIC const char* RotaryExportInstructionSet(void);

/* The execution providers that the library has kernels for, separated by commas. They include CUDA
 * if the library was built with nvcc, whether or not this machine has a GPU. */
ROTARY_EXPORT_PUBLIC const char* RotaryExportProviders(void);

/* Element types, with ONNX's numbers. */
enum RotaryExportType {
  ROTARY_EXPORT_FLOAT32 = 1,
  ROTARY_EXPORT_INT64 = 7,
  ROTARY_EXPORT_FLOAT16 = 10,
  ROTARY_EXPORT_FLOAT64 = 11,
  ROTARY_EXPORT_BFLOAT16 = 16
};

enum { ROTARY_EXPORT_MAX_RANK = 8 };

/* A tensor in the caller's memory. Strides count elements. X, key and the outputs need a contiguous
 * last dimension; the other inputs must be contiguous. */
struct RotaryExportTensor {
  void* data;
  int32_t type; /* A RotaryExportType. */
  int32_t rank; /* Only the first ROTARY_EXPORT_MAX_RANK dimensions are read. */
  int64_t shape[ROTARY_EXPORT_MAX_RANK];
  int64_t strides[ROTARY_EXPORT_MAX_RANK];
};

/* One call of the op, with the inputs and attributes of the ONNX node. A null pointer is an input
 * or output that is not given. */
struct RotaryExportCall {
  const struct RotaryExportTensor* x;
  const struct RotaryExportTensor* cos_cache;
  const struct RotaryExportTensor* sin_cache;
  const struct RotaryExportTensor* position_ids;
  const struct RotaryExportTensor* key;
  const struct RotaryExportTensor* scale_cache;
  const struct RotaryExportTensor* y;       /* May share memory with x, element by element. */
  const struct RotaryExportTensor* key_out; /* Likewise with key. */
  int64_t interleaved;
  int64_t rotary_embedding_dim;
  int64_t num_heads;
  int64_t kv_num_heads;
};

/* Rotates on the calling thread. Returns 0, or 1 with a sentence in `message`; nothing was written
 * then. A null call only reports whether the library can be used (see ROTARY_EXPORT_ISA). */
ROTARY_EXPORT_PUBLIC int RotaryExportRotate(const struct RotaryExportCall* call, char* message,
                                            size_t message_size);

/* One call whose rows several threads rotate together. Set `call` and `parts`; the rest is 0. The
 * team, the call and the tensors must last until every thread has returned. */
struct RotaryExportTeam {
  const struct RotaryExportCall* call;
  int64_t parts;      /* The rows are split into this many parts of about the same size. */
  int64_t begun;      /* Threads begin the parts in order; this can exceed `parts`. */
  int64_t ended;      /* Parts that are rotated or failed. */
  int64_t failed;     /* Of these, those that failed: nothing of them was written. */
  char message[1024]; /* Of the first that failed. */
};

/* Rotates parts that no thread has begun, one after the other. It returns when all parts have
 * ended, those of other threads included: then all rows are rotated, or `failed` is not 0.
 *
 * Any number of threads can call it with the same team; one is enough. `team` is a
 * struct RotaryExportTeam. The type of the function is that of the work of a thread in many
 * libraries, GNU's OpenMP among them. */
ROTARY_EXPORT_PUBLIC void RotaryExportRotateTeam(void* team);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* ROTARY_EXPORT_ROTARY_EXPORT_H_ */
