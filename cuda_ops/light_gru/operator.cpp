// Library _C: the schemas of the two ops and their CPU implementation. Links no CUDA library; the
// CUDA implementations live in _C_cuda (operator_cuda.cpp). Built against torch's stable ABI: one
// file loads under any torch >= 2.10 and any Python.
//
// light_gru           h [B, T, D * H] of u's dtype, and rho [R, T] (empty for Li-GRU), which the
// backward wants light_gru_backward  gradients of wx, u, h0, ln_weight, ln_bias; empty where need_*
// is false
//
// wx [B, T, 2H], u [2H, H], h0 and drop_mask [R, H], ln_* [2H]; see recurrence.h for the axes.
// Matrix operands are rounded to operand_dtype; h0, drop_mask and ln_* come in the accumulation
// type.
#include "light_gru/sweep.h"

namespace sb_fast_sligru {
namespace {

struct CpuSteps {
  static constexpr bool kTransposedProduct = true;
  static constexpr int64_t kChunkBytes = int64_t{8} << 20;  // near the last-level cache

  // Centred when a LayerNorm follows: see cell.h.
  Tensor recurrent_operand(const Inputs& in) const {
    return in.layer_norm ? subtract_column_mean(in.u) : in.u;
  }
  void forward_step(const ForwardStep& p, int64_t step) const { cpu::forward_step(p, step); }
  void gather_previous(const GatherPrevious& p) const { cpu::gather_previous(p); }
  void backward_step(const BackwardStep& p, int64_t step) const { cpu::backward_step(p, step); }
  void finish_carry(const FinishCarry& p) const { cpu::finish_carry(p); }
};

void check_backend(const std::string& backend) {
  STD_TORCH_CHECK(backend == "cpu", "backend: got \"", backend,
                  "\", expected \"cpu\" for tensors on the CPU");
}

// The CPU computes 16-bit problems in float32 throughout: rounding the operands would cost time,
// not save it.
Inputs widen(Inputs in) {
  in.operand_type = in.acc_type();
  in.wx = torch::stable::to(in.wx, in.acc_type());
  in.u = torch::stable::to(in.u, in.acc_type());
  return in;
}

std::tuple<Tensor, Tensor> light_gru_cpu(const Tensor& wx, const Tensor& u, OptionalTensor h0,
                                         OptionalTensor drop_mask, OptionalTensor ln_weight,
                                         OptionalTensor ln_bias, bool layer_norm, double eps,
                                         std::string activation, bool bidirectional,
                                         ScalarType operand_dtype, std::string backend) {
  check_backend(backend);
  const Inputs in = widen(check_inputs(wx, u, h0, drop_mask, ln_weight, ln_bias, layer_norm, eps,
                                       activation, bidirectional, operand_dtype));
  auto [h, rho] = forward_sweep(in, CpuSteps{});
  return {torch::stable::to(h, u.scalar_type()), rho};
}

Gradients light_gru_backward_cpu(const Tensor& grad_h, const Tensor& wx, const Tensor& u,
                                 OptionalTensor h0, OptionalTensor drop_mask,
                                 OptionalTensor ln_weight, OptionalTensor ln_bias, bool layer_norm,
                                 double eps, std::string activation, bool bidirectional,
                                 ScalarType operand_dtype, std::string backend, const Tensor& h,
                                 const Tensor& rho, bool need_wx, bool need_u, bool need_h0,
                                 bool need_ln) {
  check_backend(backend);
  const Inputs in = widen(check_inputs(wx, u, h0, drop_mask, ln_weight, ln_bias, layer_norm, eps,
                                       activation, bidirectional, operand_dtype));
  check_saved(in, grad_h, h, rho, u.scalar_type());
  auto [grad_wx, grad_u, grad_h0, grad_ln_weight, grad_ln_bias] = backward_sweep(
      in, torch::stable::to(grad_h, in.acc_type()), torch::stable::to(h, in.acc_type()), rho,
      Needs{need_wx, need_u, need_h0, need_ln}, CpuSteps{});
  return {torch::stable::to(grad_wx, wx.scalar_type()), torch::stable::to(grad_u, u.scalar_type()),
          grad_h0, grad_ln_weight, grad_ln_bias};
}

}  // namespace
}  // namespace sb_fast_sligru

STABLE_TORCH_LIBRARY(sb_fast_sligru, m) {
  m.def(
      "light_gru(Tensor wx, Tensor u, Tensor? h0, Tensor? drop_mask, Tensor? ln_weight, Tensor? "
      "ln_bias, "
      "bool layer_norm, float eps, str activation, bool bidirectional, ScalarType operand_dtype, "
      "str backend) "
      "-> (Tensor h, Tensor rho)");
  m.def(
      "light_gru_backward(Tensor grad_h, Tensor wx, Tensor u, Tensor? h0, Tensor? drop_mask, "
      "Tensor? ln_weight, "
      "Tensor? ln_bias, bool layer_norm, float eps, str activation, bool bidirectional, ScalarType "
      "operand_dtype, "
      "str backend, Tensor h, Tensor rho, bool need_wx, bool need_u, bool need_h0, bool need_ln) "
      "-> (Tensor grad_wx, Tensor grad_u, Tensor grad_h0, Tensor grad_ln_weight, Tensor "
      "grad_ln_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CPU, m) {
  m.impl("light_gru", TORCH_BOX(&sb_fast_sligru::light_gru_cpu));
  m.impl("light_gru_backward", TORCH_BOX(&sb_fast_sligru::light_gru_backward_cpu));
}
