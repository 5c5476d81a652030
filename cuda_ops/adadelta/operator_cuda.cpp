// Library _C_cuda, operator adadelta_: the CUDA implementation of what operator.cpp declares, on the
// caller's device and stream.
#include "adadelta/operator.h"
#include "common/cuda_device.h"

namespace sb_fast_sligru::adadelta {
namespace {

struct Cuda {
  static void update(const Tensor& first, const Rule& rule,
                     const std::vector<Parameters>& tensors) {
    const OnDeviceOf device(first);
    cuda::update(rule, tensors, device.stream());
  }
};

}  // namespace
}  // namespace sb_fast_sligru::adadelta

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CUDA, m) {
  using sb_fast_sligru::adadelta::Operator;
  using Cuda = sb_fast_sligru::adadelta::Cuda;
  m.impl("adadelta_", TORCH_BOX(&Operator<Cuda>::update));
}
