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
  float* packed;                 // [packed_size], for x in the order in which it is read
};

namespace cpu {
int64_t packed_size(int64_t rows, int64_t depth);
void linear(const Linear& p);
}  // namespace cpu

}  // namespace sb_fast_sligru::few_rows
