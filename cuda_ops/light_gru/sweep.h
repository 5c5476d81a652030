// Both passes over the sequence, written once for every backend that issues the recurrent product
// step by step. A backend is a class `Steps`: the element kernels of recurrence.h and U as its
// products read it (CpuSteps in operator.cpp, CudaSteps in operator_cuda.cpp). Included by exactly
// those two files: the only ones that see tensors.
//
// Memory: the forward keeps h and rho; the backward recomputes U h_{t-1} with one product per chunk
// of time, so its temporaries stay near Steps::kChunkBytes whatever T is.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "light_gru/recurrence.h"

namespace sb_fast_sligru {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ----------------------------------------------------------------------------------------------
// small helpers

inline std::string describe(const Tensor& t) {
  std::string text = std::string(torch::headeronly::toString(t.scalar_type())) + " [";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat16;
  }
}

inline Tensor with_unit_last_stride(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor new_empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

inline Tensor new_zeros(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_zeros(like, sizes, type);
}

inline const void* pointer(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// out = a b. For 16-bit operands `out` may be float32, which the accumulator then reaches
// unrounded.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (a.scalar_type() == out.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    to<Tensor>(stack[0]);  // takes the returned reference back
  } else {
    std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    to<Tensor>(stack[0]);
  }
}

inline Tensor sum_rows(const Tensor& t, bool keepdim = false) {
  const std::vector<int64_t> first_axis{0};
  return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(first_axis), keepdim);
}

inline Tensor subtract_column_mean(const Tensor& t) {
  return torch::stable::subtract(t, sum_rows(t, /*keepdim=*/true),
                                 1.0 / static_cast<double>(t.size(0)));
}

// ----------------------------------------------------------------------------------------------------
// inputs

// The arguments that both ops share, checked once. `sb_fast_sligru.ops.light_gru` prepares them.
struct Inputs {
  Tensor wx, u;
  OptionalTensor h0, drop_mask, ln_weight, ln_bias;
  bool layer_norm;
  double eps;
  Activation activation;
  bool bidirectional;
  ScalarType operand_type;

  int64_t batch() const { return wx.size(0); }
  int64_t time() const { return wx.size(1); }
  int64_t hidden() const { return u.size(1); }
  int64_t directions() const { return bidirectional ? 2 : 1; }
  int64_t rows() const { return batch() * directions(); }
  ScalarType acc_type() const { return accumulation_type(u.scalar_type()); }

  Recurrence recurrence() const {
    return {batch(),
            time(),
            hidden(),
            directions(),
            layer_norm,
            eps,
            activation,
            dtype_of(wx.scalar_type()),
            dtype_of(operand_type),
            dtype_of(u.scalar_type()),
            wx.const_data_ptr(),
            wx.stride(0),
            wx.stride(1),
            pointer(h0),
            pointer(drop_mask),
            pointer(ln_weight),
            pointer(ln_bias)};
  }
};

inline Activation parse_activation(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "tanh") return Activation::kTanh;
  if (name == "sin") return Activation::kSin;
  STD_TORCH_CHECK(name == "leaky_relu", "activation: got \"", name,
                  "\", expected relu, tanh, sin or leaky_relu");
  return Activation::kLeakyRelu;
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

inline Inputs check_inputs(const Tensor& wx, const Tensor& u, OptionalTensor h0,
                           OptionalTensor drop_mask, OptionalTensor ln_weight,
                           OptionalTensor ln_bias, bool layer_norm, double eps,
                           const std::string& activation, bool bidirectional,
                           ScalarType operand_type) {
  STD_TORCH_CHECK(wx.dim() == 3, "wx: got ", describe(wx), ", expected [B, T, 2H]");
  STD_TORCH_CHECK(u.dim() == 2 && u.size(0) == 2 * u.size(1) && u.size(1) > 0, "u: got ",
                  describe(u), ", expected [2H, H]");
  STD_TORCH_CHECK(wx.size(2) == u.size(0), "wx: its last axis is ", wx.size(2),
                  ", expected 2H = ", u.size(0), " as given by u");
  STD_TORCH_CHECK(u.device() == wx.device(), "u: must be on the device of wx");
  const bool half = operand_type == ScalarType::BFloat16 || operand_type == ScalarType::Half;
  STD_TORCH_CHECK(half || operand_type == ScalarType::Float || operand_type == ScalarType::Double,
                  "operand_dtype: got ", torch::headeronly::toString(operand_type),
                  ", expected float64, float32, bfloat16 or float16");
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
  Inputs in{with_unit_last_stride(wx),
            torch::stable::contiguous(u),
            std::move(h0),
            std::move(drop_mask),
            std::move(ln_weight),
            std::move(ln_bias),
            layer_norm,
            eps,
            parse_activation(activation),
            bidirectional,
            operand_type};
  STD_TORCH_CHECK(layer_norm || (!in.ln_weight && !in.ln_bias),
                  "ln_weight, ln_bias: given although layer_norm is off");
  check_optional("h0", in.h0, {in.rows(), in.hidden()}, wx, in.acc_type());
  check_optional("drop_mask", in.drop_mask, {in.rows(), in.hidden()}, wx, in.acc_type());
  check_optional("ln_weight", in.ln_weight, {2 * in.hidden()}, wx, in.acc_type());
  check_optional("ln_bias", in.ln_bias, {2 * in.hidden()}, wx, in.acc_type());
  return in;
}

// What the backward receives beside the forward's arguments.
inline void check_saved(const Inputs& in, const Tensor& grad_h, const Tensor& h, const Tensor& rho,
                        ScalarType output) {
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor&>{"grad_h", grad_h}, {"h", h}}) {
    STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == in.batch() && t.size(1) == in.time() &&
                        t.size(2) == in.directions() * in.hidden() && t.scalar_type() == output,
                    name, ": got ", describe(t), ", expected what the forward returned as h");
  }
  STD_TORCH_CHECK(h.is_contiguous() && rho.is_contiguous() && rho.dim() == 2 &&
                      rho.size(0) == (in.layer_norm ? in.rows() : 0) && rho.size(1) == in.time() &&
                      rho.scalar_type() == in.acc_type(),
                  "rho: got ", describe(rho), ", expected what the forward returned as rho");
}

// ----------------------------------------------------------------------------------------------------
// forward

template <class Steps>
std::tuple<Tensor, Tensor> forward_sweep(const Inputs& in, const Steps& steps) {
  const int64_t R = in.rows(), T = in.time(), H = in.hidden();
  const ScalarType acc = in.acc_type();
  Tensor h = new_empty(in.wx, {in.batch(), T, in.directions() * H}, in.u.scalar_type());
  Tensor rho = new_empty(in.wx, {in.layer_norm ? R : 0, T}, acc);
  if (R == 0 || T == 0) return {h, rho};

  const Tensor uc = steps.recurrent_operand(in);
  Tensor state = in.h0 ? torch::stable::clone(*in.h0) : new_zeros(in.wx, {R, H}, acc);
  const Tensor operand = in.operand_type == acc ? state : torch::stable::to(state, in.operand_type);

  // r = operand Uc^T. BLAS on the CPU is fastest when it writes r transposed.
  const Tensor uc_t = torch::stable::transpose(uc, 0, 1),
               operand_t = torch::stable::transpose(operand, 0, 1);
  const Tensor r = Steps::kTransposedProduct ? new_empty(in.wx, {2 * H, R}, acc)
                                             : new_empty(in.wx, {R, 2 * H}, acc);
  const ForwardStep p{in.recurrence(),
                      r.const_data_ptr(),
                      Steps::kTransposedProduct ? 1 : 2 * H,
                      Steps::kTransposedProduct ? R : 1,
                      state.mutable_data_ptr(),
                      operand.mutable_data_ptr(),
                      h.mutable_data_ptr(),
                      rho.mutable_data_ptr()};
  for (int64_t n = 0; n < T; ++n) {
    if (Steps::kTransposedProduct) {
      multiply(uc, operand_t, r);
    } else {
      multiply(operand, uc_t, r);
    }
    steps.forward_step(p, n);
  }
  return {h, rho};
}

// ---------------------------------------------------------------------------------------------------
// backward

// Which gradients are wanted. Those that are not come back as empty tensors.
struct Needs {
  bool wx, u, h0, ln;
};

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // wx, u, h0, ln_weight, ln_bias

template <class Steps>
Gradients backward_sweep(const Inputs& in, const Tensor& grad_h_in, const Tensor& h,
                         const Tensor& rho, Needs needs, const Steps& steps) {
  const int64_t B = in.batch(), R = in.rows(), T = in.time(), H = in.hidden();
  const ScalarType acc = in.acc_type();
  const bool need_ln = needs.ln && in.layer_norm;
  const Tensor grad_h = with_unit_last_stride(grad_h_in);
  auto sizes_if = [](bool wanted, std::vector<int64_t> sizes) {
    return wanted ? sizes : std::vector<int64_t>{0};
  };

  const Tensor uc = steps.recurrent_operand(in), uc_t = torch::stable::transpose(uc, 0, 1);
  Tensor grad_wx = new_empty(in.wx, sizes_if(needs.wx, {B, T, 2 * H}), in.wx.scalar_type());
  Tensor grad_u = new_zeros(in.wx, sizes_if(needs.u, {2 * H, H}), acc);
  Tensor grad_ln_weight = new_zeros(in.wx, sizes_if(need_ln, {R, 2 * H}), acc);
  Tensor grad_ln_bias = new_zeros(in.wx, sizes_if(need_ln, {R, 2 * H}), acc);
  Tensor grad_h0 = new_zeros(in.wx, sizes_if(needs.h0, {R, H}), acc);

  if (R > 0 && T > 0) {
    const int64_t step_elements = R * (H + 2 * H + 2 * H);  // h_{t-1}, r and e
    const int64_t element_bytes = acc == ScalarType::Double ? 8 : 4;
    const int64_t chunk =
        std::clamp<int64_t>(Steps::kChunkBytes / (element_bytes * step_elements), 1, T);
    Tensor previous = new_empty(in.wx, {chunk * R, H}, in.operand_type);
    Tensor r = new_empty(in.wx, {chunk * R, 2 * H}, acc);
    Tensor e = new_empty(in.wx, {chunk * R, 2 * H}, in.operand_type);
    const Tensor base = new_zeros(in.wx, {R, H}, acc), product = new_zeros(in.wx, {R, H}, acc);
    // One view per step of a chunk, made once: the loop over time then allocates nothing.
    std::vector<Tensor> e_of, r_of, previous_of;
    for (int64_t i = 0; i < chunk; ++i) {
      e_of.push_back(torch::stable::narrow(e, 0, i * R, R));
      r_of.push_back(torch::stable::narrow(r, 0, i * R, R));
      previous_of.push_back(torch::stable::narrow(previous, 0, i * R, R));
    }

    BackwardStep p{in.recurrence(),
                   grad_h.const_data_ptr(),
                   grad_h.stride(0),
                   grad_h.stride(1),
                   h.const_data_ptr(),
                   rho.const_data_ptr(),
                   nullptr,
                   base.mutable_data_ptr(),
                   product.const_data_ptr(),
                   nullptr,
                   nullptr,
                   needs.wx ? grad_wx.mutable_data_ptr() : nullptr,
                   need_ln ? grad_ln_weight.mutable_data_ptr() : nullptr,
                   need_ln ? grad_ln_bias.mutable_data_ptr() : nullptr,
                   0,
                   R};
    for (int64_t end = T; end > 0; end -= chunk) {
      const int64_t begin = std::max<int64_t>(end - chunk, 0), length = end - begin;
      steps.gather_previous(
          {in.recurrence(), h.const_data_ptr(), begin, length, previous.mutable_data_ptr()});
      const Tensor previous_chunk = torch::stable::narrow(previous, 0, 0, length * R);
      Tensor r_chunk = torch::stable::narrow(r, 0, 0, length * R),
             e_chunk = torch::stable::narrow(e, 0, 0, length * R);
      multiply(previous_chunk, uc_t, r_chunk);
      for (int64_t n = end - 1; n >= begin; --n) {
        p.r = r_of[n - begin].const_data_ptr();
        p.e = e_of[n - begin].mutable_data_ptr();
        p.scaled = needs.u ? previous_of[n - begin].mutable_data_ptr() : nullptr;
        if (in.bidirectional && 2 * n + 1 == T) {
          // Both directions meet at this time: the second adds to the grad_wx that the first wrote.
          p.last_row = B;
          steps.backward_step(p, n);
          p.first_row = B;
          p.last_row = R;
          steps.backward_step(p, n);
          p.first_row = 0;
        } else {
          steps.backward_step(p, n);
        }
        if (n > 0 || needs.h0) multiply(e_of[n - begin], uc, product);
      }
      if (needs.u) {
        const Tensor part = new_empty(in.wx, {2 * H, H}, acc);
        multiply(torch::stable::transpose(e_chunk, 0, 1), previous_chunk, part);
        grad_u = torch::stable::subtract(grad_u, part, -1.0);
      }
    }
    if (needs.h0) {
      steps.finish_carry({in.recurrence(), rho.const_data_ptr(), base.const_data_ptr(),
                          product.const_data_ptr(), grad_h0.mutable_data_ptr()});
    }
  }
  if (needs.u) {
    if (in.layer_norm) grad_u = subtract_column_mean(grad_u);
    grad_u = torch::stable::to(grad_u, in.u.scalar_type());
  }
  if (need_ln) {
    grad_ln_weight = sum_rows(grad_ln_weight);
    grad_ln_bias = sum_rows(grad_ln_bias);
  }
  return {grad_wx, grad_u, grad_h0, grad_ln_weight, grad_ln_bias};
}

}  // namespace sb_fast_sligru
