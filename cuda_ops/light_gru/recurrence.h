// What one pass over the sequence reads and writes, as plain pointers: the contract between the
// files that see tensors (operator.cpp, operator_cuda.cpp) and those that compute (cpu.cpp,
// stepwise.cu). No torch headers.
//
// Axes: B batch, T time, H hidden units, D directions (1 or 2), R = D * B rows, forward rows first.
// Row r belongs to direction r / B and batch entry r % B, a sequence of L <= T steps. Step n of a row
// is time n (forward direction) or L - 1 - n (backward direction); what lies from time L on is
// padding: never read, and zero in the results. Or sequences are packed, one after the other without
// padding: [frames, n] then takes the place of [B, T, n], and T is but a bound of L. A row of 2H holds
// the candidate's H values, then the update gate's. "acc" is the accumulation type: double for double,
// float for everything else.
#pragma once

#include <cstdint>

#include "light_gru/cell.h"

namespace sb_fast_sligru {

// The layer as both passes see it. Pointers are borrowed from tensors that outlive the pass.
struct Recurrence {
  int64_t batch, time, hidden, directions;
  bool layer_norm;
  double eps;
  Activation activation;

  DType wx_type;       // of wx and of its gradient
  DType operand_type;  // of what enters a matrix product
  DType output_type;   // of h and of its gradient

  const void* wx;                           // [B, T, 2H] of wx_type, unit stride in the last axis
  int64_t wx_batch_stride, wx_time_stride;  // packed: the former is not used
  const void* h0;                           // [R, H] acc, or null for zeros
  const void* drop_mask;                    // [R, H] acc, or null for ones
  const void* ln_weight;                    // [2H] acc, or null for ones
  const void* ln_bias;                      // [2H] acc, or null for zeros
  const int32_t* lengths;                   // [B] steps of each sequence, or null for T
  const int32_t* starts;  // [B] of each sequence its first frame, if they are packed, or null
  const int32_t* order;   // [R] rows, those of longer sequences first, or null for any order

  SLIGRU_HD int64_t rows() const { return batch * directions; }
  SLIGRU_HD int64_t row_at(int64_t slot) const { return order == nullptr ? slot : order[slot]; }
  SLIGRU_HD int64_t length_of(int64_t row) const {
    return lengths == nullptr ? time : lengths[row < batch ? row : row - batch];
  }
  // The element of an array of such strides that begins frame t of sequence b.
  SLIGRU_HD int64_t element_of(int64_t b, int64_t t, int64_t batch_stride,
                               int64_t time_stride) const {
    return starts == nullptr ? b * batch_stride + t * time_stride : (starts[b] + t) * time_stride;
  }
  // The same frame's number in a contiguous array.
  SLIGRU_HD int64_t frame_of(int64_t b, int64_t t) const { return element_of(b, t, time, 1); }
  SLIGRU_HD int64_t time_of(int64_t row, int64_t step) const {
    return row < batch ? step : length_of(row) - 1 - step;
  }
};

// The arrays of one step below hold row row_at(i) of the layer as their row i.

// One forward step for the first `rows` of them. Reads r = U h_{t-1}, moves the hidden state on. A row
// whose sequence has ended is left alone, as in the backward pass.
struct ForwardStep {
  Recurrence layer;
  int64_t rows;
  const void* r;  // acc; element (row, j) at row * r_row_stride + j * r_unit_stride
  int64_t r_row_stride, r_unit_stride;
  void* state;    // [R, H] acc: the running hidden state, in and out
  void* operand;  // [R, H] operand_type: the state as the next product reads it; may equal `state`
  void* h;        // [B, T, D * H] of output_type
  void* rho;      // [R, T] acc: 1 / std of r (SLi-GRU), indexed by time; unused for Li-GRU
};

// Gathers h_{t-1} of steps first_step, ..., first_step + steps - 1 for the products over a chunk of
// time; zeros beyond a sequence's end.
struct GatherPrevious {
  Recurrence layer;
  const void* h;  // [B, T, D * H] of output_type
  int64_t first_step, steps, rows;
  void* previous;  // [steps, rows, H] of operand_type
};

// One backward step for the first `rows`:
//   d = grad_h + carry, carry = base + rho_next * product, where base and product come from step
//   + 1.
struct BackwardStep {
  Recurrence layer;
  int64_t rows;
  int64_t direction;   // the rows of one direction alone, or kBothDirections
  const void* grad_h;  // [B, T, D * H] of output_type, unit stride in the last axis
  int64_t grad_h_batch_stride, grad_h_time_stride;
  const void* h;        // [B, T, D * H] of output_type, as the forward pass wrote it
  const void* rho;      // [R, T] acc
  const void* r;        // [R, 2H] acc: U h_{t-1} of this step
  void* base;           // [R, H] acc: in from step + 1, out for step - 1
  const void* product;  // [R, H] acc: e_{step+1} U
  void* e;              // [R, 2H] of operand_type: gradient of r without its factor rho; zeros
                        // beyond a sequence's end
  void* scaled;   // [R, H] of operand_type: rho * h_{t-1}, the other operand of dU; null if dU is
                  // not wanted
  void* grad_wx;  // [B, T, 2H] of wx_type; null if not wanted
  void* grad_ln_weight;  // [R, 2H] acc, sums over time; null if not wanted
  void* grad_ln_bias;    // [R, 2H] acc, sums over time; null if not wanted

  static constexpr int64_t kBothDirections = -1;
};

// carry = base + rho * product after the last backward step: the gradient of h0.
struct FinishCarry {
  Recurrence layer;
  const void* rho;
  const void* base;
  const void* product;
  void* grad_h0;  // [R, H] acc; row r is the layer's
};

namespace cpu {  // operand, output and wx types are acc here: operator.cpp converts 16-bit tensors
void forward_step(const ForwardStep& p, int64_t step);
void gather_previous(const GatherPrevious& p);
void backward_step(const BackwardStep& p, int64_t step);
void finish_carry(const FinishCarry& p);
}  // namespace cpu

namespace stepwise {  // CUDA; launches on `stream`, throws std::runtime_error if a launch fails
void forward_step(const ForwardStep& p, int64_t step, void* stream);
void gather_previous(const GatherPrevious& p, void* stream);
void backward_step(const BackwardStep& p, int64_t step, void* stream);
void finish_carry(const FinishCarry& p, void* stream);
}  // namespace stepwise

}  // namespace sb_fast_sligru
