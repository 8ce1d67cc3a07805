// The R-Drop loss of the rows of m passes, on CPU: values and gradients, one position at a time, rows in cache.
//
// A plain C interface without torch's headers: one binary serves every version of torch; cpu.py loads it with ctypes.
// The arithmetic is in rows_vector.h, compiled here for each instruction set; the processor's best is chosen at run
// time. Positions are independent, so the number of threads never changes a bit of the result.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#define X86 1
#include <immintrin.h>
#else
#define X86 0
#endif

extern "C" {

// Mirrors `_Rows` in cpu.py. Strides in elements; the classes of a row are contiguous.
struct RdropRows {
  const void* logits;          // (passes * positions / inner, inner, classes)
  void* gradient;              // the same shape; may be the logits themselves
  const int64_t* labels;       // (positions,); -1: ignored, the rows are never read
  const float* probabilities;  // (positions, classes): of the classes, instead of labels; else null
  const float* weight;         // (classes,) or null
  double* statistics;          // (positions, 1 + 4 * passes)
  float* task;                 // (positions,)
  float* divergence;           // (positions,)
  const float* grad_task;      // (positions,)
  const float* grad_divergence;
  int64_t positions, inner, classes;
  int64_t logits_outer_stride, logits_inner_stride, gradient_outer_stride, gradient_inner_stride;
  double label_smoothing;
  int32_t passes, bfloat16, forward, backward, threads, instructions;
  int32_t divergence_kind;  // 0 symmetric_kl, 1 detached_kl, 2 kl_from_first
};

}  // extern "C"

namespace {

struct bfloat16 {
  uint16_t bits;
};

constexpr int kMaxPasses = 32;  // MAX_PASSES in cpu.py
constexpr int64_t kIgnored = -1;
constexpr double kSumTolerance = 0.01;  // SUM_TOLERANCE in terms.py
constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kTwo64 = 0x1p64;

template <class T>
constexpr T kMinusInfinity = -kInfinity;
template <>
constexpr bfloat16 kMinusInfinity<bfloat16> = {0xff80};
template <class T>
constexpr T kZero = 0;
template <>
constexpr bfloat16 kZero<bfloat16> = {0};
template <class T>
constexpr T kNotANumber = kNaN;
template <>
constexpr bfloat16 kNotANumber<bfloat16> = {0x7fc0};

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace plain {
#define LANES 4
#if !X86 && defined(__aarch64__)
#define FUSED
#endif
#include "rows_vector.h"
#undef FUSED
#undef LANES
}  // namespace plain

#if X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define LANES 8
#define FUSED
#include "rows_vector.h"
#undef LANES
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
namespace avx512 {
#define LANES 16
#include "rows_vector.h"
#undef FUSED
#undef LANES
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // X86

typedef void (*Compute)(const RdropRows&, int64_t, double);

Compute compute_for(int instructions) {
#if X86
  if (instructions == 2) return avx512::compute;
  if (instructions == 1) return avx2::compute;
#endif
  return plain::compute;
}

// Positions are handed out a few at a time: ignored ones cost nothing, so equal shares would not be equal work.
void compute_all(const RdropRows& rows, double total_weight) {
  const Compute compute = compute_for(rows.instructions);
  constexpr int64_t kGrain = 4;
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t start; (start = next.fetch_add(kGrain)) < rows.positions;)
      for (int64_t n = start; n < start + kGrain && n < rows.positions; ++n) compute(rows, n, total_weight);
  };
  const int64_t elements = rows.positions * rows.passes * rows.classes;
  int64_t threads = 1 + elements / 65536;  // starting a thread takes as long as this many logits
  if (threads > rows.threads) threads = rows.threads;
  if (threads > rows.positions / kGrain) threads = rows.positions / kGrain;
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // The system has no further thread to give: those there are do the work.
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int rdrop_rows_version() { return 3; }

// The best instruction set of this processor: 0 plain, 1 AVX2, 2 AVX-512.
__attribute__((visibility("default"))) int rdrop_rows_instructions() {
#if X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  return avx2;
#else
  return 0;
#endif
}

__attribute__((visibility("default"))) void rdrop_rows(const RdropRows* rows) {
  double total_weight = double(rows->classes);
  if (rows->weight) {
    total_weight = 0;
    for (int64_t i = 0; i < rows->classes; ++i) total_weight += rows->weight[i];
  }
  compute_all(*rows, total_weight);
}

}  // extern "C"
