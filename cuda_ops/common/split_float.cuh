// Products of float32 numbers on tensor cores, as pairs of float16.
//
// x = (high + low / 2048) / scale, with high = float16(x scale), low = float16((x scale - high)
// 2048) and a power of two for scale: 22 bits and the sign, 2^-24 to 2^-23 relative. A product of
// two such numbers is high high + (high low + low high) / 2048; low low is below float's rounding.
#pragma once

#include "common/product.cuh"

namespace sb_fast_sligru {

constexpr float kLowScale = 2048.f;

struct SplitPair {
  uint32_t high, low;  // two float16 each
};

__device__ __forceinline__ SplitPair split(float x, float y) {
  const __half2 high = __floats2half2_rn(x, y);
  const float2 rounded = __half22float2(high);
  return {reinterpret_cast<const uint32_t&>(high),
          OperandTraits<__half>::pack((x - rounded.x) * kLowScale, (y - rounded.y) * kLowScale)};
}

// The power of two that brings `magnitude` into [2^14, 2^15), at most 2^100.
__device__ __forceinline__ float scale_for(float magnitude) {
  const uint32_t exponent = __float_as_uint(magnitude) >> 23;  // 255: inf or NaN
  return __uint_as_float(min(268 - exponent, 227u) << 23);
}

// 1 / scale of a power of two.
__device__ __forceinline__ float inverse_of(float scale) {
  return __uint_as_float((254u << 23) - __float_as_uint(scale));
}

}  // namespace sb_fast_sligru
