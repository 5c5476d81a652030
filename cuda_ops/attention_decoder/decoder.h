// What the passes over the tokens read and write, as plain pointers: the contract between the files
// that see tensors (sweep.h) and those that compute (cpu.cpp). No torch headers.
//
// Axes: B batch, N tokens, L encoder frames, H hidden units, A units of the attention, V width of
// the values, C width of the context, G location channels, W = 2K + 1 taps of a channel. All arrays
// are row-major and of one type, double or float; a row of 3H holds the gates r, z, n.
//
// Token t, with zeros for h_{-1} and c_{-1}, and p_{-1} = 1 / length within the length:
//
//   i = wx_t + W_c (mask_t c_{t-1});  g = U h_{t-1} + b
//   r, z = sigmoid(i_r + g_r), sigmoid(i_z + g_z);  n = tanh(i_n + r g_n);  h_t = n + z (h_{t-1} - n)
//   f[l] = sum_k F[k] p_{t-1}[l + k - K];  s[l] = key[l] + W_q h_t + W_f f[l];  e[l] = v . tanh(s[l])
//   p_t = softmax(scaling e) over the frames of the length;  x = sum_l p_t[l] value[l]
//   c_t = W_o x + b_o
//
// (Bahdanau et al. 2015, with the GRU of Cho et al. 2014 and the location features of Chorowski et
// al. 2015, eq. 8 and 9.) Backward, with d(.) for dL/d(.), p_{t-1} being a constant:
//
//   dx = W_o^T dc;  dp[l] = value[l] . dx + (what comes from outside)
//   de[l] = scaling p[l] (dp[l] - sum p dp);  ds[l] = de[l] v (1 - tanh^2 s[l])
//   dh += W_q^T sum_l ds[l];  d key[l] += ds[l];  df[l] = W_f^T ds[l]
//   di = [dr, dz, dn];  dg = [dr, dz, dn r];  dh_{t-1} = dh z + U^T dg;  dc_{t-1} = mask W_c^T di
//
// Frames are dealt out in chunks of kFrames of one row: an item is a row and a chunk. What an item
// sums over its frames is added up over items in their order, so threads do not change bits.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace sb_fast_sligru::attention_decoder {

constexpr int64_t kFrames = 64;
constexpr int64_t kTapsMultiple = 16;  // rows of gradients of taps are padded to whole vectors

struct Decoder {
  int64_t batch, tokens, frames, hidden, attention, value, context, channels, taps;
  double scaling;
  DType type;

  const void* wx;            // [B, N, 3H]
  const void* keys;          // [B, L, A]
  const void* values;        // [B, L, V]
  const int64_t* lengths;    // [B] frames, from 0 to L
  const void* context_mask;  // [B, N, C], or null for ones
  const void* u_bias;        // [3H], or null for zeros
  const void* filters;       // [G, W]
  const void* w_location;    // [G, A]: the transpose of W_f
  const void* v;             // [A]
  const void* b_out;         // [C]

  int64_t chunks() const { return ceil_div(frames, kFrames); }
  int64_t items() const { return batch * chunks(); }
  int64_t padded_taps() const { return ceil_div(taps, kTapsMultiple) * kTapsMultiple; }
};

struct ForwardStep {
  Decoder decoder;
  const void* input;      // [B, 3H]: W_c (mask_t c_{t-1})
  const void* recurrent;  // [B, 3H]: U h_{t-1}
  void* h;                // [B, N, H]
  const void* query;      // [B, A]: W_q h_t
  void* energies;         // [B, L]
  void* attention;        // [B, N, L]: p
  void* summary;          // [B, V]: x
  void* context;          // [B, N, C]: of token t in as W_o x, out as c_t
  void* masked;           // [B, C]: out, mask_{t+1} c_t
};

// h_{t-1} and mask_t c_{t-1} of all tokens.
struct GatherPrevious {
  Decoder decoder;
  const void *h, *context;
  void* previous;  // [B, N, H]
  void* masked;    // [B, N, C]
};

// Gradients from outside are null where there is none.
struct BackwardStep {
  Decoder decoder;
  const void *grad_h, *grad_context, *grad_attention;  // [B, N, H], [B, N, C], [B, N, L]
  const void *h, *attention;                           // as the forward pass wrote them
  const void *input, *recurrent, *query;  // [B, N, 3H], [B, N, 3H], [B, N, A] of all tokens
  const void* input_carry;                // [B, C]: W_c^T di of token t + 1
  void* context;                          // [B, N, C]: out, dc
  const void* summary;                    // [B, N, V]: dx = W_o^T dc
  void* attention_part;                   // [B, L]: scratch, dp
  void* query_part;                       // [items, A]: scratch, sums of ds over an item's frames
  void* query_gradient;                   // [B, N, A]: out, sum_l ds
  const void* hidden_part;                // [B, H]: W_q^T of it
  void* base;                             // [B, H]: dh_{t+1} z_{t+1} in, of token t out
  const void* hidden_carry;               // [B, H]: U^T dg of token t + 1
  void *input_gradient, *recurrent_gradient;  // [B, N, 3H]: out, di and dg
  // Sums over the tokens; null if not wanted.
  void* keys;        // [B, L, A]
  void* v;           // [items, A]
  void* w_location;  // [items, G, A]
  void* filters;     // [items, G, padded_taps]
};

namespace cpu {
// Forward, token by token: cell, (product), energies, attend, (product), finish_context.
void cell(const ForwardStep& p, int64_t token);
void energies(const ForwardStep& p, int64_t token);
void attend(const ForwardStep& p, int64_t token);
void finish_context(const ForwardStep& p, int64_t token);

void gather_previous(const GatherPrevious& p);
// Backward: context, (product), attention, energies, query, (product), cell, (products).
void backward_context(const BackwardStep& p, int64_t token);
void backward_attention(const BackwardStep& p, int64_t token);
void backward_energies(const BackwardStep& p, int64_t token);
void backward_query(const BackwardStep& p, int64_t token);
void backward_cell(const BackwardStep& p, int64_t token);
// sums[j] = sum_i rows[i, j], in the order of i.
void sum_rows(DType type, const void* rows, int64_t count, int64_t width, void* sums);
}  // namespace cpu

}  // namespace sb_fast_sligru::attention_decoder
