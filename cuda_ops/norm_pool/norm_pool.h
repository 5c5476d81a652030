// What both passes read and write, as plain pointers: the contract between the files that see tensors
// (operator.cpp, operator_cuda.cpp) and those that compute (cpu.cpp, forward.cu, backward.cu). No
// torch headers.
//
// Between two convolutions of a CRDNN (SpeechBrain's CNN_Block: LayerNorm, LeakyReLU, max-pooling and
// Dropout2d, whose masks drop whole frequencies), for each frame of N = F C values:
//
//   xh  = (x + bias - mean) rstd              mean and rstd = 1 / sqrt(variance + eps) of x + bias
//   z   = xh w + b
//   a   = z > 0 ? z : slope z
//   out = mask max of a over windows of pool_time frames and pool_frequency frequencies
//
// Backward: a window's gradient g goes to its first largest value; there
//
//   dz = mask g (z > 0 ? 1 : slope),  e = dz w            elsewhere 0
//   dx = rstd (e - sum(e) / N - xh sum(e xh) / N)
//   dw = sum dz xh,  db = sum dz,  dbias = sum dx         sums over frames (dbias: and frequencies)
//
// Axes: B batch, T time, F frequencies, C channels; T' = T / pool_time and F' = F / pool_frequency
// after pooling, rounded down. With a halo the output has a row and a column more on each side, which
// mirror those next to the border, as "reflect" padding does; their gradients go back to those. All
// tensors are contiguous. "acc" is double for double and float for everything else.
//
// So that a convolution's sizes need not change with every length, x may have more frames than count
// (x_time; the gradient of those is zero) and the output more than it has (out_time; zeros).
#pragma once

#include <algorithm>

#include "common/types.h"

namespace sb_fast_sligru::norm_pool {

struct NormPool {
  int64_t batch, time, frequencies, channels;
  int64_t x_time;          // of x, at least time
  int64_t least_out_time;  // of the output
  int64_t pool_time, pool_frequency;
  bool halo;
  double eps, slope;

  DType x_type;    // of x and of its gradient
  DType out_type;  // of the output and of its gradient

  const void* x;          // [B, x_time, F, C] of x_type
  const void* bias;       // [C] acc
  const void* ln_weight;  // [F, C] acc
  const void* ln_bias;    // [F, C] acc
  const void* drop_mask;  // [B, F'] acc, or null for ones

  SLIGRU_HD int64_t values() const { return frequencies * channels; }  // of a frame: N
  SLIGRU_HD int64_t pooled_time() const { return time / pool_time; }
  SLIGRU_HD int64_t pooled_frequencies() const { return frequencies / pool_frequency; }
  // A group: the frames of one row of windows.
  SLIGRU_HD int64_t groups() const { return batch * pooled_time(); }
  SLIGRU_HD int64_t window() const { return pool_time * pool_frequency; }
  // Of the output, halo included.
  SLIGRU_HD int64_t own_out_time() const { return pooled_time() + 2 * halo; }
  SLIGRU_HD int64_t out_time() const {
    return own_out_time() > least_out_time ? own_out_time() : least_out_time;
  }
  SLIGRU_HD int64_t out_frequencies() const { return pooled_frequencies() + 2 * halo; }
};

// Where index i of an axis of `size` stands in the output: `copy` 0 is itself, 1 and 2 its mirror
// images in the halo. -1 if there is none.
constexpr int kCopies = 3;
SLIGRU_HD int64_t position(int64_t i, int64_t size, bool halo, int copy) {
  if (copy == 0) return i + halo;
  if (!halo) return -1;
  if (copy == 1) return i == 1 ? 0 : -1;
  return i == size - 2 ? size + 1 : -1;
}

struct Forward {
  NormPool layer;
  void* out;         // [B, out_time, F' (+ 2), C] of out_type
  void* statistics;  // [B, T', pool_time, 2] acc: mean, rstd
};

// Sums over frames come in `parts` rows, a row for each part of the groups that is worked on in turn;
// what is left is the sum of those rows.
struct Backward {
  NormPool layer;
  const void* grad_out;    // as Forward's out
  const void* statistics;  // as Forward's
  void* grad_x;            // [B, x_time, F, C] of x_type, or null if not wanted
  int64_t parts;
  void* bias_sums;       // [parts, C] acc
  void* ln_weight_sums;  // [parts, F, C] acc
  void* ln_bias_sums;    // [parts, F, C] acc
};

namespace cpu {  // x_type and out_type are acc here: operator.cpp converts 16-bit tensors
// Depends on the sizes alone, so that the sums do not depend on the threads.
int64_t backward_parts(const NormPool& layer);
void forward(const Forward& p);
void backward(const Backward& p);
}  // namespace cpu

namespace cuda {  // on the current device; throw std::runtime_error if a launch fails

// How a frame lies in the threads of a block: one has `kValues` values of it at most, in vectors of
// channels next to each other. Thread (row, column) has vector `column` of the channels at
// frequencies [g pool_frequency, (g + 1) pool_frequency) for g = row, row + rows, ...
constexpr int kValues = 16;
constexpr int kMostThreads = 640;
constexpr int kWarp = 32;

struct Layout {
  int vector;  // values: of 16 bytes, or 1
  int columns, rows;

  // Of a block; the last warp may have threads without values.
  int threads() const { return static_cast<int>(ceil_div(columns * rows, kWarp)) * kWarp; }
  // Shared memory that the backward asks for: two sums a value.
  int shared_bytes() const { return 2 * kValues * static_cast<int>(sizeof(float)) * threads(); }
};

// No threads if no block can hold a frame.
inline Layout layout(DType type, int64_t frequencies, int64_t channels, int64_t pool_frequency) {
  if (type == DType::kFloat64 || pool_frequency > 2) return {};
  const int64_t wide = type == DType::kFloat32 ? 4 : 8;
  const int64_t vector = channels % wide == 0 ? wide : 1;
  const int64_t columns = channels / vector, rows = ceil_div(ceil_div(frequencies, pool_frequency),
                                                             kValues / (vector * pool_frequency));
  if (columns > kMostThreads || columns * rows > kMostThreads) return {};
  return {static_cast<int>(vector), static_cast<int>(columns), static_cast<int>(rows)};
}

int64_t backward_parts(const NormPool& layer);
void forward(const Forward& p, void* stream);
void backward(const Backward& p, void* stream);
}  // namespace cuda

}  // namespace sb_fast_sligru::norm_pool
