// The caller's device and stream, and what kernels may count on there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>

#include "common/gpu.h"
#include "common/tensors.h"

namespace sb_fast_sligru {

// The device of a tensor made current, and the stream that the caller set on it.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess,
                  "sb_fast_sligru: a kernel did not launch: ", cudaGetErrorString(error));
}

// current_gpu(), or an error if the environment variable that limits it is no number.
inline const Gpu& checked_gpu() {
  STD_TORCH_CHECK(largest_cluster() > 0, "SB_FAST_SLIGRU_MAX_CLUSTER: got \"",
                  std::getenv("SB_FAST_SLIGRU_MAX_CLUSTER"), "\", expected a number from 1 to ",
                  kLargestCluster);
  return current_gpu();
}

}  // namespace sb_fast_sligru
