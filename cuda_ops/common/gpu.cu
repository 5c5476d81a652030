// Asks the driver about the current device. No kernel of this file is ever launched.
#include <cuda_runtime.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "common/cluster_launch.cuh"
#include "common/exchange.cuh"
#include "common/gpu.h"
#include "common/skinny_product.cuh"
#include "common/warpgroup.cuh"

namespace sb_fast_sligru {
namespace {

// Kernels that need more than their target has are compiled to an empty body. These have shared
// memory where such kernels have a body, which the driver tells of the code that it would run: code
// for this GPU, or PTX for an older one.
__global__ void tensor_probe(int* data) {
#if SB_FAST_SLIGRU_HAS_TENSOR_PRODUCTS
  volatile __shared__ int shared;
  shared = *data;
  *data = shared;
#endif
}

__global__ void cluster_probe(int* data) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  volatile __shared__ int shared;
  shared = *data;
  *data = shared;
#endif
}

__global__ void warpgroup_probe(int* data) {
#if SB_FAST_SLIGRU_HAS_WARPGROUPS
  volatile __shared__ int shared;
  shared = *data;
  *data = shared;
#endif
}

bool has_body(void (*probe)(int*)) {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, probe) == cudaSuccess;
  if (!found) cudaGetLastError();  // the answer is no, not an error
  return found && attributes.sharedSizeBytes > 0;
}

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

Gpu ask(int device) {
  Gpu gpu = {};
  gpu.capability = 10 * attribute_of(device, cudaDevAttrComputeCapabilityMajor) +
                   attribute_of(device, cudaDevAttrComputeCapabilityMinor);
  gpu.shared_bytes = std::min(attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin),
                              1024 * gpu_limits().shared_kb.value);
  gpu.multiprocessors = std::min(attribute_of(device, cudaDevAttrMultiProcessorCount),
                                 gpu_limits().multiprocessors.value);
  gpu.has_tensor_code = gpu.capability >= 80 && has_body(tensor_probe);
  gpu.has_cluster_code = gpu.capability >= 90 && has_body(cluster_probe);
  gpu.has_warpgroup_code = gpu.has_cluster_code && has_body(warpgroup_probe);
  if (!gpu.has_cluster_code) return gpu;
  const auto clusters = [&](int size) {
    if (size > gpu_limits().cluster.value) return 0;
    return std::min(clusters_at_once(cluster_probe, size, exclusive_bytes()),
                    gpu.multiprocessors / size);
  };
  gpu.clusters_of_4 = clusters(4);
  gpu.clusters_of_8 = clusters(8);
  gpu.clusters_of_16 = clusters(16);
  return gpu;
}

GpuLimit read_limit(const char* variable, int largest) {
  const char* text = std::getenv(variable);
  if (text == nullptr) return {variable, largest, largest};
  const char* end = text + std::strlen(text);
  int value = 0;
  const auto [rest, error] = std::from_chars(text, end, value);
  const bool valid = error == std::errc() && rest == end && value > 0 && value <= largest;
  return {variable, largest, valid ? value : 0};
}

}  // namespace

const GpuLimits& gpu_limits() {
  // 1024 multiprocessors and 1024 KiB of each: more than any GPU has.
  static const GpuLimits limits = {read_limit("SB_FAST_SLIGRU_MAX_CLUSTER", kLargestCluster),
                                   read_limit("SB_FAST_SLIGRU_MAX_MULTIPROCESSORS", 1024),
                                   read_limit("SB_FAST_SLIGRU_MAX_SHARED_KB", 1024)};
  return limits;
}

const Gpu& current_gpu() {
  static std::mutex mutex;
  static std::map<int, Gpu> answers;
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = answers.try_emplace(device);
  if (is_new) entry->second = ask(device);
  return entry->second;
}

}  // namespace sb_fast_sligru
