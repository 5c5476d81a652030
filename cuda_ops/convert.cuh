// Conversions between a tensor's type and the accumulation type. Named functions, because torch's
// build flags remove the implicit ones of 16-bit types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

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

}  // namespace sb_fast_sligru
