// The caller's device and stream, and what kernels may count on there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <initializer_list>

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

// An error if an environment variable that limits current_gpu() is not what is expected.
inline void check_gpu_limits() {
  const GpuLimits& limits = gpu_limits();
  for (const GpuLimit& limit : {limits.cluster, limits.multiprocessors, limits.shared_kb})
    STD_TORCH_CHECK(limit.value > 0, limit.variable, ": got \"", std::getenv(limit.variable),
                    "\", expected a number from 1 to ", limit.largest);
}

inline const Gpu& checked_gpu() {
  check_gpu_limits();
  return current_gpu();
}

}  // namespace sb_fast_sligru
