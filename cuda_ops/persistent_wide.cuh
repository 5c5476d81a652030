// Geometry of the kernels for 512 < H <= 1024. A cluster of 16 blocks of 8 warps serves 8 rows; a
// block owns 64 units, 8 a warp: twice the units of persistent.cuh's, so that the 128 rows of Uc in
// a block (256 KB) no longer fit its registers. Every warp's 64 product operands ("fragments" of
// 512 bytes) are divided between registers and shared memory.
#pragma once

#include "persistent.cuh"

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

__device__ __forceinline__ uint4 load_uint4(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ uint32_t load_uint(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ void store_uint2(uint32_t address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}

__device__ __forceinline__ void store_uint4(uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// Two operands packed in a word.
template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t x) {
  return make_float2(OperandTraits<T>::to_float(static_cast<uint16_t>(x)),
                     OperandTraits<T>::to_float(static_cast<uint16_t>(x >> 16)));
}

__device__ __forceinline__ void copy_async_16_or_zeros(uint32_t shared, const void* global,
                                                       bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Launchers; see run_forward and run_backward, which choose by H.
cudaError_t run_forward_wide(const PersistentForward& p, cudaStream_t stream);
cudaError_t run_backward_wide(const PersistentBackward& p, cudaStream_t stream);
// Clusters that run at once on the current device; 0 if it has none of this size.
int resident_clusters_wide();

}  // namespace sb_fast_sligru
