// Library _C_cuda, operator norm_pool: the CUDA implementation of the ops that operator.cpp declares,
// on the caller's device and stream.
#include "common/cuda_device.h"
#include "norm_pool/operator.h"

namespace sb_fast_sligru::norm_pool {
namespace {

// The kernels read and write 16 bytes at a time.
Tensor aligned(const Tensor& t) {
  const bool fits = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  return fits ? t : torch::stable::clone(t);
}

Inputs aligned(Inputs in) {
  for (Tensor* t : {&in.x, &in.bias, &in.ln_weight, &in.ln_bias}) *t = aligned(*t);
  return in;
}

void check_kernels(const Inputs& in) {
  const NormPool layer = in.layer();
  const auto layout =
      cuda::layout(layer.x_type, layer.frequencies, layer.channels, layer.pool_frequency);
  STD_TORCH_CHECK(layout.threads() > 0, "x: got ", describe(in.x),
                  " with pool_frequency = ", layer.pool_frequency,
                  ", which the CUDA kernels cannot take");
  STD_TORCH_CHECK(layer.groups() < int64_t{1} << 31, "x: got ", describe(in.x),
                  ", too many frames for one launch");
}

struct Cuda {
  static Outputs forward(const Inputs& in) {
    const OnDeviceOf device(in.x);
    check_kernels(in);
    return run_forward(aligned(in), cuda::forward, device.stream());
  }

  static Gradients backward(const Inputs& in, const Saved& saved, Needs needs) {
    const OnDeviceOf device(in.x);
    check_kernels(in);
    return run_backward(aligned(in), {aligned(saved.grad_out), aligned(saved.statistics)}, needs,
                        cuda::backward_parts, cuda::backward, device.stream());
  }
};

}  // namespace
}  // namespace sb_fast_sligru::norm_pool

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CUDA, m) {
  using sb_fast_sligru::norm_pool::Operator;
  using Cuda = sb_fast_sligru::norm_pool::Cuda;
  m.impl("norm_pool", TORCH_BOX(&Operator<Cuda>::forward));
  m.impl("norm_pool_backward", TORCH_BOX(&Operator<Cuda>::backward));
}
