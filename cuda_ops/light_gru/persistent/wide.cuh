// Geometry of the kernels for 512 < H <= 1024. A cluster of 16 blocks of 8 warps serves 8 rows; a
// block owns 64 units, 8 a warp: twice the units of geometry.cuh's, so that the 128 rows of Uc in
// a block (256 KB) no longer fit its registers. Every warp's 64 product operands ("fragments" of
// 512 bytes) are divided between registers and shared memory.
#pragma once

#include "light_gru/persistent/geometry.cuh"

namespace sb_fast_sligru {

constexpr int kWideHidden = 1024;
constexpr int kWideCluster = 16;
constexpr int kWideRows = 8;
constexpr int kWideWarps = 8;
constexpr int kWideThreads = 32 * kWideWarps;
constexpr int kWideUnits = 8 * kWideWarps;  // of a block
constexpr int kWideFragments = 64;          // of a warp
constexpr int kFragmentBytes = 32 * 16;

static_assert(kWideCluster * kWideUnits == kWideHidden);

// Which of a warp's fragments lie in shared memory: kShared of them, spread evenly over the
// product.
template <int kShared>
struct FragmentSplit {
  static constexpr int kInRegisters = kWideFragments - kShared;
  // How many of the first `index` fragments lie in shared memory.
  static __host__ __device__ constexpr int shared_before(int index) {
    return index * kShared / kWideFragments;
  }
  static __host__ __device__ constexpr bool is_shared(int index) {
    return shared_before(index + 1) != shared_before(index);
  }
  static __host__ __device__ constexpr int register_index(int index) {
    return index - shared_before(index);
  }
};

}  // namespace sb_fast_sligru
