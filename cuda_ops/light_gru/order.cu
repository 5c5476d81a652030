// The rows of a batch in the order of their lengths, on the GPU, where the lengths are: the rows of a
// cluster then end together, and the longest, which start first, do not wait for a place.
//
//   place of a row = rows that are longer + rows as long in front of it
//   start of a sequence = sum of the lengths in front of it
//
// Layout: a thread a row; each compares its sequence with all of the batch, 4 bytes each, which costs
// less than to sort them up to tens of thousands.
#include <cuda_runtime.h>

#include "light_gru/order.h"

namespace sb_fast_sligru {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    order_kernel(const __grid_constant__ Recurrence layer, int32_t* __restrict__ order,
                 int32_t* __restrict__ starts) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= layer.rows()) return;
  const int64_t own = row % layer.batch, length = layer.length_of(row);
  // Sequences that are longer, as long, as long and in front; frames of all in front.
  int64_t longer = 0, equal = 0, equal_before = 0, start = 0;
  for (int64_t b = 0; b < layer.batch; ++b) {
    const int64_t other = layer.length_of(b);
    longer += other > length;
    equal += other == length;
    equal_before += other == length && b < own;
    if (b < own) start += other;
  }
  const int64_t place = longer * layer.directions + row / layer.batch * equal + equal_before;
  order[place] = static_cast<int32_t>(row);
  if (starts != nullptr && row < layer.batch) starts[row] = static_cast<int32_t>(start);
}

}  // namespace

cudaError_t order_rows(const Recurrence& layer, int32_t* order, int32_t* starts,
                       cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((layer.rows() + kThreads - 1) / kThreads);
  order_kernel<<<blocks, kThreads, 0, stream>>>(layer, order, starts);
  return cudaGetLastError();
}

}  // namespace sb_fast_sligru
