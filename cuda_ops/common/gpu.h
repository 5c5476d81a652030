// What of a GPU decides which kernels run on it. No CUDA headers, so that a GPU can be pretended.
#pragma once

namespace sb_fast_sligru {

constexpr int kLargestCluster = 16;

struct Gpu {
  int capability;           // compute capability, 90 for 9.0
  bool has_tensor_code;     // the library holds code with bfloat16 and TF32 products for it
  bool has_cluster_code;    // with thread-block clusters
  bool has_warpgroup_code;  // and with warpgroup products, which 9.0a alone has
  int shared_bytes;         // shared memory that a block may ask for
  int multiprocessors;
  // Clusters of so many blocks that run at once, each block with a multiprocessor to itself; 0 if
  // the GPU has none of that size.
  int clusters_of_4, clusters_of_8, clusters_of_16;

  int clusters(int size) const {
    return size == 4 ? clusters_of_4 : size == 8 ? clusters_of_8 : clusters_of_16;
  }
};

// The most that current_gpu() tells of a property, by an environment variable: for trying on one GPU
// what another would run. Read once.
struct GpuLimit {
  const char* variable;
  int largest;  // that the variable may be
  int value;    // `largest` if it is not set; 0 if it is not a number from 1 to that
};

struct GpuLimits {
  GpuLimit cluster;          // blocks of the largest cluster, at most kLargestCluster
  GpuLimit multiprocessors;  // also limits the clusters that run at once
  GpuLimit shared_kb;        // KiB of shared memory that a block may ask for
};

const GpuLimits& gpu_limits();

// The current device. The driver is asked once for each.
const Gpu& current_gpu();

}  // namespace sb_fast_sligru
