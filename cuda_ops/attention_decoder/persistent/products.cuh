// The products of a phase, dealt out to all blocks of the launch: 8 units for 32 rows at a time.
#pragma once

#include "common/skinny_product.cuh"

namespace sb_fast_sligru::attention_decoder {

// Calls f(first unit, first row, rows) for this block's share of all units and rows.
template <class F>
__device__ __forceinline__ void for_products(int units, int batch, const F& f) {
  const int groups = static_cast<int>(ceil_div(batch, kSkinnyRows));
  for (int item = blockIdx.x; item < units / kSkinnyUnits * groups; item += gridDim.x) {
    const int row = item % groups * kSkinnyRows;
    f(item / groups * kSkinnyUnits, row, min(kSkinnyRows, batch - row));
  }
}

// Calls f(row, unit, sum over k of x[row, k] w[unit, k]) for this block's share of them, one thread
// each. Rows of w are dense.
template <class T, class F>
__device__ __forceinline__ void multiply_rows(SkinnyOperand<T> x, int batch, const void* w,
                                              int units, int depth, float* shared, const F& f) {
  for_products(units, batch, [&](int unit, int row, int rows) {
    SkinnySums sums[1] = {};
    skinny_product<0>(SkinnyOperand<T>{x.data + row * x.stride, x.stride}, rows,
                      SkinnyOperand<T>{static_cast<const T*>(w) + int64_t{unit} * depth, depth}, 0,
                      depth, sums);
    const SkinnyPartials<1> partials{shared};
    partials.put(0, sums[0]);
    __syncthreads();
    const int index = threadIdx.x;
    if (index < rows * kSkinnyUnits)
      f(row + index / kSkinnyUnits, unit + index % kSkinnyUnits, partials.sum(0, index));
    __syncthreads();
  });
}

}  // namespace sb_fast_sligru::attention_decoder
