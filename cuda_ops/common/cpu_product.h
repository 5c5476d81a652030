// Products of matrices on the CPU whose sums have one order whatever the number of threads, which a
// BLAS does not promise; and without its overhead for the few rows of a step. No torch headers.
#pragma once

#include "common/types.h"

namespace sb_fast_sligru::cpu {

// out[n, r, c] = sum_k x[n, r, k] w[n, k, c], with unit strides in the last axis of w and out.
struct Product {
  DType type;
  int64_t batches, rows, columns, depth;
  const void* x;
  int64_t x_batch, x_row, x_depth;  // strides, as those below
  const void* w;
  int64_t w_batch, w_depth;
  void* out;
  int64_t out_batch, out_row;
};

void multiply(const Product& p);

}  // namespace sb_fast_sligru::cpu
