// From the choice of a kernel to its launcher.
#include "light_gru/persistent/launch.h"

namespace sb_fast_sligru {

cudaError_t run_forward(const PersistentForward& p, cudaStream_t stream) {
  switch (p.choice.kernel) {
    case Kernel::kStepwise:
      return cudaErrorInvalidValue;
    case Kernel::kNarrow:
      return run_forward_narrow(p, stream);
    case Kernel::kNarrowFloat:
      return run_forward_narrow_float(p, stream);
    case Kernel::kWide:
      return run_forward_wide(p, stream);
    case Kernel::kWideFloat:
      return run_forward_wide_float(p, stream);
    case Kernel::kMany:
      return run_forward_many(p, stream);
  }
  __builtin_unreachable();
}

cudaError_t run_backward(const PersistentBackward& p, cudaStream_t stream) {
  switch (p.choice.kernel) {
    case Kernel::kStepwise:
      return cudaErrorInvalidValue;
    case Kernel::kNarrow:
      return run_backward_narrow(p, stream);
    case Kernel::kNarrowFloat:
      return run_backward_narrow_float(p, stream);
    case Kernel::kWide:
      return run_backward_wide(p, stream);
    case Kernel::kWideFloat:
      return run_backward_wide_float(p, stream);
    case Kernel::kMany:
      return run_backward_many(p, stream);
  }
  __builtin_unreachable();
}

}  // namespace sb_fast_sligru
