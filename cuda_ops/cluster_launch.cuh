// Host side of a launch in thread-block clusters.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "persistent.cuh"

namespace sb_fast_sligru {

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// More than half of the shared memory of a multiprocessor. A launch whose clusters can all have
// their multiprocessors to themselves asks for it, since otherwise two blocks may be put on one
// although others are idle, and each then takes 1.17 times as long (H200, November 2026).
constexpr int kAloneBytes = 120 * 1024;

// A configuration points into itself: it is neither copied nor moved.
template <int kCluster>
struct ClusterConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  ClusterConfig(int64_t clusters, int dynamic_bytes, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kCluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = dynamic_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterConfig(const ClusterConfig&) = delete;
  ClusterConfig& operator=(const ClusterConfig&) = delete;
};

template <class Params>
cudaError_t allow_clusters(void (*kernel)(Params)) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kAloneBytes);
  return error;
}

// Clusters of a kernel that run at once: alone on their multiprocessors, and sharing them.
template <int kCluster>
struct ClusterOccupancy {
  int alone = 0;
  int shared = 0;

  template <class Params>
  static ClusterOccupancy of(void (*kernel)(Params)) {
    ClusterOccupancy result;
    const ClusterConfig<kCluster> alone(1, kAloneBytes, nullptr), shared(1, 0, nullptr);
    if (allow_clusters(kernel) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&result.alone, kernel, &alone.config) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&result.shared, kernel, &shared.config) != cudaSuccess) {
      cudaGetLastError();  // a device without such clusters: the answer is 0, not an error
      return {};
    }
    return result;
  }
};

// How many clusters may have their multiprocessors to themselves: the same for all kernels of a
// cluster size, since one block fits a multiprocessor. Remembered per device.
template <int kCluster, class Params>
int clusters_alone(void (*kernel)(Params)) {
  constexpr int kDevices = 64;
  static std::array<std::atomic<int>, kDevices> remembered;  // count + 1; 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  if (remembered[device] == 0)
    remembered[device] = ClusterOccupancy<kCluster>::of(kernel).alone + 1;
  return remembered[device] - 1;
}

template <int kCluster, class Params>
cudaError_t launch_clusters(void (*kernel)(Params), int64_t clusters, const Params& params,
                            cudaStream_t stream) {
  const int dynamic_bytes = clusters <= clusters_alone<kCluster>(kernel) ? kAloneBytes : 0;
  if (const cudaError_t error = allow_clusters(kernel); error != cudaSuccess) return error;
  const ClusterConfig<kCluster> launch(clusters, dynamic_bytes, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, params);
}

}  // namespace sb_fast_sligru
