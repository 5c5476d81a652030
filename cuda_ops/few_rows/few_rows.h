// What the operator reads and writes, as plain pointers: the contract between the file that sees
// tensors (operator.cpp) and the one that computes (cpu.cpp). No torch headers.
//
//   out[n, m] = sum_k x[n, k] weight[m, k] + bias[m]
//
// Each sum has an order of its own, which depends on K alone: not on the other rows, and not on the
// number of threads.
#pragma once

#include "common/types.h"

namespace sb_fast_sligru::few_rows {

struct Linear {
  int64_t rows, outputs, depth;  // N, M, K
  const float* x;                // [N, K], with unit stride in K
  int64_t x_row;                 // stride
  const float* weight;           // [M, K]
  const float* bias;             // [M], or null
  float* out;                    // [N, M]
};

namespace cpu {
// Of AVX2: without them a BLAS is faster.
bool has_wide_vectors();
void linear(const Linear& p);
}  // namespace cpu

}  // namespace sb_fast_sligru::few_rows
