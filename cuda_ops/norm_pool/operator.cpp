// Library _C, operator norm_pool: its schemas, its CPU implementation, and the memory that
// the CUDA kernels would use. Built against torch's stable ABI, as light_gru/operator.cpp is.
//
//   norm_pool           -> out [B, T', F', C] of out_dtype, more with a halo or where out_frames
//                          says so; statistics for the backward
//   norm_pool_backward  -> gradients; empty where need_* is false
//   norm_pool_shared_bytes  -> shared memory of a block of the CUDA kernels, 0 if they cannot take
//                              such frames
//
// norm_pool.h has the mathematics and the axes.
#include "norm_pool/operator.h"

namespace sb_fast_sligru::norm_pool {
namespace {

// The CPU computes 16-bit problems in float32 throughout.
Inputs widen(Inputs in) {
  in.out_type = in.acc_type();
  in.x = torch::stable::to(in.x, in.acc_type());
  return in;
}

struct Cpu {
  static Outputs forward(const Inputs& in) {
    const auto [out, statistics] =
        run_forward(widen(in), [](const Forward& p, void*) { cpu::forward(p); }, nullptr);
    return {torch::stable::to(out, in.out_type), statistics};
  }

  static Gradients backward(const Inputs& in, const Saved& saved, Needs needs) {
    const Saved wide{torch::stable::to(saved.grad_out, in.acc_type()), saved.statistics};
    const auto [grad_x, grad_bias, grad_ln_weight, grad_ln_bias] = run_backward(
        widen(in), wide, needs, cpu::backward_parts,
        [](const Backward& p, void*) { cpu::backward(p); }, nullptr);
    return {torch::stable::to(grad_x, in.x.scalar_type()), grad_bias, grad_ln_weight, grad_ln_bias};
  }
};

int64_t norm_pool_shared_bytes(ScalarType dtype, int64_t frequencies, int64_t channels,
                               int64_t pool_frequency) {
  return cuda::layout(dtype_of(dtype), frequencies, channels, pool_frequency).shared_bytes();
}

}  // namespace
}  // namespace sb_fast_sligru::norm_pool

STABLE_TORCH_LIBRARY_FRAGMENT(sb_fast_sligru, m) {
  m.def(
      "norm_pool(Tensor x, Tensor bias, Tensor ln_weight, Tensor ln_bias, Tensor? drop_mask, "
      "float eps, float negative_slope, int pool_time, int pool_frequency, bool halo, "
      "str out_dtype, SymInt frames, SymInt out_frames) -> (Tensor out, Tensor statistics)");
  m.def(
      "norm_pool_backward(Tensor grad_out, Tensor x, Tensor bias, Tensor ln_weight, "
      "Tensor ln_bias, Tensor? drop_mask, float eps, float negative_slope, int pool_time, "
      "int pool_frequency, bool halo, str out_dtype, SymInt frames, SymInt out_frames, "
      "Tensor statistics, bool need_x, bool need_parameters) -> (Tensor grad_x, "
      "Tensor grad_bias, Tensor grad_ln_weight, Tensor grad_ln_bias)");
  m.def(
      "norm_pool_shared_bytes(ScalarType dtype, int frequencies, int channels, int pool_frequency) "
      "-> int");
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CPU, m) {
  using sb_fast_sligru::norm_pool::Operator;
  using Cpu = sb_fast_sligru::norm_pool::Cpu;
  m.impl("norm_pool", TORCH_BOX(&Operator<Cpu>::forward));
  m.impl("norm_pool_backward", TORCH_BOX(&Operator<Cpu>::backward));
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CompositeExplicitAutograd, m) {
  m.impl("norm_pool_shared_bytes", TORCH_BOX(&sb_fast_sligru::norm_pool::norm_pool_shared_bytes));
}
