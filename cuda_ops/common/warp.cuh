// Within a block: reductions over the lanes of a warp, barriers of some warps, and a word with the
// compiler about registers.
#pragma once

#include <cstdint>

namespace sb_fast_sligru {

__device__ __forceinline__ float add_lane_xor(float x, int offset) {
  return x + __shfl_xor_sync(0xffffffffu, x, offset);
}

__device__ __forceinline__ float max_lane_xor(float x, int offset) {
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
}

// Keeps a loop-invariant value in its register: the compiler would rather compute some of them anew
// in every time step, from special registers or parameters, at up to 50 cycles each. A shuffle with
// itself is opaque to it. To be called by whole warps.
__device__ __forceinline__ void pin(uint32_t& x) {
  x = __shfl_sync(0xffffffffu, x, static_cast<int>(threadIdx.x) % 32);
}
__device__ __forceinline__ void pin(float& x) {
  x = __shfl_sync(0xffffffffu, x, static_cast<int>(threadIdx.x) % 32);
}
__device__ __forceinline__ void pin(int64_t& x) {
  x = __shfl_sync(0xffffffffu, static_cast<long long>(x), static_cast<int>(threadIdx.x) % 32);
}

// bar.sync of the `threads` threads that use barrier `id` (0 is __syncthreads).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace sb_fast_sligru
