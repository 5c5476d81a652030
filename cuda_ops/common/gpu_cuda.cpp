// Library _C_cuda: a query of its own,
//
//   gpu  -> the properties of a device that gpu.h's Gpu has, in that order
#include "common/cuda_device.h"

namespace sb_fast_sligru {
namespace {

std::tuple<int64_t, bool, bool, bool, int64_t, int64_t, int64_t, int64_t, int64_t> query_gpu(
    int64_t device_index) {
  check_gpu_limits();  // whether or not there is such a device
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device_index));
  const Gpu& gpu = current_gpu();
  return {gpu.capability,         gpu.has_tensor_code, gpu.has_cluster_code,
          gpu.has_warpgroup_code, gpu.shared_bytes,    gpu.multiprocessors,
          gpu.clusters_of_4,      gpu.clusters_of_8,   gpu.clusters_of_16};
}

}  // namespace
}  // namespace sb_fast_sligru

STABLE_TORCH_LIBRARY_FRAGMENT(sb_fast_sligru, m) {
  m.def(
      "gpu(int device_index) -> (int capability, bool has_tensor_code, bool has_cluster_code, bool "
      "has_warpgroup_code, "
      "int shared_bytes, int multiprocessors, int clusters_of_4, int clusters_of_8, int "
      "clusters_of_16)");
}

STABLE_TORCH_LIBRARY_IMPL(sb_fast_sligru, CompositeExplicitAutograd, m) {
  m.impl("gpu", TORCH_BOX(&sb_fast_sligru::query_gpu));
}
