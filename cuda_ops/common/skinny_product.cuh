// Products of few rows with many weights, d = x w^T, by the warps of a block, on tensor cores.
//
// A block computes d for up to 32 rows of x and 8 units (rows of w): two m16n8 tiles. Its warps
// share the depth, and their partial sums meet in shared memory. Both operands are row-major and go
// from L2 straight into registers, 64 bytes of a row at a time (a chunk): lane 4g + c holds the 16
// bytes from 16c of rows g and g + 8 of x and of unit g. Which position of the depth an element has
// within a chunk does not matter, as long as both operands agree.
//
// A float32 number is multiplied as two of TF32's, x = high + low with 11 bits each: a product is
// high high + (high low + low high), and low low is below float's rounding.
#pragma once

#include "common/product.cuh"

// bfloat16 and TF32 have products from compute capability 8.0 on; for older targets the kernels that
// use them are empty, and nothing launches those.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define SB_FAST_SLIGRU_HAS_TENSOR_PRODUCTS 1
#else
#define SB_FAST_SLIGRU_HAS_TENSOR_PRODUCTS 0
#endif

namespace sb_fast_sligru {

// ---- TF32

// d += a b, m16n8k8. Lane 4g + c holds, as (row, column),
//   a = {(g, c), (g + 8, c), (g, c + 4), (g + 8, c + 4)},  b = {(c, g), (c + 4, g)}
// and d as in an m16n8k16 product.
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

struct SplitTf32 {
  uint32_t high, low;
};

__device__ __forceinline__ SplitTf32 split_tf32(float x) {
  const uint32_t high = to_tf32(x);
  const float rest = x - __uint_as_float(high);
  return {high, isinf(x) ? 0 : to_tf32(rest)};
}

// d += a b of float32 numbers. Tensor cores cut off what does not fit into their sum instead of
// rounding it, which in a long sum always pulls the same way: so they add up eight products, and
// those sums are added elsewhere.
__device__ __forceinline__ void multiply_split(float (&d)[4], const SplitTf32 (&a)[4],
                                               const SplitTf32& b0, const SplitTf32& b1) {
  const uint32_t high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
  const uint32_t low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
  float sum[4] = {};
  multiply_tf32(sum, low, b0.high, b1.high);
  multiply_tf32(sum, high, b0.low, b1.low);
  multiply_tf32(sum, high, b0.high, b1.high);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += sum[i];
}

// ---- chunks

constexpr int kChunkBytes = 64;
template <class T>
constexpr int kChunk = kChunkBytes / sizeof(T);  // depth of a chunk

// What a lane holds of one row and chunk, ready to multiply.
template <class T>
struct ChunkPart {
  uint4 bits;

  __device__ __forceinline__ explicit ChunkPart(uint4 loaded) : bits(loaded) {}
};

template <>
struct ChunkPart<float> {
  SplitTf32 x[4];

  __device__ __forceinline__ explicit ChunkPart(uint4 loaded) {
    x[0] = split_tf32(__uint_as_float(loaded.x));
    x[1] = split_tf32(__uint_as_float(loaded.y));
    x[2] = split_tf32(__uint_as_float(loaded.z));
    x[3] = split_tf32(__uint_as_float(loaded.w));
  }
};

// d += the products over a chunk of rows g and g + 8 of x with unit g of w.
template <class T>
__device__ __forceinline__ void multiply_chunk(float (&d)[4], const ChunkPart<T>& x_g,
                                               const ChunkPart<T>& x_g8, const ChunkPart<T>& w) {
  if constexpr (sizeof(T) == 4) {
    multiply_split(d, {x_g.x[0], x_g8.x[0], x_g.x[1], x_g8.x[1]}, w.x[0], w.x[1]);
    multiply_split(d, {x_g.x[2], x_g8.x[2], x_g.x[3], x_g8.x[3]}, w.x[2], w.x[3]);
  } else {
    multiply<T>(d, {x_g.bits.x, x_g8.bits.x, x_g.bits.y, x_g8.bits.y}, w.bits.x, w.bits.y);
    multiply<T>(d, {x_g.bits.z, x_g8.bits.z, x_g.bits.w, x_g8.bits.w}, w.bits.z, w.bits.w);
  }
}

// ---- a block's product

constexpr int kSkinnyRows = 32, kSkinnyUnits = 8, kSkinnyWarps = 16;

// A warp's partial sums of one matrix of weights.
using SkinnySums = float[kSkinnyRows / 16][4];

template <class T>
struct SkinnyOperand {
  const T* data;   // of the first row
  int64_t stride;  // from row to row, a multiple of 16 bytes, as `data` is
};

// Adds this warp's share of the products of x with 8 units of matrices of weights that are w_step
// apart: of the first to sums[kOf[0]], and so on. `rows` of x, 1 to 32, exist. The depth is a
// multiple of a chunk. x is read past the L1 cache: other blocks may just have written it.
template <int... kOf, class T, int kSums>
__device__ __forceinline__ void skinny_product(SkinnyOperand<T> x, int rows, SkinnyOperand<T> w,
                                               int64_t w_step, int depth,
                                               SkinnySums (&sums)[kSums]) {
  constexpr int kBatch = 2;  // chunks whose loads are under way at once
  constexpr int kMatrices = sizeof...(kOf);
  constexpr int kTargets[] = {kOf...};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int chunks = depth / kChunk<T>;
  const T* x_rows[kSkinnyRows / 8];
  for (int i = 0; i < kSkinnyRows / 8; ++i) {
    x_rows[i] = x.data + min(g + 8 * i, rows - 1) * x.stride + c * (kChunk<T> / 4);
  }
  const T* w_row = w.data + g * w.stride + c * (kChunk<T> / 4);
  for (int first = warp; first < chunks; first += kBatch * kSkinnyWarps) {
    uint4 x_loaded[kBatch][kSkinnyRows / 8], w_loaded[kBatch][kMatrices];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int chunk = first + n * kSkinnyWarps;
      const bool inside = chunk < chunks;
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        w_loaded[n][m] =
            inside ? __ldg(reinterpret_cast<const uint4*>(w_row + m * w_step + chunk * kChunk<T>))
                   : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kSkinnyRows / 8; ++i) {
        x_loaded[n][i] = inside && (i < 2 || rows > 16)
                             ? __ldcg(reinterpret_cast<const uint4*>(x_rows[i] + chunk * kChunk<T>))
                             : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const ChunkPart<T> x_parts[4] = {ChunkPart<T>(x_loaded[n][0]), ChunkPart<T>(x_loaded[n][1]),
                                       ChunkPart<T>(x_loaded[n][2]), ChunkPart<T>(x_loaded[n][3])};
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        const ChunkPart<T> w_part(w_loaded[n][m]);
        multiply_chunk<T>(sums[kTargets[m]][0], x_parts[0], x_parts[1], w_part);
        if (rows > 16) multiply_chunk<T>(sums[kTargets[m]][1], x_parts[2], x_parts[3], w_part);
      }
    }
  }
}

constexpr int kSkinnySums = kSkinnyRows * kSkinnyUnits;  // of a block, for one matrix

// The block's partial sums in shared memory: [warps][matrices][32 rows][8 units].
template <int kMatrices>
struct SkinnyPartials {
  static constexpr int kBytes = kSkinnyWarps * kMatrices * kSkinnySums * sizeof(float);
  float* data;

  __device__ __forceinline__ void put(int matrix, const SkinnySums& sums) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    float* to = data + (warp * kMatrices + matrix) * kSkinnySums + g * kSkinnyUnits + 2 * c;
#pragma unroll
    for (int i = 0; i < kSkinnyRows / 8; ++i) {
      *reinterpret_cast<float2*>(to + 8 * i * kSkinnyUnits) =
          make_float2(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
    }
  }
  // The sum over the warps, in their order; `index` is row * 8 + unit.
  __device__ __forceinline__ float sum(int matrix, int index) const {
    float total = 0;
#pragma unroll
    for (int w = 0; w < kSkinnyWarps; ++w)
      total += data[(w * kMatrices + matrix) * kSkinnySums + index];
    return total;
  }
};

}  // namespace sb_fast_sligru
