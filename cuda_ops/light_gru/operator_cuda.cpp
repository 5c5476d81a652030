// Library _C_cuda, operator light_gru: the CUDA implementation of the ops that operator.cpp declares,
// on the caller's device and stream.
#include "common/cuda_device.h"
#include "light_gru/operand.h"
#include "light_gru/operator.h"
#include "light_gru/persistent/sweep.h"
#include "light_gru/places.h"
#include "light_gru/sweep.h"

namespace sb_fast_sligru {
namespace {

class CudaSteps {
 public:
  static constexpr int64_t kChunkBytes = int64_t{64} << 20;

  CudaSteps(const Inputs& in, cudaStream_t stream)
      : stream_(stream), rows_(in.rows()), places_(in, stream) {}

  Tensor new_frames(const Inputs& in, int64_t n, ScalarType type) const {
    return places_.new_frames(in, n, type);
  }
  // Rows as they are.
  Recurrence layer(const Inputs&) const {
    Recurrence layer = places_.layer();
    layer.order = nullptr;
    return layer;
  }
  // The lengths are on the GPU: any row may go on, in any step the directions may meet.
  int64_t active_rows(int64_t) const { return rows_; }
  bool directions_meet(const Inputs& in, int64_t step) const {
    return in.lengths.has_value() || 2 * step + 1 == in.time();
  }

  Tensor recurrent_operand(const Inputs& in) const {
    return sb_fast_sligru::recurrent_operand(in, stream_);
  }
  bool writes_transposed(const Inputs&, int64_t) const { return false; }
  void product(const Tensor& operand, const Tensor& uc_t, const Tensor& r) const {
    multiply(operand, uc_t, r);
  }
  void forward_step(const ForwardStep& p, int64_t step) const {
    stepwise::forward_step(p, step, stream_);
  }
  void gather_previous(const GatherPrevious& p) const { stepwise::gather_previous(p, stream_); }
  void backward_step(const BackwardStep& p, int64_t step) const {
    stepwise::backward_step(p, step, stream_);
  }
  void finish_carry(const FinishCarry& p) const { stepwise::finish_carry(p, stream_); }

 private:
  cudaStream_t stream_;
  int64_t rows_;
  Places places_;
};

// The kernel for a pass; throws where `backend` is none of CUDA's or cannot take the layer.
KernelChoice choose_kernel(const std::string& backend, const Inputs& in, Direction direction) {
  STD_TORCH_CHECK(backend == "stepwise" || backend == "persistent", "backend: got \"", backend,
                  "\", expected \"stepwise\" or \"persistent\" for tensors on a CUDA device");
  if (backend == "stepwise") return {Kernel::kStepwise};
  const KernelChoice choice = choose(in.hidden(), std::max<int64_t>(in.rows(), 1),
                                     dtype_of(in.operand_type), direction, checked_gpu());
  STD_TORCH_CHECK(choice.kernel != Kernel::kStepwise,
                  "backend: \"persistent\" cannot take this layer: ", choice.reason);
  return choice;
}

struct Cuda {
  static Outputs forward(const std::string& backend, const Inputs& in) {
    const OnDeviceOf device(in.wx);
    const KernelChoice choice = choose_kernel(backend, in, Direction::kForward);
    if (choice.kernel == Kernel::kStepwise)
      return forward_sweep(in, CudaSteps(in, device.stream()));
    return persistent_forward(aligned(in), choice, device.stream());
  }

  static Gradients backward(const std::string& backend, const Inputs& in, const Saved& saved,
                            Needs needs) {
    const OnDeviceOf device(in.wx);
    const KernelChoice choice = choose_kernel(backend, in, Direction::kBackward);
    if (choice.kernel == Kernel::kStepwise)
      return backward_sweep(in, saved, needs, CudaSteps(in, device.stream()));
    return persistent_backward(aligned(in), saved, needs, choice, device.stream());
  }
};

}  // namespace
}  // namespace sb_fast_sligru

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CUDA, m) {
  using sb_fast_sligru::Cuda;
  using sb_fast_sligru::Operator;
  m.impl("light_gru", TORCH_BOX(&Operator<Cuda>::forward));
  m.impl("light_gru_backward", TORCH_BOX(&Operator<Cuda>::backward));
}
