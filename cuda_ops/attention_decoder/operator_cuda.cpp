// Library _C_cuda, operator attention_decoder: the CUDA implementation of the ops that operator.cpp
// declares, on the caller's device and stream.
#include "attention_decoder/choice.h"
#include "attention_decoder/operator.h"
#include "attention_decoder/persistent/sweep.h"

namespace sb_fast_sligru::attention_decoder {
namespace {

struct Cuda {
  static void check(const std::string& backend, const Inputs& in) {
    STD_TORCH_CHECK(backend == "persistent", "backend: got \"", backend,
                    "\", expected \"persistent\" for tensors on a CUDA device");
    const std::string obstacle = persistent_obstacle(
        checked_gpu().has_tensor_code, dtype_of(in.operand_type), in.channels(), in.taps());
    STD_TORCH_CHECK(obstacle.empty(),
                    "backend: \"persistent\" cannot take this decoder: ", obstacle);
  }

  static Outputs forward(const std::string& backend, const Inputs& in) {
    const OnDeviceOf device(in.wx);
    check(backend, in);
    return in.empty() ? empty_outputs(in) : persistent_forward(in, device.stream());
  }

  static Gradients backward(const std::string& backend, const Inputs& in, const Saved& saved,
                            Needs needs) {
    const OnDeviceOf device(in.wx);
    check(backend, in);
    return in.empty() ? zero_gradients(in, needs)
                      : persistent_backward(in, saved, needs, device.stream());
  }
};

}  // namespace
}  // namespace sb_fast_sligru::attention_decoder

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CUDA, m) {
  using sb_fast_sligru::attention_decoder::Cuda;
  using sb_fast_sligru::attention_decoder::Operator;
  m.impl("attention_decoder", TORCH_BOX(&Operator<Cuda>::forward));
  m.impl("attention_decoder_backward", TORCH_BOX(&Operator<Cuda>::backward));
}
