// Both passes over the tokens around the persistent kernels: operands padded and converted for them,
// and torch's products over all tokens. Included by operator_cuda.cpp alone.
//
// Memory: the forward keeps what it returns. The backward has gates and queries of all tokens, f of
// all tokens and frames, and ds of as many tokens and rows at a time as kScoreBytes holds.
#pragma once

#include "attention_decoder/operator.h"
#include "attention_decoder/persistent/persistent.h"
#include "common/cuda_device.h"

namespace sb_fast_sligru::attention_decoder {

constexpr int64_t kScoreBytes = int64_t{256} << 20;

// t in a type, with zeros after its values on each axis, dense and on 16 bytes.
inline Tensor padded(const Tensor& t, ScalarType type, const std::vector<int64_t>& sizes) {
  if (sizes_of(t) == sizes) return aligned(torch::stable::contiguous(torch::stable::to(t, type)));
  Tensor out = new_zeros(t, sizes, type), inside = out;
  for (int64_t axis = 0; axis < t.dim(); ++axis)
    inside = torch::stable::narrow(inside, axis, 0, t.size(axis));
  torch::stable::copy_(inside, t);
  return out;
}

// What `padded` has put around a tensor taken off again.
inline Tensor trimmed(const Tensor& t, ScalarType type, const std::vector<int64_t>& sizes) {
  Tensor inside = t;
  for (int64_t axis = 0; axis < t.dim(); ++axis)
    inside = torch::stable::narrow(inside, axis, 0, sizes[static_cast<size_t>(axis)]);
  return torch::stable::contiguous(torch::stable::to(inside, type));
}

inline Tensor flat(const Tensor& t, int64_t width) { return torch::stable::view(t, {-1, width}); }

inline Tensor transposed(const Tensor& t) {
  return torch::stable::transpose(t, t.dim() - 2, t.dim() - 1);
}

inline Tensor dense_transpose(const Tensor& t) { return torch::stable::contiguous(transposed(t)); }

template <class T = void>
T* address(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
inline float* floats(const Tensor& t) { return address<float>(t); }
inline const float* floats(const OptionalTensor& t) {
  return static_cast<const float*>(pointer(t));
}

// The arguments as the kernels read them.
struct Operands {
  Shape shape;
  ScalarType operand;
  int64_t B, N, L, H, A, V, C, W;  // the widths padded
  Tensor lengths, wx, filters, v, b_out, keys, values, w_context, u, w_query, w_out, w_location;
  OptionalTensor context_mask, u_bias;

  explicit Operands(const Inputs& in)
      : shape{},
        operand(in.operand_type),
        B(in.batch()),
        N(in.tokens()),
        L(in.frames()),
        H(wide(in.hidden())),
        A(wide(in.attention())),
        V(wide(in.value())),
        C(wide(in.context())) {
    const ScalarType fp32 = ScalarType::Float;
    const int64_t h = in.hidden(), c = in.context(), G = kChannels;
    shape = {static_cast<int>(B),
             static_cast<int>(N),
             static_cast<int>(L),
             static_cast<int>(H),
             static_cast<int>(A),
             static_cast<int>(V),
             static_cast<int>(C),
             static_cast<int>(in.taps()),
             static_cast<float>(in.scaling),
             dtype_of(operand),
             in.lengths.const_data_ptr<int64_t>()};
    W = shape.padded_taps();
    lengths = in.lengths;
    auto view = [](const Tensor& t, std::vector<int64_t> sizes) {
      return torch::stable::view(t, sizes);
    };
    wx = padded(view(in.wx, {B, N, 3, h}), fp32, {B, N, 3, H});
    filters = padded(in.filters, fp32, {G, W});
    v = padded(in.v, fp32, {A});
    b_out = padded(in.b_out, fp32, {C});
    keys = padded(in.keys, operand, {B, L, A});
    values = padded(in.values, operand, {B, L, V});
    w_context = view(padded(view(in.w_context, {3, h, c}), operand, {3, H, C}), {3 * H, C});
    u = view(padded(view(in.u, {3, h, h}), operand, {3, H, H}), {3 * H, H});
    w_query = padded(in.w_query, operand, {A, H});
    w_out = padded(in.w_out, operand, {C, V});
    w_location = padded(in.w_location, operand, {A, G});
    if (in.context_mask) context_mask = padded(*in.context_mask, fp32, {B, N, C});
    if (in.u_bias) u_bias = padded(view(*in.u_bias, {3, h}), fp32, {3, H});
  }

  Tensor empty(std::vector<int64_t> sizes, ScalarType type = ScalarType::Float) const {
    return new_empty(wx, std::move(sizes), type);
  }
  Tensor zeros(std::vector<int64_t> sizes, ScalarType type = ScalarType::Float) const {
    return new_zeros(wx, std::move(sizes), type);
  }

  static int64_t wide(int64_t width) { return ceil_div(width, kWidthMultiple) * kWidthMultiple; }
};

inline Outputs persistent_forward(const Inputs& in, cudaStream_t stream) {
  const Operands o(in);
  const ScalarType operand = o.operand;
  const Tensor h = o.empty({o.B, o.N, o.H}), context = o.empty({o.B, o.N, o.C}),
               attention = o.empty({o.B, o.N, o.L});
  const Tensor hidden = o.zeros({2, o.B, o.H}, operand), masked = o.zeros({o.B, o.C}, operand),
               query = o.empty({o.B, o.A}), energies = o.empty({o.B, o.L}),
               summary = o.empty({o.B, o.V}, operand), arrivals = o.zeros({1}, ScalarType::Int);
  Forward p = {};
  p.shape = o.shape;
  p.wx = floats(o.wx);
  p.context_mask = floats(o.context_mask);
  p.u_bias = floats(o.u_bias);
  p.filters = floats(o.filters);
  p.v = floats(o.v);
  p.b_out = floats(o.b_out);
  p.keys = address(o.keys);
  p.values = address(o.values);
  p.w_context = address(o.w_context);
  p.u = address(o.u);
  p.w_query = address(o.w_query);
  p.w_out = address(o.w_out);
  p.w_location = address(o.w_location);
  p.h = floats(h);
  p.context = floats(context);
  p.attention = floats(attention);
  p.hidden_operand = address(hidden);
  p.masked_operand = address(masked);
  p.query = floats(query);
  p.energies = floats(energies);
  p.summary = address(summary);
  p.arrivals = address<uint32_t>(arrivals);
  check_launch(run_forward(p, stream));
  return {trimmed(h, in.type(), {o.B, o.N, in.hidden()}),
          trimmed(context, in.type(), {o.B, o.N, in.context()}),
          torch::stable::to(attention, in.type())};
}

// Gradients that are sums over the frames and tokens of ds.
struct ScoreGradients {
  Tensor keys, v, w_location, filters;  // padded
};

inline ScoreGradients score_sums(const Operands& o, Needs needs, const Tensor& attention,
                                 const Tensor& query, const Tensor& features, const Tensor& de,
                                 cudaStream_t stream) {
  const int64_t G = kChannels, size = o.operand == ScalarType::Float ? 4 : 2;
  const int64_t row_bytes = o.N * o.L * o.A * size;
  const int64_t rows = std::clamp<int64_t>(kScoreBytes / row_bytes, 1, o.B);
  const int64_t tokens = std::clamp<int64_t>(kScoreBytes / (row_bytes / o.N), 1, o.N);
  ScoreGradients sums = {o.zeros({needs.keys ? o.B : 0, o.L, o.A}), o.empty({0}), o.zeros({o.A, G}),
                         o.empty({0})};
  const Tensor v_parts = o.zeros({o.B * o.shape.tiles(), o.A}), part = o.empty({o.A, G});
  Tensor df = o.empty({o.B * o.N * o.L, G}), all_features = flat(features, G),
         ds = o.empty({rows * tokens * o.L, o.A}, o.operand);
  Scores p = {};
  p.shape = o.shape;
  p.query = floats(query);
  p.de = floats(de);
  p.v = floats(o.v);
  p.features = address(features);
  p.keys = address(o.keys);
  p.w_location = address(o.w_location);
  p.ds = address(ds);
  p.keys_gradient = needs.keys ? floats(sums.keys) : nullptr;
  p.v_gradient = floats(v_parts);
  for (int64_t row = 0; row < o.B; row += rows) {
    for (int64_t token = 0; token < o.N; token += tokens) {
      p.first_row = static_cast<int>(row);
      p.rows = static_cast<int>(std::min(rows, o.B - row));
      p.first_token = static_cast<int>(token);
      p.tokens = static_cast<int>(std::min(tokens, o.N - token));
      check_launch(score_gradients(p, stream));
      if (!needs.alignment) continue;
      // More than one row comes with all tokens, so these are neighbours.
      const int64_t first = (row * o.N + token) * o.L, count = int64_t{p.rows} * p.tokens * o.L;
      const Tensor now = torch::stable::narrow(ds, 0, 0, count);
      multiply(now, o.w_location, torch::stable::narrow(df, 0, first, count));
      multiply(transposed(now), torch::stable::narrow(all_features, 0, first, count), part);
      sums.w_location = torch::stable::subtract(sums.w_location, part, -1.0);
    }
  }
  if (!needs.alignment) return sums;
  sums.v = sum_rows(v_parts);
  Filters filters = {};
  filters.shape = o.shape;
  filters.attention = floats(attention);
  filters.df = floats(df);
  const Tensor filter_parts = o.empty({filters.parts(), G * o.W});
  filters.gradients = floats(filter_parts);
  check_launch(filter_gradients(filters, stream));
  sums.filters = torch::stable::view(sum_rows(filter_parts), {G, o.W});
  return sums;
}

inline Gradients persistent_backward(const Inputs& in, const Saved& saved, Needs needs,
                                     cudaStream_t stream) {
  const Operands o(in);
  const ScalarType operand = o.operand, fp32 = ScalarType::Float, type = in.type();
  const int64_t B = o.B, N = o.N, L = o.L, H = o.H, A = o.A, V = o.V, C = o.C, G = kChannels;
  const Tensor h = padded(saved.h, fp32, {B, N, H}),
               context = padded(saved.context, fp32, {B, N, C}),
               attention = torch::stable::contiguous(torch::stable::to(saved.attention, fp32));

  // Of all tokens, before the loop.
  Previous previous = {};
  const Tensor hidden = o.empty({B, N, H}, operand), masked = o.empty({B, N, C}, operand);
  previous.shape = o.shape;
  previous.h = floats(h);
  previous.context = floats(context);
  previous.context_mask = floats(o.context_mask);
  previous.hidden = address(hidden);
  previous.masked = address(masked);
  check_launch(gather_previous(previous, stream));
  const Tensor h_operand = torch::stable::to(h, operand);
  const Tensor input = o.empty({B * N, 3 * H}), recurrent = o.empty({B * N, 3 * H}),
               query = o.empty({B * N, A});
  multiply(flat(masked, C), transposed(o.w_context), input);
  multiply(flat(hidden, H), transposed(o.u), recurrent);
  multiply(flat(h_operand, H), transposed(o.w_query), query);
  Features location = {};
  const Tensor features = o.empty({B, N, L, G}, operand);
  location.shape = o.shape;
  location.attention = floats(attention);
  location.filters = floats(o.filters);
  location.features = address(features);
  check_launch(location_features(location, stream));

  // The loop.
  auto upstream = [&](const OptionalTensor& t, int64_t width) -> OptionalTensor {
    if (!t) return std::nullopt;
    return padded(*t, fp32, {B, N, width});
  };
  const OptionalTensor grad_h = upstream(saved.grad_h, H),
                       grad_context = upstream(saved.grad_context, C),
                       grad_attention = upstream(saved.grad_attention, L);
  const Tensor w_context_t = dense_transpose(o.w_context), u_t = dense_transpose(o.u),
               w_query_t = dense_transpose(o.w_query), w_out_t = dense_transpose(o.w_out);
  const Tensor dc = o.empty({B, N, C}, operand), dx = o.empty({B, N, V}, operand),
               dq = o.empty({B, N, A}, operand), di = o.empty({B, N, 3 * H}, operand),
               dg = o.empty({B, N, 3 * H}, operand), de = o.empty({B, N, L});
  const Tensor hidden_carry = o.zeros({B, H}), direct = o.zeros({B, H}), dp = o.empty({B, L}),
               arrivals = o.zeros({1}, ScalarType::Int);
  Backward p = {};
  p.shape = o.shape;
  p.grad_h = floats(grad_h);
  p.grad_context = floats(grad_context);
  p.grad_attention = floats(grad_attention);
  p.wx = floats(o.wx);
  p.input = floats(input);
  p.recurrent = floats(recurrent);
  p.context_mask = floats(o.context_mask);
  p.u_bias = floats(o.u_bias);
  p.v = floats(o.v);
  p.h = floats(h);
  p.attention = floats(attention);
  p.query = floats(query);
  p.features = address(features);
  p.keys = address(o.keys);
  p.values = address(o.values);
  p.w_location = address(o.w_location);
  p.w_context_t = address(w_context_t);
  p.u_t = address(u_t);
  p.w_query_t = address(w_query_t);
  p.w_out_t = address(w_out_t);
  p.dc = address(dc);
  p.dx = address(dx);
  p.dq = address(dq);
  p.di = address(di);
  p.dg = address(dg);
  p.de = floats(de);
  p.hidden_carry = floats(hidden_carry);
  p.direct = floats(direct);
  p.dp = floats(dp);
  p.arrivals = address<uint32_t>(arrivals);
  check_launch(run_backward(p, stream));

  // Sums over tokens.
  const int64_t hidden_units = in.hidden(), contexts = in.context();
  const Tensor none = o.empty({0}, type);
  auto product = [&](const Tensor& gradient, const Tensor& x) {
    const Tensor out = o.empty({gradient.size(1), x.size(1)});
    multiply(transposed(gradient), x, out);
    return out;
  };
  auto total = [&](const Tensor& t) { return sum_rows(torch::stable::to(t, fp32)); };
  auto gates = [&](const Tensor& t, std::vector<int64_t> sizes, std::vector<int64_t> trimmed_sizes,
                   ScalarType wanted) {
    return trimmed(torch::stable::view(t, sizes), wanted, trimmed_sizes);
  };
  const Tensor flat_di = flat(di, 3 * H), flat_dg = flat(dg, 3 * H);
  Gradients gradients = zero_gradients(in, {});
  auto& [grad_wx, grad_keys, grad_values, grad_w_context, grad_u, grad_u_bias, grad_w_query,
         grad_filters, grad_w_location, grad_v, grad_w_out, grad_b_out] = gradients;
  if (needs.wx)
    grad_wx = torch::stable::view(
        gates(di, {B, N, 3, H}, {B, N, 3, hidden_units}, in.wx.scalar_type()), sizes_of(in.wx));
  if (needs.keys || needs.alignment) {
    const ScoreGradients sums = score_sums(o, needs, attention, query, features, de, stream);
    if (needs.keys) grad_keys = trimmed(sums.keys, in.keys.scalar_type(), sizes_of(in.keys));
    if (needs.alignment) {
      grad_filters = trimmed(sums.filters, type, sizes_of(in.filters));
      grad_w_location = trimmed(sums.w_location, type, sizes_of(in.w_location));
      grad_v = trimmed(sums.v, type, sizes_of(in.v));
    }
  }
  const Tensor p_operand = torch::stable::to(attention, operand);
  if (needs.values) {
    const Tensor sums = o.empty({B, L, V});
    multiply(transposed(p_operand), dx, sums);
    grad_values = trimmed(sums, in.values.scalar_type(), sizes_of(in.values));
  }
  if (needs.cell) {
    grad_w_context = torch::stable::view(
        gates(product(flat_di, flat(masked, C)), {3, H, C}, {3, hidden_units, contexts}, type),
        sizes_of(in.w_context));
    grad_u = torch::stable::view(
        gates(product(flat_dg, flat(hidden, H)), {3, H, H}, {3, hidden_units, hidden_units}, type),
        sizes_of(in.u));
    if (in.u_bias)
      grad_u_bias = torch::stable::view(gates(total(flat_dg), {3, H}, {3, hidden_units}, type),
                                        sizes_of(*in.u_bias));
  }
  if (needs.query)
    grad_w_query = trimmed(product(flat(dq, A), flat(h_operand, H)), type, sizes_of(in.w_query));
  if (needs.out) {
    const Tensor summary = o.empty({B, N, V}, operand);
    multiply(p_operand, o.values, summary);
    grad_w_out = trimmed(product(flat(dc, C), flat(summary, V)), type, sizes_of(in.w_out));
    grad_b_out = trimmed(total(flat(dc, C)), type, sizes_of(in.b_out));
  }
  return gradients;
}

}  // namespace sb_fast_sligru::attention_decoder
