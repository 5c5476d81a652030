// The forward recurrence of forward_narrow.cu for many rows at 512 < H <= 1024: same equations,
// same two hops, up to 40 rows a cluster.
//
// Why not waves of forward_wide.cu: most of its step is latency, paid once for 8 rows.
// Here 40 rows pay it once, and the operands of the product in shared memory are read once for all
// of them. Warp w of a block owns the same 8 units and the same 16 rows of Uc as there, but
// multiplies them by all of h, so that no sums between warps are needed: after the product lane
// (g, c) holds r of unit g for rows 8j + 2c, 8j + 2c + 1 of every tile j. A block's h is one piece
// of memory, which bulk copies carry to the 15 other blocks.
//
// Buffers (see exchange.cuh): one of each, as in forward_narrow.cu. Li-GRU has no statistics,
// but its blocks send a word in their place: it says that their reads of h are over.
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/many.cuh"

namespace sb_fast_sligru {
namespace {

constexpr int kSharedFragments = 30;
constexpr int kGroups = 8;  // mbarriers under which h arrives
constexpr int kGroupSlots = kWideCluster / kGroups;
static_assert(kGroups * kGroupSlots == kWideCluster && kGroupSlots > 1);  // own slot: no message
[[maybe_unused]] constexpr int kSlotFragments = kWideUnits / 16;
constexpr int kTileBytes = kWideWarps * kCoreBytes;     // 8 rows of a block: [8 units][row]
constexpr int kSlotBytes = kManyTiles * kTileBytes;     // of which the tiles in use are sent
constexpr int kLineBytes = kWideUnits * sizeof(float);  // wx of a row and gate, at most

struct Shared {
  alignas(128) uint8_t hidden[kWideCluster][kSlotBytes];
  uint8_t fragments[kSharedFragments][kWarpgroups][kGroupFragmentBytes];
  uint8_t wx[kManyRows][2][kLineBytes];  // of one step
  RowSums squares;
  float rho[kManyRows];
  RowStream wx_rows[kManyRows], h_rows[kManyRows];  // from the block's first unit on
};

static_assert(sizeof(Shared) <= kManySharedBytes);

template <class T, bool kLayerNorm>
__global__ void __launch_bounds__(kWideThreads, 1)
    forward_many_kernel(const __grid_constant__ PersistentForward p) {
#if SB_FAST_SLIGRU_HAS_WARPGROUPS
  using Split = FragmentSplit<kSharedFragments>;
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  __shared__ alignas(8) uint64_t barriers[kGroups + 1];

  const Recurrence& layer = p.layer;
  const int hidden_size = static_cast<int>(layer.hidden), steps = static_cast<int>(layer.time);
  const int rows = p.choice.rows, tiles = (rows + 7) / 8;
  const auto* h0 = static_cast<const float*>(layer.h0);
  const auto* drop_mask = static_cast<const float*>(layer.drop_mask);
  const auto* ln_weight = static_cast<const float*>(layer.ln_weight);
  const auto* ln_bias = static_cast<const float*>(layer.ln_bias);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const uint32_t rank = cluster_rank();
  const int row0 = static_cast<int>(blockIdx.x / kWideCluster) * rows;
  const int block_unit0 = static_cast<int>(rank) * kWideUnits;
  const int unit = block_unit0 + warp * 8 + g;
  const bool in_range = block_unit0 + warp * 8 < hidden_size;
  // Rows of the last tile that the cluster does not have are computed like the last row of all and
  // neither loaded nor stored.
  const auto locate = [&](int local_row) { return locate_row(layer, row0, local_row, rows); };

  const uint32_t hidden_barrier = shared_address(&barriers[0]);
  const uint32_t statistics_barrier = shared_address(&barriers[kGroups]);
  const uint32_t tile_traffic = tiles * kTileBytes;
  const int norm_rows = kLayerNorm ? 8 * tiles : 0;
  const uint32_t statistics_traffic = row_sums_traffic(norm_rows);
  const auto expect_hidden = [&](int n) {  // a block's own slot, the first, comes without a message
    const int slots = n == 0 ? kGroupSlots - 1 : kGroupSlots;
    mbarrier::expect(hidden_barrier + 8 * n, slots * tile_traffic);
  };
  if (threadIdx.x <= kGroups) mbarrier::init(hidden_barrier + 8 * threadIdx.x);
  mbarrier::fence_init();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int n = 0; n < kGroups; n++) mbarrier::arrive(hidden_barrier + 8 * n);  // h0: no message
    mbarrier::expect(statistics_barrier, statistics_traffic);
  }

  // Slot o of `hidden` belongs to block rank ^ o and is [tile][8 units of a warp][row][unit].
  for (int i = threadIdx.x; i < kManyRows * kWideHidden / 2; i += kWideThreads) {
    const int row = i / (kWideHidden / 2), k = i % (kWideHidden / 2) * 2;
    const int slot = k / kWideUnits, section = k % kWideUnits / 8;
    const int column = static_cast<int>(rank ^ slot) * kWideUnits + k % kWideUnits;
    float2 value = make_float2(0.f, 0.f);
    if (h0 != nullptr && column < hidden_size)
      value =
          *reinterpret_cast<const float2*>(h0 + int64_t{locate(row).index} * hidden_size + column);
    *reinterpret_cast<uint32_t*>(&shared.hidden[slot][row / 8 * kTileBytes + section * kCoreBytes +
                                                      row % 8 * 16 + k % 8 * 2]) =
        OperandTraits<T>::pack(value.x, value.y);
  }
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(shared.wx)) / 4; i += kWideThreads)
    reinterpret_cast<uint32_t*>(shared.wx)[i] = 0;  // stays so where units or rows are padding

  // Fragment 4o + i: units 16i..16i+15 of slot o.
  uint32_t weights[Split::kInRegisters][4];
  const int warpgroup = __shfl_sync(0xffffffffu, warp / 4, 0);
#pragma unroll
  for (int f = 0; f < kWideFragments; f++) {
    const int column = static_cast<int>(rank ^ (f / kSlotFragments)) * kWideUnits +
                       f % kSlotFragments * 16 + 2 * c;
    uint32_t a[4] = {};
    if (unit < hidden_size) {
      const T* u = static_cast<const T*>(p.u) + int64_t{unit} * hidden_size + column;
#pragma unroll
      for (int i = 0; i < 4; i++)  // candidate, gate; then the same 8 columns on
        if (column + i / 2 * 8 < hidden_size)
          a[i] = *reinterpret_cast<const uint32_t*>(u + i % 2 * int64_t{hidden_size} * hidden_size +
                                                    i / 2 * 8);
    }
    if (Split::is_shared(f)) {
      store_fragment(shared_address(&shared.fragments[Split::shared_before(f)][warpgroup][0]), a);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) weights[Split::register_index(f)][i] = a[i];
    }
  }
  const Matrix weight_matrix(shared_address(&shared.fragments[0][warpgroup][0]), 8 * kCoreBytes,
                             kCoreBytes);
  const Matrix hidden_matrix(shared_address(&shared.hidden[0][0]), kCoreBytes, kTileBytes);

  float h[kManyTiles][2], mask[kManyTiles][2];
#pragma unroll
  for (int j = 0; j < kManyTiles; j++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t state = int64_t{locate(8 * j + 2 * c + i).index} * hidden_size + unit;
      h[j][i] = in_range && h0 != nullptr ? h0[state] : 0.f;
      mask[j][i] = in_range && drop_mask != nullptr ? drop_mask[state] : 1.f;
    }
  }
  float gamma_a = 1.f, gamma_z = 1.f, beta_a = 0.f, beta_z = 0.f;
  if (kLayerNorm && in_range && ln_weight != nullptr)
    gamma_a = ln_weight[unit], gamma_z = ln_weight[hidden_size + unit];
  if (kLayerNorm && in_range && ln_bias != nullptr)
    beta_a = ln_bias[unit], beta_z = ln_bias[hidden_size + unit];

  const Sequence wx = wx_sequence(layer), outputs = h_sequence(layer, p.h);
  const bool wx_float = wx.is_float(), h_float = outputs.is_float();
  for (int i = threadIdx.x; i < kManyRows; i += kWideThreads) {
    const Row row = locate(i);
    const int h_unit = row.direction * hidden_size + block_unit0;
    shared.wx_rows[i] = {row.valid ? wx.at(layer, row, 0, block_unit0) : nullptr,
                         wx.step_bytes(row)};
    shared.h_rows[i] = {row.valid ? outputs.at(layer, row, 0, h_unit) : nullptr,
                        outputs.step_bytes(row)};
    shared.rho[i] = 0.f;
  }
  const int block_units = min(hidden_size - block_unit0, kWideUnits);  // maybe negative

  // wx of one step, in pieces of 16 bytes, whole 128-byte lines; sections of 8 units permuted by
  // row against bank conflicts.
  const int wx_bytes = wx.bytes(), wx_pieces = wx_float ? 2 : 1;  // of 8 units
  const int wx_shift = wx_float ? 1 : 0;
  const uint32_t wx_gate_bytes = kWideUnits * wx_bytes, wx_row_bytes = 2 * wx_gate_bytes;
  const auto wx_section = [](int row, int section) { return section ^ (row >> 1 & 3); };
  const auto fetch = [&](int n) {
    for (int i = threadIdx.x; i < rows * 2 * kWideWarps * wx_pieces; i += kWideThreads) {
      const int piece = i & wx_shift, j = i >> wx_shift, section = j % kWideWarps;
      const int gate = j / kWideWarps % 2, local_row = j / kWideWarps / 2;
      const RowStream& row = shared.wx_rows[local_row];
      if (row.data != nullptr && section * 8 < block_units)
        copy_async_16(
            shared_address(&shared.wx) + local_row * wx_row_bytes + gate * wx_gate_bytes +
                (wx_section(local_row, section) * wx_pieces + piece) * 16,
            row.at(n) + gate * hidden_size * wx_bytes + (section * wx_pieces + piece) * 16);
    }
    copy_async_commit();
  };
  uint32_t wx_load = shared_address(&shared.wx) + 2 * c * wx_row_bytes +
                     (wx_section(2 * c, warp) * 8 + g) * wx_bytes;

  // 16-bit h is stored from the block's own slot, 16 bytes a lane: 8 rows by 4 sections a warp.
  const auto store_h = [&](int n) {
    for (int i = warp; i < 2 * tiles; i += kWideWarps) {
      const RowStream& row = shared.h_rows[i / 2 * 8 + lane % 8];
      const int section = i % 2 * 4 + lane / 8;
      const uint4 words = load_uint4(shared_address(&shared.hidden[0][0]) + i / 2 * kTileBytes +
                                     section * kCoreBytes + lane % 8 * 16);
      if (row.data != nullptr && section * 8 < block_units)
        *reinterpret_cast<uint4*>(const_cast<char*>(row.at(n)) + section * 16) = words;
    }
  };
  // See add_row_sums(): whose rho the lane computes.
  const int rho_local_row = warp * kManyTiles + lane % 8;
  const bool computes_rho = lane % 8 < kManyTiles && rho_local_row < 8 * tiles;
  const Row rho_row = locate(rho_local_row);
  const bool stores_rho = kLayerNorm && rank == 0 && lane < kManyTiles && rho_row.valid;
  float* rho_output = nullptr;
  if (stores_rho)
    rho_output = p.rho + int64_t{rho_row.index} * steps + layer.time_of(rho_row.index, 0);
  const int rho_step = rho_row.direction ? -1 : 1;

  uint32_t hidden_store = shared_address(&shared.hidden[0][warp * kCoreBytes + g * 16 + c * 4]);
  uint32_t sum_store = shared_address(&shared.squares.of_warps[warp][2 * c + (g & 1)]);
  uint32_t rho_load = shared_address(&shared.rho[2 * c]);
  float inverse_size = 1.f / static_cast<float>(2 * hidden_size);
  float eps = static_cast<float>(layer.eps);
  const Activation activation = layer.activation;
  pin(inverse_size), pin(eps), pin(hidden_store), pin(sum_store);
  pin(rho_load), pin(wx_load);
  fence_async();
  __syncthreads();
  cluster_barrier();

#pragma unroll 1
  for (int t = 0; t < steps; t++) {
    float sums[kSums];
    // While h arrives.
    fetch(t);
    if (t > 0 && !h_float) store_h(t - 1);
#pragma unroll
    for (int f = 0; f < kWideFragments; f++) {
      constexpr int kGroupFragments = kGroupSlots * kSlotFragments;
      if (f % kGroupFragments == 0) {
        const int n = f / kGroupFragments;
        mbarrier::wait(hidden_barrier + 8 * n, t & 1);
        if (threadIdx.x == 0) expect_hidden(n);
        warpgroup_begin();
      }
      const uint64_t b =
          hidden_matrix.at(f / kSlotFragments * kSlotBytes + f % kSlotFragments * 2 * kCoreBytes);
      if (Split::is_shared(f))
        warpgroup_multiply<T>(
            sums, weight_matrix.at(Split::shared_before(f) * sizeof(shared.fragments[0])), b,
            f > 0);
      else
        warpgroup_multiply<T>(sums, weights[Split::register_index(f)], b, f > 0);
    }
    warpgroup_finish(sums);

    if constexpr (kLayerNorm) {
#pragma unroll
      for (int j = 0; j < kManyTiles; j++) {
        const float (&r)[kSums] = sums;
        const float even = fmaf(r[4 * j], r[4 * j], r[4 * j + 2] * r[4 * j + 2]);
        const float odd = fmaf(r[4 * j + 1], r[4 * j + 1], r[4 * j + 3] * r[4 * j + 3]);
        float sum = (g & 1) ? odd : even;  // lane g: row 2c + (g & 1)
        sum += __shfl_xor_sync(0xffffffffu, (g & 1) ? even : odd, 4);
        sum = add_lane_xor(add_lane_xor(sum, 8), 16);
        if (g < 2) store_float(sum_store + 32 * j, sum);
      }
    }
    __syncthreads();
    send_row_sums(shared.squares, norm_rows, rank, statistics_barrier);
    mbarrier::wait(statistics_barrier, t & 1);
    if (threadIdx.x == 0) mbarrier::expect(statistics_barrier, statistics_traffic);
    if constexpr (kLayerNorm) {
      const float rho = reciprocal_sqrt(fmaf(add_row_sums(shared.squares), inverse_size, eps));
      if (computes_rho && lane < 8) shared.rho[rho_local_row] = rho;
      if (stores_rho) {
        *rho_output = rho;
        rho_output += rho_step;
      }
    }
    copy_async_wait<0>();
    __syncthreads();

#pragma unroll
    for (int j = 0; j < kManyTiles; j++) {
      float2 rho = make_float2(1.f, 1.f);
      if (kLayerNorm) rho = load_float2(rho_load + 32 * j);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t now = wx_load + (8 * j + i) * wx_row_bytes;
        float a = wx_float ? load_float(now) : load_operand<T>(now);
        float s = wx_float ? load_float(now + wx_gate_bytes) : load_operand<T>(now + wx_gate_bytes);
        if constexpr (kLayerNorm) a += beta_a, s += beta_z;
        const float scale = i == 0 ? rho.x : rho.y;
        a = fmaf(sums[4 * j + i], kLayerNorm ? gamma_a * scale : 1.f, a);
        s = fmaf(sums[4 * j + 2 + i], kLayerNorm ? gamma_z * scale : 1.f, s);
        const float candidate = fast_activate(activation, a) * mask[j][i];
        h[j][i] = next_hidden(h[j][i], fast_sigmoid(s), candidate);
        if (h_float) {
          const RowStream& row = shared.h_rows[8 * j + 2 * c + i];
          if (row.data != nullptr && in_range)
            reinterpret_cast<float*>(const_cast<char*>(row.at(t)))[warp * 8 + g] = h[j][i];
        }
      }
      // After the transpose lane (g, c) holds units 2c, 2c + 1 of row g.
      const uint32_t words = transpose(OperandTraits<T>::pack(h[j][0], h[j][1]));
      store_uint(hidden_store + j * kTileBytes, words);
    }
    fence_async();
    __syncthreads();
    if (t + 1 < steps && threadIdx.x == 0) {
#pragma unroll 1
      for (uint32_t o = 1; o < kWideCluster; o++)
        send_bulk(remote_address(shared_address(&shared.hidden[o][0]), rank ^ o),
                  remote_address(hidden_barrier + 8 * (o / kGroupSlots), rank ^ o),
                  shared_address(&shared.hidden[0][0]), tile_traffic);
    }
  }
  if (!h_float) store_h(steps - 1);
  cluster_barrier();
#endif
}

template <class T>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  const auto kernel =
      p.layer.layer_norm ? forward_many_kernel<T, true> : forward_many_kernel<T, false>;
  const int bytes = sizeof(Shared);
  const ClusterKernel<PersistentForward> in_clusters = {kernel, kWideCluster, kWideThreads, bytes};
  return in_clusters.run(p.choice.clusters(p.layer.rows()), p, stream);
}

}  // namespace

cudaError_t run_forward_many(const PersistentForward& p, cudaStream_t stream) {
  return p.layer.operand_type == DType::kBFloat16 ? launch<__nv_bfloat16>(p, stream)
                                                  : launch<__half>(p, stream);
}

}  // namespace sb_fast_sligru
