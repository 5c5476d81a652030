// The boundary of the operator: the arguments of its two ops, checked and gathered in one struct.
// Each device registers its implementation through Operator. `sb_fast_sligru.ops.attention_decoder`
// prepares the arguments; decoder.h has the mathematics and the axes.
#pragma once

#include "attention_decoder/decoder.h"
#include "common/tensors.h"

namespace sb_fast_sligru::attention_decoder {

struct Inputs {
  Tensor wx, keys, values, lengths;
  OptionalTensor context_mask;
  Tensor w_context, u;
  OptionalTensor u_bias;
  Tensor w_query, filters, w_location, v, w_out, b_out;
  double scaling;
  ScalarType operand_type;

  int64_t batch() const { return wx.size(0); }
  int64_t tokens() const { return wx.size(1); }
  int64_t frames() const { return keys.size(1); }
  int64_t hidden() const { return u.size(1); }
  int64_t attention() const { return keys.size(2); }
  int64_t value() const { return values.size(2); }
  int64_t context() const { return w_out.size(0); }
  int64_t channels() const { return filters.size(0); }
  int64_t taps() const { return filters.size(1); }
  bool empty() const { return batch() == 0 || tokens() == 0; }
  // Of the weights and of everything that comes out.
  ScalarType type() const { return u.scalar_type(); }
};

// What the backward receives beside the forward's arguments: gradients, if there are any, and what
// the forward returned.
struct Saved {
  OptionalTensor grad_h, grad_context, grad_attention;
  Tensor h, context, attention;
};

// Which gradients are wanted; those that are not come back as empty tensors.
struct Needs {
  bool wx, keys, values;
  bool cell;       // w_context, u, u_bias
  bool query;      // w_query
  bool alignment;  // filters, w_location, v
  bool out;        // w_out, b_out
};

// h, context, attention.
using Outputs = std::tuple<Tensor, Tensor, Tensor>;
// Of wx, keys, values, w_context, u, u_bias, w_query, filters, w_location, v, w_out, b_out.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor>;

// ---- checks
// Raises unless t has these sizes, the device of wx and one of two dtypes; returns it contiguous.
inline Tensor checked(const char* name, const Tensor& t, const std::vector<int64_t>& sizes,
                      const Tensor& wx, ScalarType type, ScalarType other) {
  return checked_tensor(name, t, sizes, {type, other}, wx, "wx");
}

inline void check_rank(const char* name, const Tensor& t, int64_t rank, const char* expected) {
  STD_TORCH_CHECK(t.dim() == rank, name, ": got ", describe(t), ", expected ", expected);
}

// Raises for a bad argument; makes all contiguous.
inline Inputs check_inputs(const Tensor& wx, const Tensor& keys, const Tensor& values,
                           const Tensor& lengths, OptionalTensor context_mask,
                           const Tensor& w_context, const Tensor& u, OptionalTensor u_bias,
                           const Tensor& w_query, const Tensor& filters, const Tensor& w_location,
                           const Tensor& v, const Tensor& w_out, const Tensor& b_out,
                           double scaling, const std::string& operand_dtype) {
  check_rank("wx", wx, 3, "[B, N, 3H]");
  check_rank("keys", keys, 3, "[B, L, A]");
  check_rank("values", values, 3, "[B, L, V]");
  check_rank("u", u, 2, "[3H, H]");
  check_rank("filters", filters, 2, "[G, W]");
  check_rank("w_out", w_out, 2, "[C, V]");
  const ScalarType type = u.scalar_type();
  const ScalarType operand_type = type_named("operand_dtype", operand_dtype);
  const bool half = operand_type == ScalarType::BFloat16 || operand_type == ScalarType::Half;
  STD_TORCH_CHECK(type == operand_type || (half && type == ScalarType::Float), "u: got ",
                  torch::headeronly::toString(type), " beside operands of ",
                  torch::headeronly::toString(operand_type));
  STD_TORCH_CHECK(filters.size(1) % 2 == 1, "filters: got ", describe(filters),
                  ", expected an odd number of taps");
  const int64_t B = wx.size(0), N = wx.size(1), L = keys.size(1), H = u.size(1), A = keys.size(2),
                V = values.size(2), C = w_out.size(0), G = filters.size(0);
  STD_TORCH_CHECK(L > 0, "keys: got ", describe(keys), ", expected at least one frame");
  Inputs in{checked("wx", wx, {B, N, 3 * H}, wx, type, operand_type),
            checked("keys", keys, {B, L, A}, wx, type, operand_type),
            checked("values", values, {B, L, V}, wx, type, operand_type),
            checked("lengths", lengths, {B}, wx, ScalarType::Long, ScalarType::Long),
            std::nullopt,
            checked("w_context", w_context, {3 * H, C}, wx, type, type),
            checked("u", u, {3 * H, H}, wx, type, type),
            std::nullopt,
            checked("w_query", w_query, {A, H}, wx, type, type),
            checked("filters", filters, {G, filters.size(1)}, wx, type, type),
            checked("w_location", w_location, {A, G}, wx, type, type),
            checked("v", v, {A}, wx, type, type),
            checked("w_out", w_out, {C, V}, wx, type, type),
            checked("b_out", b_out, {C}, wx, type, type),
            scaling,
            operand_type};
  if (context_mask)
    in.context_mask = checked("context_mask", *context_mask, {B, N, C}, wx, type, operand_type);
  if (u_bias) in.u_bias = checked("u_bias", *u_bias, {3 * H}, wx, type, type);
  return in;
}

inline Saved check_saved(const Inputs& in, OptionalTensor grad_h, OptionalTensor grad_context,
                         OptionalTensor grad_attention, const Tensor& h, const Tensor& context,
                         const Tensor& attention) {
  const int64_t B = in.batch(), N = in.tokens();
  auto same = [&](const char* name, const Tensor& t, int64_t width) {
    return checked(name, t, {B, N, width}, in.wx, in.type(), in.type());
  };
  Saved saved{std::nullopt,
              std::nullopt,
              std::nullopt,
              same("h", h, in.hidden()),
              same("context", context, in.context()),
              same("attention", attention, in.frames())};
  if (grad_h) saved.grad_h = same("grad_h", *grad_h, in.hidden());
  if (grad_context) saved.grad_context = same("grad_context", *grad_context, in.context());
  if (grad_attention) saved.grad_attention = same("grad_attention", *grad_attention, in.frames());
  return saved;
}

// ---- results of a call without tokens
inline Outputs empty_outputs(const Inputs& in) {
  auto empty = [&](int64_t width) {
    return new_empty(in.wx, {in.batch(), in.tokens(), width}, in.type());
  };
  return {empty(in.hidden()), empty(in.context()), empty(in.frames())};
}

inline Gradients zero_gradients(const Inputs& in, Needs needs) {
  auto zeros_if = [&](bool wanted, const Tensor& like) {
    return torch::stable::new_zeros(like, wanted ? sizes_of(like) : std::vector<int64_t>{0},
                                    like.scalar_type());
  };
  return {zeros_if(needs.wx, in.wx),
          zeros_if(needs.keys, in.keys),
          zeros_if(needs.values, in.values),
          zeros_if(needs.cell, in.w_context),
          zeros_if(needs.cell, in.u),
          zeros_if(needs.cell && in.u_bias, in.u_bias ? *in.u_bias : in.u),
          zeros_if(needs.query, in.w_query),
          zeros_if(needs.alignment, in.filters),
          zeros_if(needs.alignment, in.w_location),
          zeros_if(needs.alignment, in.v),
          zeros_if(needs.out, in.w_out),
          zeros_if(needs.out, in.b_out)};
}

// ---- the ops
// As the dispatcher calls them. A device's Implementation has forward(backend, in) and
// backward(backend, in, saved, needs).
template <class Implementation>
struct Operator {
  static Outputs forward(const Tensor& wx, const Tensor& keys, const Tensor& values,
                         const Tensor& lengths, OptionalTensor context_mask,
                         const Tensor& w_context, const Tensor& u, OptionalTensor u_bias,
                         const Tensor& w_query, const Tensor& filters, const Tensor& w_location,
                         const Tensor& v, const Tensor& w_out, const Tensor& b_out, double scaling,
                         std::string operand_dtype, std::string backend) {
    return Implementation::forward(
        backend, check_inputs(wx, keys, values, lengths, std::move(context_mask), w_context, u,
                              std::move(u_bias), w_query, filters, w_location, v, w_out, b_out,
                              scaling, operand_dtype));
  }

  static Gradients backward(OptionalTensor grad_h, OptionalTensor grad_context,
                            OptionalTensor grad_attention, const Tensor& wx, const Tensor& keys,
                            const Tensor& values, const Tensor& lengths,
                            OptionalTensor context_mask, const Tensor& w_context, const Tensor& u,
                            OptionalTensor u_bias, const Tensor& w_query, const Tensor& filters,
                            const Tensor& w_location, const Tensor& v, const Tensor& w_out,
                            const Tensor& b_out, double scaling, std::string operand_dtype,
                            std::string backend, const Tensor& h, const Tensor& context,
                            const Tensor& attention, bool need_wx, bool need_keys, bool need_values,
                            bool need_cell, bool need_query, bool need_alignment, bool need_out) {
    const Inputs in = check_inputs(wx, keys, values, lengths, std::move(context_mask), w_context, u,
                                   std::move(u_bias), w_query, filters, w_location, v, w_out, b_out,
                                   scaling, operand_dtype);
    return Implementation::backward(
        backend, in,
        check_saved(in, std::move(grad_h), std::move(grad_context), std::move(grad_attention), h,
                    context, attention),
        Needs{need_wx, need_keys, need_values, need_cell, need_query, need_alignment, need_out});
  }
};

}  // namespace sb_fast_sligru::attention_decoder
