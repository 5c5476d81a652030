// Loops of the CPU's kernels: work for threads, code for the widest vectors of the machine, and the
// elementary functions in a form that the compiler vectorises. Only cpu.cpp files include it.
//
// An entry point marked VECTOR_CLONES is compiled for baseline x86-64, AVX2 and AVX-512, and the
// loader picks one. What it calls must be SLIGRU_HD (always inlined): what is not inlined is not
// compiled for the clone that calls it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/types.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#if __GNUC__ >= 12
#define VECTOR_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else  // which cannot choose by level; by the name of a processor it would choose Intel's alone
#define VECTOR_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#endif
#else
#define VECTOR_CLONES
#endif

#define ALWAYS_INLINE __attribute__((always_inline))  // for lambdas

namespace sb_fast_sligru::cpu {

// Below this many elements a thread costs more than it saves.
constexpr int64_t kElementsPerThread = 4096;

template <class F>
void for_rows(int64_t begin, int64_t end, int64_t elements_per_row, const F& f) {
  const int64_t grain =
      std::max<int64_t>(kElementsPerThread / std::max<int64_t>(elements_per_row, 1), 1);
  torch::stable::parallel_for(begin, end, grain, f);
}

template <class T>
SLIGRU_HD T* at(void* base, int64_t offset) {
  return base == nullptr ? nullptr : static_cast<T*>(base) + offset;
}

template <class T>
SLIGRU_HD const T* at(const void* base, int64_t offset) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + offset;
}

template <class T>
SLIGRU_HD void copy_or_fill(const T* from, T value, int64_t n, T* to) {
  if (from != nullptr) {
    std::copy(from, from + n, to);
  } else {
    std::fill(to, to + n, value);
  }
}

// out[j] += sum_i scale[i * scale_stride] rows[i * row_stride + j]; rows may overlap.
template <class T>
SLIGRU_HD void add_rows(const T* rows, int64_t row_stride, const T* scale, int64_t scale_stride,
                        int64_t count, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const T *r0 = rows + i * row_stride, *r1 = r0 + row_stride, *r2 = r1 + row_stride,
            *r3 = r2 + row_stride;
    const T s0 = scale[i * scale_stride], s1 = scale[(i + 1) * scale_stride],
            s2 = scale[(i + 2) * scale_stride], s3 = scale[(i + 3) * scale_stride];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] += (s0 * r0[j] + s1 * r1[j]) + (s2 * r2[j] + s3 * r3[j]);
  }
  for (; i < count; ++i) {
    const T* r = rows + i * row_stride;
    const T s = scale[i * scale_stride];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] += s * r[j];
  }
}

// ---- elementary functions
// For float by range reduction and a polynomial (Cephes' coefficients, accurate to float's own
// rounding), because libm's are calls and stop a loop from vectorising. Comparisons with NaN are
// false, so NaN stays NaN.

// exp(x) = (1 + fraction) * scale, for |x| <= 87.
struct ExpParts {
  float fraction, scale;
};

SLIGRU_HD float within_exp(float x) {
  const float low = x > 87.0f ? 87.0f : x;
  return low < -87.0f ? -87.0f : low;
}

SLIGRU_HD ExpParts exp_parts(float x) {
  constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const float k = (x * kLog2E + kRound) - kRound;
  const float f = (x - k * kLn2High) - k * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return {p * f * f + f, scale};
}

// exp(x) of an x <= 0.
SLIGRU_HD double exp_of_negative(double x) { return std::exp(x); }

SLIGRU_HD float exp_of_negative(float x) {
  const ExpParts e = exp_parts(within_exp(x));
  const float value = (e.fraction + 1.0f) * e.scale;
  return x < -87.0f ? 0.0f : value;
}

// sigmoid(x) = 1 / (1 + exp(-x)).
SLIGRU_HD double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

SLIGRU_HD float sigmoid(float x) {
  const ExpParts e = exp_parts(within_exp(-x));
  return 1.0f / (1.0f + (e.fraction + 1.0f) * e.scale);
}

// tanh(x) and its derivative. With y = exp(2 |x|) - 1, which near 0 is the fraction itself:
// tanh(|x|) = y / (y + 2) = 1 - 2 / (y + 2), and 1 - tanh^2(x) = 4 (y + 1) / (y + 2)^2. Small numbers
// keep their digits, and so does a small derivative, where 1 - tanh^2 would have none.
template <class T>
struct TanhParts {
  T value, slope;
};

SLIGRU_HD TanhParts<double> tanh_parts(double x) {
  const double y = std::tanh(x);
  return {y, 1.0 - y * y};
}

SLIGRU_HD TanhParts<float> tanh_parts(float x) {
  const float magnitude = std::fabs(x);
  const float doubled = magnitude > 40.0f ? 80.0f : 2.0f * magnitude;
  const ExpParts e = exp_parts(doubled);
  const float y = e.fraction * e.scale + (e.scale - 1.0f);
  const float factor = 1.0f / (y + 2.0f);
  const float value = magnitude < 0.5f ? y * factor : 1.0f - 2.0f * factor;
  return {std::copysign(value, x), 4.0f * ((y + 1.0f) * factor) * factor};
}

template <class T>
SLIGRU_HD T tanh(T x) {
  return tanh_parts(x).value;
}

}  // namespace sb_fast_sligru::cpu
