// Both passes over the tokens: products between the element kernels of decoder.h. A backend is a
// class `Steps` with those kernels, multiply(a, b, out), of matrices or of batches of them, and
// operand(b), b as multiply reads it (CpuSteps in operator.cpp). All tensors here are of one type.
//
// Memory: the forward keeps what it returns; the backward recomputes gates and queries with one
// product over all tokens, and tanh s step by step, so nothing has the axes [N, B, L, A]. Gradients
// of weights are one product over all tokens, after the loop.
#pragma once

#include "attention_decoder/operator.h"

namespace sb_fast_sligru::attention_decoder {

inline Decoder describe_decoder(const Inputs& in, const Tensor& location_rows) {
  Decoder d = {};
  d.batch = in.batch();
  d.tokens = in.tokens();
  d.frames = in.frames();
  d.hidden = in.hidden();
  d.attention = in.attention();
  d.value = in.value();
  d.context = in.context();
  d.channels = in.channels();
  d.taps = in.taps();
  d.scaling = in.scaling;
  d.type = dtype_of(in.type());
  d.wx = in.wx.const_data_ptr();
  d.keys = in.keys.const_data_ptr();
  d.values = in.values.const_data_ptr();
  d.lengths = static_cast<const int64_t*>(in.lengths.const_data_ptr());
  d.context_mask = pointer(in.context_mask);
  d.u_bias = pointer(in.u_bias);
  d.filters = in.filters.const_data_ptr();
  d.w_location = location_rows.const_data_ptr();
  d.v = in.v.const_data_ptr();
  d.b_out = in.b_out.const_data_ptr();
  return d;
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// [B, N, X] as [B N, X].
inline Tensor all_tokens(const Tensor& t) {
  return torch::stable::view(t, {t.size(0) * t.size(1), t.size(2)});
}

template <class Steps>
Outputs forward_sweep(const Inputs& in, const Steps& steps) {
  const int64_t B = in.batch(), N = in.tokens(), H = in.hidden(), C = in.context();
  const ScalarType type = in.type();
  if (in.empty()) return empty_outputs(in);
  const Tensor h = new_empty(in.wx, {B, N, H}, type), context = new_empty(in.wx, {B, N, C}, type),
               attention = new_empty(in.wx, {B, N, in.frames()}, type);

  const Tensor location_rows = torch::stable::contiguous(transposed(in.w_location));
  const Tensor nothing = new_zeros(in.wx, {B, H}, type), masked = new_zeros(in.wx, {B, C}, type),
               input = new_empty(in.wx, {B, 3 * H}, type),
               recurrent = new_empty(in.wx, {B, 3 * H}, type),
               query = new_empty(in.wx, {B, in.attention()}, type),
               energies = new_empty(in.wx, {B, in.frames()}, type),
               summary = new_empty(in.wx, {B, in.value()}, type);
  const Tensor w_context_t = steps.operand(transposed(in.w_context)),
               u_t = steps.operand(transposed(in.u)),
               w_query_t = steps.operand(transposed(in.w_query)),
               w_out_t = steps.operand(transposed(in.w_out));
  ForwardStep p = {};
  p.decoder = describe_decoder(in, location_rows);
  p.input = input.const_data_ptr();
  p.recurrent = recurrent.const_data_ptr();
  p.h = h.mutable_data_ptr();
  p.query = query.const_data_ptr();
  p.energies = energies.mutable_data_ptr();
  p.attention = attention.mutable_data_ptr();
  p.summary = summary.mutable_data_ptr();
  p.context = context.mutable_data_ptr();
  p.masked = masked.mutable_data_ptr();
  for (int64_t t = 0; t < N; ++t) {
    const Tensor h_t = torch::stable::select(h, 1, t);
    // Also with the zeros before the first token: times a weight that is not finite, they are NaN.
    steps.multiply(masked, w_context_t, input);
    steps.multiply(t > 0 ? torch::stable::select(h, 1, t - 1) : nothing, u_t, recurrent);
    steps.cell(p, t);
    steps.multiply(h_t, w_query_t, query);
    steps.energies(p, t);
    steps.attend(p, t);
    steps.multiply(summary, w_out_t, torch::stable::select(context, 1, t));
    steps.finish_context(p, t);
  }
  return {h, context, attention};
}

template <class Steps>
Gradients backward_sweep(const Inputs& in, const Saved& saved, Needs needs, const Steps& steps) {
  const int64_t B = in.batch(), N = in.tokens(), L = in.frames(), H = in.hidden(),
                A = in.attention(), V = in.value(), C = in.context(), G = in.channels();
  const ScalarType type = in.type();
  if (in.empty()) return zero_gradients(in, needs);
  auto zeros_if = [&](bool wanted, std::vector<int64_t> sizes) {
    return new_zeros(in.wx, wanted ? std::move(sizes) : std::vector<int64_t>{0}, type);
  };
  Tensor grad_keys = zeros_if(needs.keys, {B, L, A}),
         grad_values = zeros_if(needs.values, {B, L, V}),
         grad_w_context = zeros_if(needs.cell, {3 * H, C}),
         grad_u = zeros_if(needs.cell, {3 * H, H}),
         grad_u_bias = zeros_if(needs.cell && in.u_bias, {3 * H}),
         grad_w_query = zeros_if(needs.query, {A, H}),
         grad_filters = zeros_if(needs.alignment, {G, in.taps()}),
         grad_w_location = zeros_if(needs.alignment, {A, G}),
         grad_v = zeros_if(needs.alignment, {A}), grad_w_out = zeros_if(needs.out, {C, V}),
         grad_b_out = zeros_if(needs.out, {C});
  const Tensor none = zeros_if(false, {});

  auto empty = [&](std::vector<int64_t> sizes) { return new_empty(in.wx, std::move(sizes), type); };
  const Tensor location_rows = torch::stable::contiguous(transposed(in.w_location));
  const Decoder decoder = describe_decoder(in, location_rows);

  const Tensor previous = empty({B, N, H}), masked = empty({B, N, C}), input = empty({B, N, 3 * H}),
               recurrent = empty({B, N, 3 * H}), query = empty({B, N, A});
  GatherPrevious gather = {};
  gather.decoder = decoder;
  gather.h = saved.h.const_data_ptr();
  gather.context = saved.context.const_data_ptr();
  gather.previous = previous.mutable_data_ptr();
  gather.masked = masked.mutable_data_ptr();
  steps.gather_previous(gather);
  steps.multiply(all_tokens(masked), steps.operand(transposed(in.w_context)), all_tokens(input));
  steps.multiply(all_tokens(previous), steps.operand(transposed(in.u)), all_tokens(recurrent));
  steps.multiply(all_tokens(saved.h), steps.operand(transposed(in.w_query)), all_tokens(query));

  // What one pass of the loop hands to the next, and what the products after it read.
  const Tensor input_carry = empty({B, C}), hidden_carry = zeros_if(true, {B, H}),
               base = zeros_if(true, {B, H}), hidden_part = empty({B, H}),
               attention_part = empty({B, L}), query_part = empty({decoder.items(), A});
  const Tensor grad_context = empty({B, N, C}), grad_summary = empty({B, N, V}),
               grad_query = empty({B, N, A}), grad_input = empty({B, N, 3 * H}),
               grad_recurrent = empty({B, N, 3 * H});
  const int64_t items = decoder.items(), taps = decoder.padded_taps();
  const Tensor v_part = zeros_if(needs.alignment, {items, A}),
               location_part = zeros_if(needs.alignment, {items, G * A}),
               filters_part = zeros_if(needs.alignment, {items, G * taps});
  auto pointer_if = [](bool wanted, const Tensor& t) {
    return wanted ? t.mutable_data_ptr() : nullptr;
  };
  BackwardStep p = {};
  p.decoder = decoder;
  p.grad_h = pointer(saved.grad_h);
  p.grad_context = pointer(saved.grad_context);
  p.grad_attention = pointer(saved.grad_attention);
  p.h = saved.h.const_data_ptr();
  p.attention = saved.attention.const_data_ptr();
  p.input = input.const_data_ptr();
  p.recurrent = recurrent.const_data_ptr();
  p.query = query.const_data_ptr();
  p.input_carry = input_carry.const_data_ptr();
  p.context = grad_context.mutable_data_ptr();
  p.summary = grad_summary.const_data_ptr();
  p.attention_part = attention_part.mutable_data_ptr();
  p.query_part = query_part.mutable_data_ptr();
  p.query_gradient = grad_query.mutable_data_ptr();
  p.hidden_part = hidden_part.const_data_ptr();
  p.base = base.mutable_data_ptr();
  p.hidden_carry = hidden_carry.const_data_ptr();
  p.input_gradient = grad_input.mutable_data_ptr();
  p.recurrent_gradient = grad_recurrent.mutable_data_ptr();
  p.keys = pointer_if(needs.keys, grad_keys);
  p.v = pointer_if(needs.alignment, v_part);
  p.w_location = pointer_if(needs.alignment, location_part);
  p.filters = pointer_if(needs.alignment, filters_part);
  for (int64_t t = N - 1; t >= 0; --t) {
    steps.backward_context(p, t);
    steps.multiply(torch::stable::select(grad_context, 1, t), in.w_out,
                   torch::stable::select(grad_summary, 1, t));
    steps.backward_attention(p, t);
    steps.backward_energies(p, t);
    steps.backward_query(p, t);
    steps.multiply(torch::stable::select(grad_query, 1, t), in.w_query, hidden_part);
    steps.backward_cell(p, t);
    if (t > 0) {
      steps.multiply(torch::stable::select(grad_recurrent, 1, t), in.u, hidden_carry);
      steps.multiply(torch::stable::select(grad_input, 1, t), in.w_context, input_carry);
    }
  }

  if (needs.values)
    steps.multiply(torch::stable::transpose(saved.attention, 1, 2), grad_summary, grad_values);
  auto product_over_tokens = [&](const Tensor& gradient, const Tensor& operand, const Tensor& out) {
    steps.multiply(transposed(all_tokens(gradient)), all_tokens(operand), out);
  };
  if (needs.cell) {
    product_over_tokens(grad_input, masked, grad_w_context);
    product_over_tokens(grad_recurrent, previous, grad_u);
    if (in.u_bias) steps.sum_rows(all_tokens(grad_recurrent), grad_u_bias);
  }
  if (needs.query) product_over_tokens(grad_query, saved.h, grad_w_query);
  if (needs.alignment) {
    const Tensor location = empty({G * A}), filters = empty({G * taps});
    steps.sum_rows(v_part, grad_v);
    steps.sum_rows(location_part, location);
    steps.sum_rows(filters_part, filters);
    grad_w_location = torch::stable::contiguous(transposed(torch::stable::view(location, {G, A})));
    Tensor padded = torch::stable::view(filters, {G, taps});
    grad_filters = torch::stable::contiguous(torch::stable::narrow(padded, 1, 0, in.taps()));
  }
  if (needs.out) {
    const Tensor summary = empty({B, N, V});
    steps.multiply(saved.attention, in.values, summary);
    product_over_tokens(grad_context, summary, grad_w_out);
    steps.sum_rows(all_tokens(grad_context), grad_b_out);
  }
  return {needs.wx ? grad_input : none,
          grad_keys,
          grad_values,
          grad_w_context,
          grad_u,
          grad_u_bias,
          grad_w_query,
          grad_filters,
          grad_w_location,
          grad_v,
          grad_w_out,
          grad_b_out};
}

}  // namespace sb_fast_sligru::attention_decoder
