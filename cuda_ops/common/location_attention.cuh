// What is inside location-aware attention's tanh, by a warp for 16 frames at a time, on tensor cores:
// the location features f, which are last weights convolved with filters, and s = key + query + W_f f.
//
// In a lane 4g + c a tile of s is s[j][i], j = 0..3: units 8c + 2j and 8c + 2j + 1 of 32, for frame
// g (i = 0, 1) and for frame g + 8 (i = 2, 3): eight neighbouring units of two frames, so that a
// lane reads its part of the keys in one piece.
#pragma once

#include "common/elementary.cuh"
#include "common/location_attention.h"
#include "common/skinny_product.cuh"
#include "common/types.h"
#include "common/warp.cuh"

namespace sb_fast_sligru::location_attention {

template <class T>
constexpr bool kIsFloat = sizeof(T) == 4;

// ---- elementary functions

struct Tanh {
  float value, slope;
};

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + expf(-x)); }

// tanh and its derivative to float's last digits. With r = 1 / (1 + e^2|x|): tanh |x| is 1 - 2 r,
// which cancels for small x, where a polynomial takes its place; the derivative is 4 r (1 - r).
__device__ __forceinline__ Tanh exact_tanh(float x) {
  const float r = reciprocal(1.f + expf(2.f * fabsf(x))), x2 = x * x;
  float p = fmaf(2.39536888e-3f, x2, -8.41346849e-3f);
  p = fmaf(p, x2, 2.17826255e-2f);
  p = fmaf(p, x2, -5.39596118e-2f);
  p = fmaf(p, x2, 1.33332938e-1f);
  p = fmaf(p, x2, -3.33333313e-1f);
  const float small = fmaf(p * x2, x, x), large = copysignf(fmaf(-2.f, r, 1.f), x);
  return {fabsf(x) < 0.55f ? small : large, 4.f * r * (1.f - r)};
}

// Of what is computed from operands T; of 16-bit ones by the hardware's tanh, which has as many
// digits as they (2^-11).
template <class T>
__device__ __forceinline__ Tanh tanh_parts(float x) {
  if constexpr (kIsFloat<T>) {
    return exact_tanh(x);
  } else {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return {y, fmaf(-y, y, 1.f)};
  }
}

template <class T>
__device__ __forceinline__ float tanh_of(float x) {
  return tanh_parts<T>(x).value;
}

// ---- location features

// Rows of filters in shared memory, apart so that lanes meet no bank twice.
SLIGRU_HD constexpr int filter_stride(int padded_taps) { return padded_taps + 4; }
SLIGRU_HD constexpr int window_floats(int padded_taps) { return kTileFrames + padded_taps; }

// f[j][i]: channels 8j + 2c and 8j + 2c + 1 of frames g (i = 0, 1) and g + 8 (i = 2, 3).
template <class T>
__device__ __forceinline__ void convolve(const float* window, const float* filters, int padded_taps,
                                         float (&f)[2][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int j = 0; j < 2; ++j)
    for (int i = 0; i < 4; ++i) f[j][i] = 0.f;
#pragma unroll 2
  for (int k = c; k < padded_taps; k += 8) {
    const float a[4] = {window[g + k], window[g + 8 + k], window[g + k + 4], window[g + k + 12]};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float* filter = filters + (8 * j + g) * filter_stride(padded_taps) + k;
      if constexpr (kIsFloat<T>) {
        multiply_split(f[j],
                       {split_tf32(a[0]), split_tf32(a[1]), split_tf32(a[2]), split_tf32(a[3])},
                       split_tf32(filter[0]), split_tf32(filter[4]));
      } else {
        multiply_tf32(f[j], {to_tf32(a[0]), to_tf32(a[1]), to_tf32(a[2]), to_tf32(a[3])},
                      to_tf32(filter[0]), to_tf32(filter[4]));
      }
    }
  }
}

// Writes f to rows of kChannels operands; `frames` of them exist.
template <class T>
__device__ __forceinline__ void store_features(const float (&f)[2][4], int frames, T* to) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int frame = g + 8 * half;
    if (frame >= frames) continue;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      T* pair = to + frame * kChannels + 8 * j + 2 * c;
      if constexpr (kIsFloat<T>) {
        *reinterpret_cast<float2*>(pair) = make_float2(f[j][2 * half], f[j][2 * half + 1]);
      } else {
        *reinterpret_cast<uint32_t*>(pair) =
            OperandTraits<T>::pack(f[j][2 * half], f[j][2 * half + 1]);
      }
    }
  }
}

// ---- s

// Eight values of a lane: of keys, a query or v.
template <class T>
struct Eight {
  uint4 bits[kIsFloat<T> ? 2 : 1];

  // Of operands that no kernel changes.
  static __device__ __forceinline__ Eight load(const T* from) {
    Eight x;
    for (int i = 0; i < (kIsFloat<T> ? 2 : 1); ++i)
      x.bits[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    return x;
  }
  // Of what this kernel has written.
  static __device__ __forceinline__ Eight load_exchanged(const T* from) {
    Eight x;
    for (int i = 0; i < (kIsFloat<T> ? 2 : 1); ++i)
      x.bits[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
    return x;
  }
  // Values 2j and 2j + 1.
  __device__ __forceinline__ float2 pair(int j) const {
    if constexpr (kIsFloat<T>) {
      const uint4& word = bits[j / 2];
      return j % 2 ? make_float2(__uint_as_float(word.z), __uint_as_float(word.w))
                   : make_float2(__uint_as_float(word.x), __uint_as_float(word.y));
    } else {
      const uint32_t words[4] = {bits[0].x, bits[0].y, bits[0].z, bits[0].w};
      return unpack_pair<T>(words[j]);
    }
  }
};

// W_f of 32 units, as the products' second operand.
template <class T>
struct LocationWeights {
  uint32_t b[4][2];

  __device__ __forceinline__ explicit LocationWeights(const T* of_units) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const T* row = of_units + (g / 2 * 8 + 2 * j + g % 2) * kChannels;
      b[j][0] = __ldg(reinterpret_cast<const uint32_t*>(row + 2 * c));
      b[j][1] = __ldg(reinterpret_cast<const uint32_t*>(row + 2 * c + 8));
    }
  }
};

template <>
struct LocationWeights<float> {
  SplitTf32 b[4][4];

  __device__ __forceinline__ explicit LocationWeights(const float* of_units) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* row = of_units + (g / 2 * 8 + 2 * j + g % 2) * kChannels;
#pragma unroll
      for (int k = 0; k < 4; ++k) b[j][k] = split_tf32(__ldg(row + c + 4 * k));
    }
  }
};

// f of 16 frames, as the products' first operand.
template <class T>
struct LocationFeatures {
  uint32_t a[4];

  // From rows of kChannels operands; `last` is the last one that exists.
  __device__ __forceinline__ LocationFeatures(const T* rows, int last) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const T* low = rows + min(g, last) * kChannels + 2 * c;
    const T* high = rows + min(g + 8, last) * kChannels + 2 * c;
    a[0] = *reinterpret_cast<const uint32_t*>(low);
    a[1] = *reinterpret_cast<const uint32_t*>(high);
    a[2] = *reinterpret_cast<const uint32_t*>(low + 8);
    a[3] = *reinterpret_cast<const uint32_t*>(high + 8);
  }
};

template <>
struct LocationFeatures<float> {
  SplitTf32 a[2][4];

  __device__ __forceinline__ LocationFeatures(const float* rows, int last) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const float* low = rows + min(g, last) * kChannels + c;
    const float* high = rows + min(g + 8, last) * kChannels + c;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      a[k][0] = split_tf32(low[8 * k]);
      a[k][1] = split_tf32(high[8 * k]);
      a[k][2] = split_tf32(low[8 * k + 4]);
      a[k][3] = split_tf32(high[8 * k + 4]);
    }
  }
};

// s = key + query + W_f f.
template <class T>
__device__ __forceinline__ void compute_scores(const Eight<T>& key_g, const Eight<T>& key_g8,
                                               const Eight<float>& query,
                                               const LocationFeatures<T>& features,
                                               const LocationWeights<T>& weights,
                                               float (&s)[4][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 q = query.pair(j), low = key_g.pair(j), high = key_g8.pair(j);
    s[j][0] = low.x + q.x;
    s[j][1] = low.y + q.y;
    s[j][2] = high.x + q.x;
    s[j][3] = high.y + q.y;
    if constexpr (kIsFloat<T>) {
      multiply_split(s[j], features.a[0], weights.b[j][0], weights.b[j][1]);
      multiply_split(s[j], features.a[1], weights.b[j][2], weights.b[j][3]);
    } else {
      multiply<T>(s[j], features.a, weights.b[j][0], weights.b[j][1]);
    }
  }
}

// Sum over the lanes of a group of four, and over those of the same place in each group.
__device__ __forceinline__ float sum_of_group(float x) {
  return add_lane_xor(add_lane_xor(x, 1), 2);
}
__device__ __forceinline__ float sum_over_groups(float x) {
  return add_lane_xor(add_lane_xor(add_lane_xor(x, 4), 8), 16);
}

// f(T{}) for the type of the operands.
template <class F>
cudaError_t with_operand(DType type, const F& f) {
  switch (type) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
    case DType::kFloat16:
      return f(__half{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace sb_fast_sligru::location_attention
