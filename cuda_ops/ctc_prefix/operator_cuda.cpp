// Library _C_cuda, operator ctc_prefix: the CUDA implementation of the ops that operator.cpp
// declares, on the caller's device and stream.
#include "common/cuda_device.h"
#include "ctc_prefix/operator.h"

namespace sb_fast_sligru::ctc_prefix {
namespace {

struct Cuda {
  // The host would have to wait for the GPU: kernels take what is out of range for log 0.
  static void check(const char*, const Tensor&, int64_t) {}

  static void scores(const Tensor& log_probs, const Scores& p) {
    const OnDeviceOf device(log_probs);
    check_type(log_probs);
    STD_TORCH_CHECK(cuda::score_blocks(p) < int64_t{1} << 31,
                    "psi: too many hypotheses and tokens for one launch");
    cuda::scores(p, device.stream());
  }

  static void extend(const Tensor& log_probs, const Extension& p) {
    const OnDeviceOf device(log_probs);
    check_type(log_probs);
    cuda::extend(p, device.stream());
  }

  static void check_type(const Tensor& log_probs) {
    STD_TORCH_CHECK(log_probs.scalar_type() == ScalarType::Float, "log_probs: got ",
                    describe(log_probs), ", which the CUDA kernels cannot take");
  }
};

}  // namespace
}  // namespace sb_fast_sligru::ctc_prefix

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CUDA, m) {
  using sb_fast_sligru::ctc_prefix::Operator;
  using Cuda = sb_fast_sligru::ctc_prefix::Cuda;
  m.impl("ctc_prefix_scores", TORCH_BOX(&Operator<Cuda>::scores));
  m.impl("ctc_prefix_extend", TORCH_BOX(&Operator<Cuda>::extend));
}
