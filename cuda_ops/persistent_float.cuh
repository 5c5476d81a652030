// Products of float32 numbers on tensor cores, and the geometry of the float32 kernels for H <=
// 512.
//
// x = (high + low / 2048) / scale, with high = float16(x scale), low = float16((x scale - high)
// 2048) and a power of two for scale: 22 bits and the sign, 2^-24 to 2^-23 relative. A product of
// two such numbers is high high + (high low + low high) / 2048; low low is below float's rounding.
// One m16n8k16 product gives all of it for 8 rows of U and 4 rows of the batch: row g of its left
// operand is the high part of U's row g and row g + 8 the low part, column 2n of its right operand
// is the high part of the batch's row n and column 2n + 1 the low part. Lane 4g + c of the
// accumulator then holds the four partial products of (g, c).
//
// Range: a scale from the operand's own maximum (of U: a row or a warp's part; of gradients: a row,
// every step) covers every float. The hidden state is not scaled: from 65520 on it becomes
// infinite, hence NaN, never a wrong number; below 2^-14 its error stays at 2^-37.
#pragma once

#include "cluster_launch.cuh"
#include "persistent.cuh"

namespace sb_fast_sligru {

// A cluster serves up to 4 rows (kRows) and a block owns 32 units (kBlockUnits); with two float16 a
// weight it takes 8 warps to hold them in registers.
constexpr int kFloatWarps = 8;
constexpr int kFloatThreads = 32 * kFloatWarps;

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

// The rows of the batch are spread evenly over the clusters of a launch: 1 to kRows each. The
// fewer, the fewer bytes have to reach a block.
__device__ __forceinline__ int cluster_rows(const Recurrence& layer, int cluster) {
  const int clusters = static_cast<int>(gridDim.x) / cluster;
  return (static_cast<int>(layer.rows()) + clusters - 1) / clusters;
}

template <class Params>
cudaError_t run_clusters(const ClusterKernel<Params>& kernel, const Params& p,
                         cudaStream_t stream) {
  const int64_t rows = p.layer.rows(), at_once = std::max(kernel.alone(), 1);
  const int64_t rows_each = std::min<int64_t>(ceil_div(rows, at_once), kRows);
  return kernel.run(ceil_div(rows, rows_each), p, stream);
}

__device__ __forceinline__ bool has_zero_byte(uint32_t x) {
  return ((x - 0x01010101u) & ~x & 0x80808080u) != 0;
}

__device__ __forceinline__ float max_lane_xor(float x, int offset) {
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
}

__device__ __forceinline__ float4 sum_of(const float4 (&x)[4]) {
  return {(x[0].x + x[1].x) + (x[2].x + x[3].x), (x[0].y + x[1].y) + (x[2].y + x[3].y),
          (x[0].z + x[1].z) + (x[2].z + x[3].z), (x[0].w + x[1].w) + (x[2].w + x[3].w)};
}

// ---- shared memory ----
__device__ __forceinline__ void store_float2(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// d = a b.
__device__ __forceinline__ void multiply_new(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

// Launchers; see run_forward and run_backward, which choose by the operand type.
cudaError_t run_forward_float(const PersistentForward& p, cudaStream_t stream);
cudaError_t run_backward_float(const PersistentBackward& p, cudaStream_t stream);
// Clusters that run at once on the current device for a padded H; 0 if it has none of that size.
int resident_clusters_float(int padded);

}  // namespace sb_fast_sligru
