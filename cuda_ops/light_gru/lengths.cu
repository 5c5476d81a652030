// What the lengths of sequences mean for a batch, on the GPU, where they are.
//
// The order in which its rows are served: those of a cluster then end together, and the longest, which
// start first, do not wait for a place. And where packed sequences begin.
//
//   place of a row = rows that are longer + rows as long in front of it
//   start of a sequence = sum of the lengths in front of it
//
// Layout: a thread a row; each compares its sequence with all of the batch, 4 bytes each, which costs
// less than to sort them up to tens of thousands. To zero padding, a block has a frame.
#include <cuda_runtime.h>

#include "light_gru/lengths.h"

namespace sb_fast_sligru {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    resolve_kernel(const __grid_constant__ Recurrence layer, int64_t frames,
                   const __grid_constant__ LengthArrays arrays) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= layer.rows()) return;
  const auto length_of = [&](int64_t b) {
    const int64_t length = layer.lengths[b];
    return length < 0 ? 0 : length < layer.time ? length : layer.time;
  };
  const int64_t own = row % layer.batch, length = length_of(own);
  // Sequences that are longer, as long, as long and in front; frames of all in front.
  int64_t longer = 0, equal = 0, equal_before = 0, start = 0;
  for (int64_t b = 0; b < layer.batch; ++b) {
    const int64_t other = length_of(b);
    longer += other > length;
    equal += other == length;
    equal_before += other == length && b < own;
    if (b < own) start += other;
  }
  const int64_t place = longer * layer.directions + row / layer.batch * equal + equal_before;
  arrays.order[place] = static_cast<int32_t>(row);
  if (row >= layer.batch) return;
  const int64_t left = start < frames ? frames - start : 0;
  arrays.lengths[row] = static_cast<int32_t>(length < left ? length : left);
  arrays.starts[row] = static_cast<int32_t>(start);
}

template <class Word>
__global__ void __launch_bounds__(kThreads)
    clear_kernel(const __grid_constant__ Recurrence layer, Word* __restrict__ data,
                 int64_t frame_words) {
  const int64_t b = blockIdx.x / layer.time, t = blockIdx.x % layer.time;
  if (t < layer.length_of(b)) return;
  for (int64_t i = threadIdx.x; i < frame_words; i += kThreads)
    data[blockIdx.x * frame_words + i] = Word{};
}

template <class Word>
void clear(const Recurrence& layer, void* data, int64_t frame_bytes, cudaStream_t stream) {
  const auto frames = static_cast<unsigned>(layer.batch * layer.time);
  clear_kernel<<<frames, kThreads, 0, stream>>>(layer, static_cast<Word*>(data),
                                                frame_bytes / static_cast<int64_t>(sizeof(Word)));
}

}  // namespace

cudaError_t resolve_lengths(const Recurrence& layer, int64_t frames, const LengthArrays& arrays,
                            cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((layer.rows() + kThreads - 1) / kThreads);
  resolve_kernel<<<blocks, kThreads, 0, stream>>>(layer, frames, arrays);
  return cudaGetLastError();
}

cudaError_t clear_padding(const Recurrence& layer, void* data, int64_t frame_bytes,
                          cudaStream_t stream) {
  if (frame_bytes % 16 == 0)
    clear<uint4>(layer, data, frame_bytes, stream);
  else
    clear<uint16_t>(layer, data, frame_bytes, stream);
  return cudaGetLastError();
}

}  // namespace sb_fast_sligru
