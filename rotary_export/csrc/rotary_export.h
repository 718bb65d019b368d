/* The C interface of librotary_export.so: everything it exports.
 *
 * RegisterCustomOps is what ONNX Runtime looks for in an op library. The rest needs no ONNX
 * Runtime: it is there for other runtimes, for tests and for `rotary-export doctor`. */
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

/* Adds the op to a session's options; `api_base` is what OrtGetApiBase() returns.
 *
 * A registered kernel wins over the node's function body: on the CUDA provider too, where the
 * library has a kernel for it (RotaryExportProviders). That kernel has not been run on a GPU yet
 * (see README.md), so registering the library with a CUDA session is for those who want to try it.
 */
ROTARY_EXPORT_PUBLIC struct OrtStatus* RegisterCustomOps(struct OrtSessionOptions* options,
                                                         const void* api_base);

/* The instruction set in use ("baseline", "avx2", "avx512", "avx512bf16", "neon"), chosen when the
 * library was loaded; null if environment variable ROTARY_EXPORT_ISA asks for one that can't be
 * had. (ROTARY_EXPORT_LARGE_BYTES, read at the same time, is for benchmarks and tests: the outputs'
 * size from which on they are written past the cache.) */
ROTARY_EXPORT_PUBLIC const char* RotaryExportInstructionSet(void);

/* The execution providers that the library has kernels for, comma separated; CUDA is there if the
 * library was built with nvcc, whether or not this machine has a GPU. */
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

/* A tensor in the caller's memory; strides count elements. X, key and the outputs need a contiguous
 * last dimension, the other inputs must be contiguous. */
struct RotaryExportTensor {
  void* data;
  int32_t type;
  int32_t rank; /* Dimensions past the first ROTARY_EXPORT_MAX_RANK are not looked at. */
  int64_t shape[ROTARY_EXPORT_MAX_RANK];
  int64_t strides[ROTARY_EXPORT_MAX_RANK];
};

/* One call of the op, as the ONNX node has it; a null pointer is an input that is not given. */
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
  /* Of the rows, cut into `parts` pieces of about the same size, only piece `part` is rotated: for
   * callers with threads of their own. Every piece's call checks all inputs. 0: all rows. */
  int64_t part;
  int64_t parts;
};

/* Rotates on the calling thread. Returns 0, or 1 with a sentence in `message`, in which case
 * nothing was written. A null call only reports whether the library can be used (see
 * ROTARY_EXPORT_ISA). */
ROTARY_EXPORT_PUBLIC int RotaryExportRotate(const struct RotaryExportCall* call, char* message,
                                            size_t message_size);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* ROTARY_EXPORT_ROTARY_EXPORT_H_ */
