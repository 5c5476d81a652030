// Library _C_cuda, operator ctc_loss: the CUDA implementation of the ops that operator.cpp declares,
// on the caller's device and stream.
#include "common/cuda_device.h"
#include "ctc_loss/operator.h"

namespace sb_fast_sligru::ctc_loss {
namespace {

struct Cuda {
  // The host would have to wait for the GPU: kernels answer what is out of range with NaN.
  static void check(const Problem&) {}

  static void forward(const Inputs& in, Forward p) {
    const OnDeviceOf device(in.log_probs);
    check_type(in.log_probs);
    const Tensor rows = make_rows(in);
    p.rows = pointer_to<float>(rows);
    cuda::forward(p, device.stream());
  }

  static void backward(const Inputs& in, Backward p) {
    const OnDeviceOf device(in.log_probs);
    check_type(in.log_probs);
    const int64_t B = p.problem.batch;
    STD_TORCH_CHECK(B * p.problem.frames < int64_t{1} << 31, "log_probs: got ",
                    describe(in.log_probs), ", too many frames for one launch");
    static_assert(sizeof(Link) == sizeof(int64_t));
    const Tensor rows = make_rows(in),
                 posteriors = new_empty(in.log_probs, in.alpha_sizes(), ScalarType::Float),
                 links = new_empty(in.log_probs, {B, p.problem.tokens}, ScalarType::Long),
                 scales = new_empty(in.log_probs, {B}, ScalarType::Float),
                 gradients = new_empty(in.log_probs, {B}, ScalarType::Long);
    p.rows = pointer_to<float>(rows);
    p.posteriors = pointer_to<float>(posteriors);
    p.links = pointer_to<Link>(links);
    p.scales = pointer_to<float>(scales);
    p.gradients = pointer_to<int64_t>(gradients);
    cuda::backward(p, device.stream());
  }

  static void check_type(const Tensor& log_probs) {
    STD_TORCH_CHECK(log_probs.scalar_type() == ScalarType::Float, "log_probs: got ",
                    describe(log_probs), ", which the CUDA kernels cannot take");
  }

  // Two rows of an utterance where shared memory does not hold them; else nothing.
  static Tensor make_rows(const Inputs& in) {
    const int64_t B = in.log_probs.size(0), positions = 2 * in.targets.size(1) + 1;
    return new_empty(in.log_probs, {cuda::rows_fit(positions) ? 0 : B, 2, positions},
                     ScalarType::Float);
  }

  template <class T>
  static T* pointer_to(const Tensor& t) {
    return t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
  }
};

}  // namespace
}  // namespace sb_fast_sligru::ctc_loss

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CUDA, m) {
  using sb_fast_sligru::ctc_loss::Operator;
  using Cuda = sb_fast_sligru::ctc_loss::Cuda;
  m.impl("ctc_loss", TORCH_BOX(&Operator<Cuda>::forward));
  m.impl("ctc_loss_backward", TORCH_BOX(&Operator<Cuda>::backward));
}
