// Geometry and products of the kernels for many rows at 512 < H <= 1024. The cluster is that of
// wide.cuh, 16 blocks of 64 units; it serves up to 40 rows, which the warpgroup products
// of sm_90a (wgmma) multiply in one pass: they read the state of all rows from shared memory once
// for four warps.
#pragma once

#include "common/warpgroup.cuh"
#include "light_gru/persistent/wide.cuh"

namespace sb_fast_sligru {

constexpr int kManyTiles = 5;              // of 8 rows
constexpr int kManyRows = 8 * kManyTiles;  // that a cluster serves at most
static_assert(kManyRows == kProductColumns);
constexpr int kWarpgroups = kWideWarps / 4;
constexpr int kGroupFragmentBytes = 4 * kFragmentBytes;   // a of one product: [k / 8][row / 8]
constexpr int kManySharedBytes = kWideSharedBytes - 128;  // the mbarriers take the rest

// Row `local_row` of a cluster of `rows` from row0 on; not valid, besides, if the cluster has none.
__device__ __forceinline__ Row locate_row(const Recurrence& layer, int row0, int local_row,
                                          int rows) {
  Row row = locate_row(layer, row0 + local_row);
  row.valid = row.valid && local_row < rows;
  return row;
}

// One row of a sequence or of an array of the chunk: step n at data + n * step_bytes. Kept in shared
// memory, a table per array, for want of registers.
struct RowStream {
  const char* data;
  int64_t step_bytes;
  int first, end;  // of the steps that it has: none of a row that the cluster does not have

  __device__ __forceinline__ bool has(int n) const { return n >= first && n < end; }
  __device__ __forceinline__ const char* at(int n) const { return data + n * step_bytes; }
};

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

}  // namespace sb_fast_sligru
