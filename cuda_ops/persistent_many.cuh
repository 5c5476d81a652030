// Geometry and products of the kernels for many rows at 512 < H <= 1024. The cluster is that of
// persistent_wide.cuh, 16 blocks of 64 units; it serves up to 40 rows, which the warpgroup products
// of sm_90a (wgmma) multiply in one pass: they read the state of all rows from shared memory once
// for four warps.
//
// A warpgroup of 4 warps computes d[64, 40] += a[64, 16] b[16, 40] at a time. Its warp w holds rows
// 16w..16w+15 of a and d, each lane as in an m16n8k16 product (multiply() in persistent.cuh);
// columns 8j..8j+7 of d are d[4j..4j+3]. In shared memory both operands consist of core matrices of
// 8 rows of 8 values of k, 128 contiguous bytes.
#pragma once

#include "persistent_wide.cuh"

namespace sb_fast_sligru {

constexpr int kManyTiles = 5;              // of 8 rows
constexpr int kManyRows = 8 * kManyTiles;  // that a cluster serves at most
constexpr int kWarpgroups = kWideWarps / 4;
constexpr int kCoreBytes = 128;
constexpr int kGroupFragmentBytes = 4 * kFragmentBytes;  // a of one product: [k / 8][row / 8]
// Shared memory of a block of sm_90, less what the mbarriers take.
constexpr int kManySharedBytes = 227 * 1024 - 128;
constexpr int kSums = 4 * kManyTiles;  // of a lane

// The code is for the architecture-specific target: sm_90a. The family's later members lack wgmma.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SB_FAST_SLIGRU_HAS_WARPGROUPS 1
#else
#define SB_FAST_SLIGRU_HAS_WARPGROUPS 0
#endif

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

__device__ __forceinline__ void store_uint(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

template <class Pass>
struct ManyRowsLaunch {
  Pass pass;
  int rows;  // of a cluster
};

// Row `local_row` of a cluster of `rows` from row0 on; not valid, besides, if the cluster has none.
__device__ __forceinline__ Row locate_row(const Recurrence& layer, int row0, int local_row,
                                          int rows) {
  Row row = locate_row(layer, row0 + local_row);
  row.valid = row.valid && local_row < rows;
  return row;
}

// One row of a sequence or of an array of the chunk: step n at data + n * step_bytes; null for a
// row that the cluster does not have. Kept in shared memory, a table per array, for want of
// registers.
struct RowStream {
  const char* data;
  int64_t step_bytes;

  __device__ __forceinline__ const char* at(int n) const { return data + n * step_bytes; }
};

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

// ---- sums over the units of every row, block by block
struct RowSums {
  float of_warps[kWideWarps][kManyRows];
  float of_blocks[kWideCluster][kManyRows];
};

// Sends the block's sums over its warps, of `rows` rows, to all blocks; or, to say as much without
// sums, one word (rows = 0). Warp w serves blocks 2w and 2w + 1.
__device__ __forceinline__ void send_row_sums(const RowSums& sums, int rows, uint32_t rank,
                                              uint32_t barrier) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const auto send_word = [&](int row, float x) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      send(remote_address(shared_address(&sums.of_blocks[rank][row]), 2 * warp + i),
           remote_address(barrier, 2 * warp + i), __float_as_uint(x));
  };
  for (int row = lane; row < rows; row += 32) {
    float x[kWideWarps];
#pragma unroll
    for (int i = 0; i < kWideWarps; i++) x[i] = sums.of_warps[i][row];
    send_word(row, ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])));
  }
  if (rows == 0 && lane == 0) send_word(0, 0.f);
}

// Bytes of what send_row_sums() of all blocks brings.
__device__ __forceinline__ uint32_t row_sums_traffic(int rows) {
  return kWideCluster * sizeof(float) * static_cast<uint32_t>(rows > 0 ? rows : 1);
}

// The sum over the blocks of row kManyTiles * warp + lane % 8, in the lanes with lane % 8 <
// kManyTiles: four lanes a row, every fourth block each. By whole warps.
__device__ __forceinline__ float add_row_sums(const RowSums& sums) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = min(kManyTiles * warp + lane % 8, kManyRows - 1);
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = sums.of_blocks[lane / 8 + 4 * i][row];
  return add_lane_xor(add_lane_xor((x[0] + x[1]) + (x[2] + x[3]), 8), 16);
}

// Launchers; see run_forward and run_backward, which choose by H and many_rows(). `rows` a cluster,
// at most kManyRows.
cudaError_t run_forward_many(const PersistentForward& p, int rows, cudaStream_t stream);
cudaError_t run_backward_many(const PersistentBackward& p, int rows, cudaStream_t stream);

// Microseconds a step of one wave of clusters: of the 8-row kernel, and of the many-row kernel as
// base + rows * row. Measured, see benchmarks/README.md; only their ratios matter.
struct StepTimes {
  float wide, base, row;
};
constexpr StepTimes kForwardTimes = {1.87f, 3.85f, 0.026f};
constexpr StepTimes kBackwardTimes = {1.39f, 3.95f, 0.05f};

// Rows that a cluster should serve if the many-row kernel is the faster one for `rows` rows on the
// current device, else 0. Whichever kernel runs, as many clusters run at once.
int many_rows(int64_t rows, const StepTimes& times);

}  // namespace sb_fast_sligru
