// From the choice of a kernel to its launcher, and the memory that it needs.
#include "light_gru/persistent/l2.cuh"
#include "light_gru/persistent/launch.h"

namespace sb_fast_sligru {

int64_t exchange_bytes(const KernelChoice& choice, const Recurrence& layer, Direction direction) {
  if (choice.kernel != Kernel::kL2) return 0;
  const L2Memory memory = l2_memory(direction, layer.operand_type == DType::kFloat32, choice);
  return l2_groups(choice, layer.rows()) * memory.bytes();
}

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
    case Kernel::kL2:
      return run_forward_l2(p, stream);
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
    case Kernel::kL2:
      return run_backward_l2(p, stream);
  }
  __builtin_unreachable();
}

}  // namespace sb_fast_sligru
