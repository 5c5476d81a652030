// Geometry of the float32 kernels for H <= 512, whose products are those of split_float.cuh.
//
// One m16n8k16 product gives all parts for 8 rows of U and 4 rows of the batch: row g of its left
// operand is the high part of U's row g and row g + 8 the low part, column 2n of its right operand
// is the high part of the batch's row n and column 2n + 1 the low part. Lane 4g + c of the
// accumulator then holds the four partial products of (g, c).
//
// Range: a scale from the operand's own maximum (of U: a row or a warp's part; of gradients: a row,
// every step) covers every float. The hidden state is not scaled: from 65520 on it becomes
// infinite, hence NaN, never a wrong number; below 2^-14 its error stays at 2^-37.
#pragma once

#include "common/split_float.cuh"
#include "light_gru/persistent/geometry.cuh"

namespace sb_fast_sligru {

// A cluster serves up to 4 rows (kRows) and a block owns 32 units (kBlockUnits); with two float16 a
// weight it takes 8 warps to hold them in registers.
constexpr int kFloatWarps = 8;
constexpr int kFloatThreads = 32 * kFloatWarps;

// p.choice.rows, the rows of a cluster, computed anew from the grid: so the compiler keeps the number
// in a register, where it would read a parameter in every step, which costs 5 to 8 % of it.
__device__ __forceinline__ int cluster_rows(const Recurrence& layer, int cluster) {
  const int clusters = static_cast<int>(gridDim.x) / cluster;
  return (static_cast<int>(layer.rows()) + clusters - 1) / clusters;
}

__device__ __forceinline__ bool has_zero_byte(uint32_t x) {
  return ((x - 0x01010101u) & ~x & 0x80808080u) != 0;
}

__device__ __forceinline__ float4 sum_of(const float4 (&x)[4]) {
  return {(x[0].x + x[1].x) + (x[2].x + x[3].x), (x[0].y + x[1].y) + (x[2].y + x[3].y),
          (x[0].z + x[1].z) + (x[2].z + x[3].z), (x[0].w + x[1].w) + (x[2].w + x[3].w)};
}

}  // namespace sb_fast_sligru
