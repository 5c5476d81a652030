// Host side of a launch in thread-block clusters.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "common/gpu.h"
#include "common/types.h"

namespace sb_fast_sligru {

// The configuration of a launch. Points into itself: neither copied nor moved.
struct ClusterLaunch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  ClusterLaunch(int64_t clusters, int size, int threads, int dynamic_bytes, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(clusters * size));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = dynamic_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;
};

// With half of what the current device offers to a block, on top of its static shared memory and what
// the system takes, a block fills more than half of a multiprocessor. The device is asked, since
// current_gpu() may tell of less.
inline int exclusive_bytes() {
  int device = 0, shared_bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return shared_bytes / 2;
}

template <class... Parameters>
cudaError_t allow_clusters(void (*kernel)(Parameters...), int dynamic_bytes) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_bytes);
}

// Clusters of `size` blocks that run at once on the current device, each block with `dynamic_bytes`
// of shared memory; 0 if it has no clusters of this size.
template <class... Parameters>
int clusters_at_once(void (*kernel)(Parameters...), int size, int dynamic_bytes) {
  constexpr int kThreads = 128;
  int clusters = 0;
  ClusterLaunch launch(1, size, kThreads, dynamic_bytes, nullptr);
  if (allow_clusters(kernel, dynamic_bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess) {
    cudaGetLastError();  // the answer is 0, not an error
    return 0;
  }
  return clusters;
}

// A kernel that runs in clusters of `size` blocks.
template <class Params>
struct ClusterKernel {
  void (*kernel)(Params);
  int size;
  int threads;
  int dynamic_bytes = 0;  // shared memory beyond what the kernel declares

  // A launch whose clusters can all have their multiprocessors to themselves asks for so much
  // memory that they do, since otherwise two blocks may be put on one although others are idle,
  // and each then takes 1.17 times as long (H200, November 2026).
  cudaError_t run(int64_t clusters, const Params& params, cudaStream_t stream) const {
    const int exclusive = std::max(dynamic_bytes, exclusive_bytes());
    if (const cudaError_t error = allow_clusters(kernel, exclusive); error != cudaSuccess)
      return error;
    ClusterLaunch launch(clusters, size, threads,
                         clusters <= current_gpu().clusters(size) ? exclusive : dynamic_bytes,
                         stream);
    return cudaLaunchKernelEx(&launch.config, kernel, params);
  }
};

}  // namespace sb_fast_sligru
