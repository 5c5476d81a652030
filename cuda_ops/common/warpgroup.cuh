// Products of a warpgroup on the tensor cores of sm_90a (wgmma).
//
// A warpgroup of 4 warps computes d[64, 40] += a[64, 16] b[16, 40] at a time. Its warp w holds rows
// 16w..16w+15 of a and d, each lane as in an m16n8k16 product (multiply() in product.cuh); columns
// 8j..8j+7 of d are d[4j..4j+3]. In shared memory both operands consist of core matrices of 8 rows
// of 8 values of k, 128 contiguous bytes.
#pragma once

#include "common/convert.cuh"

// The code is for the architecture-specific target: sm_90a. The family's later members lack wgmma.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SB_FAST_SLIGRU_HAS_WARPGROUPS 1
#else
#define SB_FAST_SLIGRU_HAS_WARPGROUPS 0
#endif

namespace sb_fast_sligru {

constexpr int kProductColumns = 40;
constexpr int kSums = kProductColumns / 2;  // of d, in a lane
constexpr int kCoreBytes = 128;             // of a core matrix

// An operand in shared memory whose core matrices are `k_bytes` apart along k and `row_bytes` along
// its rows.
struct Matrix {
  uint32_t low, high;

  __device__ __forceinline__ Matrix(uint32_t address, uint32_t k_bytes, uint32_t row_bytes)
      : low((address & 0x3ffff) >> 4 | k_bytes >> 4 << 16), high(row_bytes >> 4) {}
  // Its descriptor, or that of the same operand `offset` bytes further on.
  __device__ __forceinline__ uint64_t at(uint32_t offset) const {
    return uint64_t{high} << 32 | (low + (offset >> 4));
  }
};

// Before the first product of a series: orders it after the writes of its registers.
__device__ __forceinline__ void warpgroup_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// After the last: waits for the series. Until then nothing may touch d.
__device__ __forceinline__ void warpgroup_finish(float (&d)[kSums]) {
  asm volatile(
      "wgmma.commit_group.sync.aligned;\n"
      "wgmma.wait_group.sync.aligned 0;" ::
          : "memory");
#pragma unroll
  for (int i = 0; i < kSums; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define SB_FAST_SLIGRU_SUMS \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19}, "
#define SB_FAST_SLIGRU_SUM_OPERANDS(d)                                                            \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define SB_FAST_SLIGRU_REGISTER_PRODUCT(type)                                             \
  asm volatile(                                                                           \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %25, 0;\n"                                    \
      "wgmma.mma_async.sync.aligned.m64n40k16.f32." type "." type " " SB_FAST_SLIGRU_SUMS \
      "{%20, %21, %22, %23}, %24, add, 1, 1, 0;\n}"                                       \
      : SB_FAST_SLIGRU_SUM_OPERANDS(d)                                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
#define SB_FAST_SLIGRU_SHARED_PRODUCT(type)                                               \
  asm volatile(                                                                           \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %22, 0;\n"                                    \
      "wgmma.mma_async.sync.aligned.m64n40k16.f32." type "." type " " SB_FAST_SLIGRU_SUMS \
      "%20, %21, add, 1, 1, 0, 0;\n}"                                                     \
      : SB_FAST_SLIGRU_SUM_OPERANDS(d)                                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

// d = (add ? d : 0) + a b, a in registers or in shared memory, b in shared memory.
template <class T>
__device__ __forceinline__ void warpgroup_multiply(float (&d)[kSums], const uint32_t (&a)[4],
                                                   uint64_t b, bool add) {
#if SB_FAST_SLIGRU_HAS_WARPGROUPS
  if constexpr (OperandTraits<T>::kType == DType::kBFloat16)
    SB_FAST_SLIGRU_REGISTER_PRODUCT("bf16");
  else
    SB_FAST_SLIGRU_REGISTER_PRODUCT("f16");
#endif
}

template <class T>
__device__ __forceinline__ void warpgroup_multiply(float (&d)[kSums], uint64_t a, uint64_t b,
                                                   bool add) {
#if SB_FAST_SLIGRU_HAS_WARPGROUPS
  if constexpr (OperandTraits<T>::kType == DType::kBFloat16)
    SB_FAST_SLIGRU_SHARED_PRODUCT("bf16");
  else
    SB_FAST_SLIGRU_SHARED_PRODUCT("f16");
#endif
}

#undef SB_FAST_SLIGRU_SUMS
#undef SB_FAST_SLIGRU_SUM_OPERANDS
#undef SB_FAST_SLIGRU_REGISTER_PRODUCT
#undef SB_FAST_SLIGRU_SHARED_PRODUCT

// ---- one fragment (16 k) of a warpgroup's a: lane's four registers to shared memory
__device__ __forceinline__ void store_fragment(uint32_t fragment, const uint32_t (&a)[4]) {
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4,
            lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 4; i++)
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(
                     fragment + (i / 2 * 8 + warp * 2 + i % 2) * kCoreBytes + lane * 4),
                 "r"(a[i])
                 : "memory");
}

}  // namespace sb_fast_sligru
