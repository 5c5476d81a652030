// Conversions between a tensor's type and the accumulation type. Named functions, because torch's
// build flags remove the implicit ones of 16-bit types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/types.h"

namespace sb_fast_sligru {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class To>
__device__ __forceinline__ To narrow(float x) {
  if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <class To>
__device__ __forceinline__ To narrow(double x) {
  return x;
}

// ---- 16-bit operands as bits
template <class T>
struct OperandTraits;

template <>
struct OperandTraits<__nv_bfloat16> {
  static constexpr DType kType = DType::kBFloat16;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ float to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
};

template <>
struct OperandTraits<__half> {
  static constexpr DType kType = DType::kFloat16;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ float to_float(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
  }
};

template <class T>
__device__ __forceinline__ uint16_t to_bits(float x) {
  return static_cast<uint16_t>(OperandTraits<T>::pack(x, 0.f));
}

// Two operands packed in a word.
template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t x) {
  return make_float2(OperandTraits<T>::to_float(static_cast<uint16_t>(x)),
                     OperandTraits<T>::to_float(static_cast<uint16_t>(x >> 16)));
}

}  // namespace sb_fast_sligru
