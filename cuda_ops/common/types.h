// Types that every operator's host and device code shares. No torch and no CUDA headers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SLIGRU_HD __host__ __device__ __forceinline__
#else
#define SLIGRU_HD inline __attribute__((always_inline))
#endif

namespace sb_fast_sligru {

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16 };

SLIGRU_HD constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

}  // namespace sb_fast_sligru
