// Library _C_cuda: the CUDA implementation of the ops that library.cpp declares, on the caller's
// device and stream.
#include "sweep.h"

namespace sb_fast_sligru {
namespace {

struct CudaSteps {
  static constexpr bool kTransposedProduct = false;
  static constexpr int64_t kChunkBytes = int64_t{64} << 20;

  void* stream;

  void forward_step(const ForwardStep& p, int64_t step) const {
    stepwise::forward_step(p, step, stream);
  }
  void gather_previous(const GatherPrevious& p) const { stepwise::gather_previous(p, stream); }
  void backward_step(const BackwardStep& p, int64_t step) const {
    stepwise::backward_step(p, step, stream);
  }
  void finish_carry(const FinishCarry& p) const { stepwise::finish_carry(p, stream); }
};

// The device of a tensor made current, and the stream that the caller set on it.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

void check_backend(const std::string& backend) {
  STD_TORCH_CHECK(backend == "stepwise", "backend: got \"", backend,
                  "\", expected \"stepwise\" for tensors on a CUDA device");
}

std::tuple<Tensor, Tensor> light_gru_cuda(const Tensor& wx, const Tensor& u, OptionalTensor h0,
                                          OptionalTensor drop_mask, OptionalTensor ln_weight,
                                          OptionalTensor ln_bias, bool layer_norm, double eps,
                                          std::string activation, bool bidirectional,
                                          ScalarType operand_dtype, std::string backend) {
  check_backend(backend);
  const OnDeviceOf device(wx);
  const Inputs in = check_inputs(wx, u, h0, drop_mask, ln_weight, ln_bias, layer_norm, eps,
                                 activation, bidirectional, operand_dtype);
  return forward_sweep(in, CudaSteps{device.stream()});
}

Gradients light_gru_backward_cuda(const Tensor& grad_h, const Tensor& wx, const Tensor& u,
                                  OptionalTensor h0, OptionalTensor drop_mask,
                                  OptionalTensor ln_weight, OptionalTensor ln_bias, bool layer_norm,
                                  double eps, std::string activation, bool bidirectional,
                                  ScalarType operand_dtype, std::string backend, const Tensor& h,
                                  const Tensor& rho, bool need_wx, bool need_u, bool need_h0,
                                  bool need_ln) {
  check_backend(backend);
  const OnDeviceOf device(wx);
  const Inputs in = check_inputs(wx, u, h0, drop_mask, ln_weight, ln_bias, layer_norm, eps,
                                 activation, bidirectional, operand_dtype);
  check_saved(in, grad_h, h, rho, u.scalar_type());
  return backward_sweep(in, grad_h, h, rho, Needs{need_wx, need_u, need_h0, need_ln},
                        CudaSteps{device.stream()});
}

}  // namespace
}  // namespace sb_fast_sligru

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CUDA, m) {
  m.impl("light_gru", TORCH_BOX(&sb_fast_sligru::light_gru_cuda));
  m.impl("light_gru_backward", TORCH_BOX(&sb_fast_sligru::light_gru_backward_cuda));
}
