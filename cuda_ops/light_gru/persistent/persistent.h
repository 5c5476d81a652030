// The persistent backend: all time steps of the recurrence in one kernel launch, forward and
// backward. The equations are in cell.h, axes and directions in recurrence.h; the accumulation type
// is float.
//
// A cluster of 4, 8 or 16 blocks, or without clusters a group of blocks (l2.cuh), keeps U on chip for
// the whole sequence and serves a few batch rows. Clusters never wait for each other, so any number
// of them may be launched.
//
// Nothing here sees tensors, allocates or synchronises: pointers are borrowed device memory,
// launches go to `stream` on the current device, and every launcher returns the error of its
// launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "light_gru/choice.h"
#include "light_gru/recurrence.h"

namespace sb_fast_sligru {

// Operand types: bfloat16, float16 and float32. All pointers into tensors are 16-byte aligned.
//
// A float32 operand of the recurrent product is split into two float16 numbers
// (split_float.cuh); the other arrays that are of the operand type then hold float32.
struct PersistentForward {
  Recurrence layer;  // wx and both its strides in bytes: multiples of 16
  const void* u;     // [2H, H] operand type; with layer_norm its columns were centred before they
  // were rounded. If packed_bytes(choice.kernel) is not 0: pack_forward()'s result
  void* h;         // [B, T, D * H] output type, contiguous; written
  float* rho;      // [R, T] at true time, written; null without layer_norm
  void* exchange;  // exchange_bytes()
  KernelChoice choice;
};

// One chunk of the backward pass: steps first, ..., first + count - 1 of every row. Chunks are
// processed from the last to the first; their arrays are contiguous, row by row, then by step. With
// Uc the rounded u, and Gram = Uc^T Uc rounded to the operand type, for each chunk in this order:
//   1. gather_h_previous      h, h0 -> h_previous
//   2. the caller's product   projection = h_previous [Uc; Gram]^T; Li-GRU: h_previous U^T
//   3. prepare_backward       wx, projection, h_previous, rho -> coefficients
//   4. run_backward           coefficients, grad_h, rho, carry -> dwx_rows, m2, carry
//   5. finish_backward        dwx_rows, m2, projection, rho, h_previous ->
//                             dwx, dr, rho h_previous (in its place), affine_partial
//   6. the caller's product   du += dr^T h_previous, accumulated in float
// After the last chunk carry is the gradient of h0, and with layer_norm the caller subtracts from
// every column of du its mean.
struct PersistentBackward {
  Recurrence layer;  // as in the forward pass
  const void* u;     // as in the forward pass, but from pack_backward()
  int64_t first, count;
  const void* h;       // [B, T, D * H] output type, contiguous
  const float* rho;    // [R, T]
  const void* grad_h;  // [B, T, D * H] output type; data and strides in bytes: multiples of 16
  int64_t grad_h_batch_stride, grad_h_time_stride;
  void* dwx;              // [B, T, 2H] of wx_type, contiguous: the sum over the directions
  float* carry;           // [R, H]: the gradient that flows from later steps into the state after
                          // the chunk's last step; on return that before its first. The caller
                          // fills it with zeros before the first chunk processed
  void* h_previous;       // [R, count, H] operand type
  float* projection;      // [R, count, 3H], Li-GRU: [R, count, 2H]
  void* coefficients;     // [R, count, coefficient_streams(layer_norm), padded] operand type;
                          // padded: choice.padded_hidden()
  void* dwx_rows;         // [R, count, 2, padded] operand type
  float* m2;              // [R, count]; null without layer_norm
  void* dr;               // [R, count, 2H] operand type; may lie where the coefficients lie
  float* affine_partial;  // [affine_partials(R, count), 4H] or null: its rows add up to the
                          // gradients of ln_weight (first 2H) and ln_bias
  void* exchange;         // exchange_bytes()
  KernelChoice choice;
};

// Values a unit and step that run_backward reads: Ka, Kz, 1 - z and, with layer_norm, q and V.
int coefficient_streams(bool layer_norm);
// Rows of affine_partial.
int64_t affine_partials(int64_t rows, int64_t count);

// kWideFloat reads U in another form, of so many bytes, 16-byte aligned; 0: as it is.
int64_t packed_bytes(Kernel kernel);
// Memory through which the blocks of kL2 talk to each other, 128-byte aligned; 0: the kernel needs
// none.
int64_t exchange_bytes(const KernelChoice& choice, const Recurrence& layer, Direction direction);
// From the centred [2H, H] matrix, and for the backward pass the norm's weight [2H] or null.
cudaError_t pack_forward(const float* u, void* packed, int64_t hidden, cudaStream_t stream);
cudaError_t pack_backward(const float* u, const float* ln_weight, void* packed, int64_t hidden,
                          cudaStream_t stream);

cudaError_t run_forward(const PersistentForward& p, cudaStream_t stream);

cudaError_t gather_h_previous(const PersistentBackward& p, cudaStream_t stream);
cudaError_t prepare_backward(const PersistentBackward& p, cudaStream_t stream);
cudaError_t run_backward(const PersistentBackward& p, cudaStream_t stream);
cudaError_t finish_backward(const PersistentBackward& p, cudaStream_t stream);

}  // namespace sb_fast_sligru
