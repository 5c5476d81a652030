// The boundary of the operator: the arguments of its two ops, checked and gathered in one struct.
// Everything behind it takes that struct; each device registers its implementation through
// Operator. `sb_fast_sligru.ops.light_gru` prepares the arguments.
#pragma once

#include "common/tensors.h"
#include "light_gru/recurrence.h"

namespace sb_fast_sligru {

struct Inputs {
  Tensor wx, u;
  OptionalTensor h0, drop_mask, ln_weight, ln_bias, lengths;
  std::optional<int64_t> packed_time;  // T, if the sequences are packed
  bool layer_norm;
  double eps;
  Activation activation;
  bool bidirectional;
  ScalarType operand_type;

  bool packed() const { return packed_time.has_value(); }
  int64_t batch() const { return packed() ? lengths->size(0) : wx.size(0); }
  int64_t time() const { return packed() ? *packed_time : wx.size(1); }
  int64_t hidden() const { return u.size(1); }
  int64_t directions() const { return bidirectional ? 2 : 1; }
  int64_t rows() const { return batch() * directions(); }
  ScalarType acc_type() const { return accumulation_type(u.scalar_type()); }

  Recurrence recurrence() const {
    Recurrence layer = {};
    layer.batch = batch();
    layer.time = time();
    layer.hidden = hidden();
    layer.directions = directions();
    layer.layer_norm = layer_norm;
    layer.eps = eps;
    layer.activation = activation;
    layer.wx_type = dtype_of(wx.scalar_type());
    layer.operand_type = dtype_of(operand_type);
    layer.output_type = dtype_of(u.scalar_type());
    layer.wx = wx.const_data_ptr();
    layer.wx_batch_stride = packed() ? 0 : wx.stride(0);
    layer.wx_time_stride = wx.stride(wx.dim() - 2);
    layer.h0 = pointer(h0);
    layer.drop_mask = pointer(drop_mask);
    layer.ln_weight = pointer(ln_weight);
    layer.ln_bias = pointer(ln_bias);
    layer.lengths = static_cast<const int32_t*>(pointer(lengths));
    return layer;
  }

  // [B, T, n] or, packed, [frames, n].
  std::vector<int64_t> frame_sizes(int64_t n) const {
    return packed() ? std::vector{wx.size(0), n} : std::vector{batch(), time(), n};
  }
  Tensor new_rho() const {
    const std::vector<int64_t> sizes{layer_norm ? rows() : 0, time()};
    return lengths ? new_zeros(wx, sizes, acc_type()) : new_empty(wx, sizes, acc_type());
  }
};

// What the backward receives beside the forward's arguments.
struct Saved {
  Tensor grad_h, h, rho;
};

// Which gradients are wanted. Those that are not come back as empty tensors.
struct Needs {
  bool wx, u, h0, ln;
};

// h and rho.
using Outputs = std::tuple<Tensor, Tensor>;
// Of wx, u, h0, ln_weight, ln_bias.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// ---- checks
inline Activation parse_activation(const std::string& name) {
  std::string names;
  for (const Activation activation : kActivations) {
    if (name == name_of(activation)) return activation;
    names += (names.empty() ? "" : ", ") + std::string(name_of(activation));
  }
  STD_TORCH_CHECK(false, "activation: got \"", name, "\", expected one of ", names);
}

inline void check_optional(const char* name, OptionalTensor& t, std::vector<int64_t> sizes,
                           const Tensor& wx, ScalarType type) {
  if (!t.has_value()) return;
  bool same = t->dim() == static_cast<int64_t>(sizes.size()) && t->scalar_type() == type;
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t->size(i) == sizes[i];
  std::string expected;
  for (size_t i = 0; i < sizes.size(); ++i) expected += (i ? ", " : "") + std::to_string(sizes[i]);
  STD_TORCH_CHECK(same, name, ": got ", describe(*t), ", expected ",
                  torch::headeronly::toString(type), " [", expected, "]");
  STD_TORCH_CHECK(t->device() == wx.device(), name, ": must be on the device of wx");
  t = torch::stable::contiguous(*t);
}

// Raises for a bad argument; makes contiguous what has to be.
inline Inputs check_inputs(const Tensor& wx, const Tensor& u, OptionalTensor h0,
                           OptionalTensor drop_mask, OptionalTensor ln_weight,
                           OptionalTensor ln_bias, OptionalTensor lengths,
                           std::optional<int64_t> packed_time, bool layer_norm, double eps,
                           const std::string& activation, bool bidirectional,
                           const std::string& operand_dtype) {
  STD_TORCH_CHECK(packed_time ? wx.dim() == 2 : wx.dim() == 3, "wx: got ", describe(wx),
                  packed_time ? ", expected [frames, 2H]" : ", expected [B, T, 2H]");
  STD_TORCH_CHECK(!packed_time || (lengths.has_value() && lengths->dim() == 1),
                  "lengths: required, [B], of packed sequences");
  STD_TORCH_CHECK(!packed_time || *packed_time >= 0, "packed_time: got ", packed_time.value_or(0));
  STD_TORCH_CHECK(u.dim() == 2 && u.size(0) == 2 * u.size(1) && u.size(1) > 0, "u: got ",
                  describe(u), ", expected [2H, H]");
  const int64_t width = wx.size(wx.dim() - 1);
  STD_TORCH_CHECK(width == u.size(0), "wx: its last axis is ", width, ", expected 2H = ", u.size(0),
                  " as given by u");
  STD_TORCH_CHECK(u.device() == wx.device(), "u: must be on the device of wx");
  const ScalarType operand_type = type_named("operand_dtype", operand_dtype);
  const bool half = operand_type == ScalarType::BFloat16 || operand_type == ScalarType::Half;
  auto allowed = [&](ScalarType type) {
    return type == operand_type || (half && type == ScalarType::Float);
  };
  STD_TORCH_CHECK(
      allowed(u.scalar_type()) && allowed(wx.scalar_type()) &&
          (u.scalar_type() == ScalarType::Float || wx.scalar_type() == u.scalar_type()),
      "dtypes: got wx ", torch::headeronly::toString(wx.scalar_type()), ", u ",
      torch::headeronly::toString(u.scalar_type()), ", operands ",
      torch::headeronly::toString(operand_type),
      "; expected one dtype, or 16-bit operands with a float32 u and a float32 or 16-bit wx");
  Inputs in{with_unit_last_stride(wx), torch::stable::contiguous(u)};
  in.h0 = std::move(h0);
  in.drop_mask = std::move(drop_mask);
  in.ln_weight = std::move(ln_weight);
  in.ln_bias = std::move(ln_bias);
  in.lengths = std::move(lengths);
  in.packed_time = packed_time;
  in.layer_norm = layer_norm;
  in.eps = eps;
  in.activation = parse_activation(activation);
  in.bidirectional = bidirectional;
  in.operand_type = operand_type;
  STD_TORCH_CHECK(in.layer_norm || (!in.ln_weight && !in.ln_bias),
                  "ln_weight, ln_bias: given although layer_norm is off");
  check_optional("h0", in.h0, {in.rows(), in.hidden()}, wx, in.acc_type());
  check_optional("drop_mask", in.drop_mask, {in.rows(), in.hidden()}, wx, in.acc_type());
  check_optional("ln_weight", in.ln_weight, {2 * in.hidden()}, wx, in.acc_type());
  check_optional("ln_bias", in.ln_bias, {2 * in.hidden()}, wx, in.acc_type());
  check_optional("lengths", in.lengths, {in.batch()}, wx, ScalarType::Int);
  return in;
}

inline void check_saved(const Inputs& in, const Saved& saved) {
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor&>{"grad_h", saved.grad_h}, {"h", saved.h}}) {
    STD_TORCH_CHECK(sizes_of(t) == in.frame_sizes(in.directions() * in.hidden()) &&
                        t.scalar_type() == in.u.scalar_type(),
                    name, ": got ", describe(t), ", expected what the forward returned as h");
  }
  const Tensor& rho = saved.rho;
  STD_TORCH_CHECK(saved.h.is_contiguous() && rho.is_contiguous() && rho.dim() == 2 &&
                      rho.size(0) == (in.layer_norm ? in.rows() : 0) && rho.size(1) == in.time() &&
                      rho.scalar_type() == in.acc_type(),
                  "rho: got ", describe(rho), ", expected what the forward returned as rho");
}

// ---- the ops
// As the dispatcher calls them. A device's Implementation has forward(backend, in) and
// backward(backend, in, saved, needs).
template <class Implementation>
struct Operator {
  static Outputs forward(const Tensor& wx, const Tensor& u, OptionalTensor h0,
                         OptionalTensor drop_mask, OptionalTensor ln_weight, OptionalTensor ln_bias,
                         OptionalTensor lengths, std::optional<int64_t> packed_time,
                         bool layer_norm, double eps, std::string activation, bool bidirectional,
                         std::string operand_dtype, std::string backend) {
    const Inputs in = check_inputs(wx, u, std::move(h0), std::move(drop_mask), std::move(ln_weight),
                                   std::move(ln_bias), std::move(lengths), packed_time, layer_norm,
                                   eps, activation, bidirectional, operand_dtype);
    return Implementation::forward(backend, in);
  }

  static Gradients backward(const Tensor& grad_h, const Tensor& wx, const Tensor& u,
                            OptionalTensor h0, OptionalTensor drop_mask, OptionalTensor ln_weight,
                            OptionalTensor ln_bias, OptionalTensor lengths,
                            std::optional<int64_t> packed_time, bool layer_norm, double eps,
                            std::string activation, bool bidirectional, std::string operand_dtype,
                            std::string backend, const Tensor& h, const Tensor& rho, bool need_wx,
                            bool need_u, bool need_h0, bool need_ln) {
    const Inputs in = check_inputs(wx, u, std::move(h0), std::move(drop_mask), std::move(ln_weight),
                                   std::move(ln_bias), std::move(lengths), packed_time, layer_norm,
                                   eps, activation, bidirectional, operand_dtype);
    const Saved saved{grad_h, h, rho};
    check_saved(in, saved);
    return Implementation::backward(backend, in, saved, Needs{need_wx, need_u, need_h0, need_ln});
  }
};

}  // namespace sb_fast_sligru
