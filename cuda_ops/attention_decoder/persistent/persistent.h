// What the persistent kernels read and write, and their launchers: the contract between sweep.h,
// which sees tensors, and the .cu files. No torch headers.
//
// Axes and mathematics are those of decoder.h. Of operands (`Operand`: the type of the products'
// operands, bfloat16, float16 or float) and everything else (float), the widths H, A, V and C are
// padded with zeros to multiples of kWidthMultiple, G to kChannels and W to a multiple of
// kTapsMultiple, which changes no result. All arrays are dense, row-major, on 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention_decoder/choice.h"

namespace sb_fast_sligru::attention_decoder {

using namespace location_attention;

constexpr int kWidthMultiple = 32;

struct Shape {
  int batch, tokens, frames, hidden, attention, value, context;
  int taps;  // W, not padded
  float scaling;
  DType operand_type;
  const int64_t* lengths;  // [B] frames; one outside of 0 to L counts as the nearer of these

  SLIGRU_HD int tiles() const { return static_cast<int>(ceil_div(frames, kTileFrames)); }
  SLIGRU_HD int padded_taps() const {
    return static_cast<int>(ceil_div(taps, kFilterTapsMultiple) * kFilterTapsMultiple);
  }
};

struct Forward {
  Shape shape;
  const float* wx;                              // [B, N, 3H]
  const float* context_mask;                    // [B, N, C], or null for ones
  const float* u_bias;                          // [3H], or null for zeros
  const float *filters, *v, *b_out;             // [kChannels, padded W], [A], [C]
  const void *keys, *values;                    // Operand [B, L, A], [B, L, V]
  const void *w_context, *u, *w_query, *w_out;  // Operand [3H, C], [3H, H], [A, H], [C, V]
  const void* w_location;                       // Operand [A, kChannels]
  float *h, *context, *attention;               // out: [B, N, H], [B, N, C], [B, N, L]
  // What one phase hands to the next. The first two are zero at the start, and so is `arrivals`.
  void* hidden_operand;  // Operand [2, B, H]: h of even and odd tokens, the first read being odd
  void* masked_operand;  // Operand [B, C]: mask_t c_{t-1}
  float* query;          // [B, A]
  float* energies;       // [B, L]
  void* summary;         // Operand [B, V]
  uint32_t* arrivals;
};

struct Backward {
  Shape shape;
  const float *grad_h, *grad_context, *grad_attention;  // [B, N, H], [B, N, C], [B, N, L], or null
  const float *wx, *input, *recurrent;                  // [B, N, 3H]: wx, W_c (mask c), U h_{t-1}
  const float *context_mask, *u_bias, *v;
  const float *h, *attention, *query;                   // [B, N, H], [B, N, L], [B, N, A]
  const void* features;                                 // Operand [B, N, L, kChannels]: f
  const void *keys, *values, *w_location;               // as in Forward
  const void *w_context_t, *u_t, *w_query_t, *w_out_t;  // Operand [C, 3H], [H, 3H], [H, A], [V, C]
  void *dc, *dx, *dq;            // out: Operand [B, N, C], [B, N, V], [B, N, A]
  void *di, *dg;                 // out: Operand [B, N, 3H]
  float* de;                     // out: [B, N, L]
  float *hidden_carry, *direct;  // [B, H]: U^T dg and dh z of token t + 1
  float* dp;                     // [B, L]
  uint32_t* arrivals;            // zero at the start
};

// h_{t-1} and mask_t c_{t-1} of all tokens.
struct Previous {
  Shape shape;
  const float *h, *context, *context_mask;
  void *hidden, *masked;  // out: Operand [B, N, H], [B, N, C]
};

struct Features {
  Shape shape;
  const float *attention, *filters;
  void* features;  // out: Operand [B, N, L, kChannels]
};

// ds of some tokens of some rows, and what is a sum of them. Adds to the sums.
struct Scores {
  Shape shape;
  const float *query, *de, *v;
  const void *features, *keys, *w_location;
  int first_row, rows, first_token, tokens;
  void* ds;              // out: Operand [rows, tokens, L, A]
  float* keys_gradient;  // [B, L, A]: sum over tokens of ds, or null
  float* v_gradient;     // [B, tiles, A]: sum over tokens and the frames of a tile of de tanh s
};

struct Filters {
  Shape shape;
  const float* attention;
  const float* df;   // [B, N, L, kChannels]
  float* gradients;  // out: [parts(), kChannels, padded W]

  static constexpr int kTokens = 8;  // of one row, summed by one block
  int64_t parts() const { return shape.batch * ceil_div(shape.tokens, kTokens); }
};

cudaError_t run_forward(const Forward& p, cudaStream_t stream);
cudaError_t run_backward(const Backward& p, cudaStream_t stream);
cudaError_t gather_previous(const Previous& p, cudaStream_t stream);
cudaError_t location_features(const Features& p, cudaStream_t stream);
cudaError_t score_gradients(const Scores& p, cudaStream_t stream);
cudaError_t filter_gradients(const Filters& p, cudaStream_t stream);

}  // namespace sb_fast_sligru::attention_decoder
