// Host side of a launch in thread-block clusters.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "persistent.h"

namespace sb_fast_sligru {

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// An answer above 0 that depends on the device: asked once for each.
class DeviceAnswers {
 public:
  template <class Ask>
  int get(const Ask& ask) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return ask();
    if (answers_[device] == 0) answers_[device] = ask();
    return answers_[device];
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int> answers_[kDevices] = {};  // 0: not asked yet
};

// A kernel that runs in clusters of `cluster` blocks.
template <class Params>
struct ClusterKernel {
  void (*kernel)(Params);
  int cluster;
  int threads;
  int dynamic_bytes = 0;  // shared memory beyond what the kernel declares

  // Clusters that run at once on the current device with `bytes` of dynamic shared memory; 0 if it
  // has no clusters of this size, or not as much memory.
  int resident(int bytes) const {
    int clusters = 0;
    Launch launch(*this, 1, bytes, nullptr);
    if (cluster > largest_cluster() || prepare() != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess) {
      cudaGetLastError();  // the answer is 0, not an error
      return 0;
    }
    return clusters;
  }
  int resident() const { return resident(dynamic_bytes); }

  // How many clusters may have their multiprocessors to themselves. The same for all kernels of a
  // cluster size, since one block fits a multiprocessor; remembered per device.
  int alone() const {
    static DeviceAnswers answers[kLargestCluster + 1];
    return answers[cluster].get([&] { return resident(largest_bytes()) + 1; }) - 1;
  }

  cudaError_t run(int64_t clusters, const Params& params, cudaStream_t stream) const {
    if (const cudaError_t error = prepare(); error != cudaSuccess) return error;
    Launch launch(*this, clusters, clusters <= alone() ? largest_bytes() : dynamic_bytes, stream);
    return cudaLaunchKernelEx(&launch.config, kernel, params);
  }

 private:
  struct Launch {  // points into itself: neither copied nor moved
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};

    Launch(const ClusterKernel& of, int64_t clusters, int bytes, cudaStream_t stream) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = of.cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      config.gridDim = dim3(static_cast<unsigned>(clusters * of.cluster));
      config.blockDim = dim3(of.threads);
      config.dynamicSmemBytes = bytes;
      config.stream = stream;
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
    Launch(const Launch&) = delete;
    Launch& operator=(const Launch&) = delete;
  };

  // With half of what the device offers to a block, on top of its static shared memory and what
  // the system takes, a block fills more than half of a multiprocessor. A launch whose clusters can
  // all have their multiprocessors to themselves asks for it, since otherwise two blocks may be put
  // on one although others are idle, and each then takes 1.17 times as long (H200, November 2026).
  int largest_bytes() const {
    static DeviceAnswers answers;
    return std::max(dynamic_bytes, answers.get([] {
      int device = 0, bytes = 0;
      cudaGetDevice(&device);
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      return bytes / 2;
    }));
  }

  cudaError_t prepare() const {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                largest_bytes());
  }
};

}  // namespace sb_fast_sligru
