// Host side of a launch whose blocks all run at once, so that they may wait for each other.
#pragma once

#include <cuda_runtime.h>

#include "common/gpu.h"

namespace sb_fast_sligru {

// As many blocks as the current device runs at once, at most.
template <class Params>
cudaError_t launch_cooperatively(void (*kernel)(Params), int blocks, int threads, int dynamic_bytes,
                                 const Params& params, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(dynamic_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// One block of `kernel` on each multiprocessor of the current device.
template <class Params>
cudaError_t launch_on_all(void (*kernel)(Params), int threads, int dynamic_bytes,
                          const Params& params, cudaStream_t stream) {
  return launch_cooperatively(kernel, current_gpu().multiprocessors, threads, dynamic_bytes, params,
                              stream);
}

}  // namespace sb_fast_sligru
