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
#include "light_gru/persistent/forward_stages.cuh"
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
  // Slot o of `hidden` belongs to block rank ^ o and is [tile][8 units of a warp][row][unit].
  alignas(128) uint8_t hidden[kWideCluster][kSlotBytes];
  uint8_t fragments[kSharedFragments][kWarpgroups][kGroupFragmentBytes];
  uint8_t wx[kManyRows][2][kLineBytes];  // of one step
  RowSums squares;
  float rho[kManyRows];
  RowStream wx_rows[kManyRows], h_rows[kManyRows];  // from the block's first unit on
};

static_assert(sizeof(Shared) <= kManySharedBytes);

// The rows of a cluster. Those of the last tile that it does not have are computed like the last
// row of all and neither loaded nor stored.
struct Rows {
  const Recurrence& layer;
  int row0, count, tiles;

  __device__ __forceinline__ Row locate(int local_row) const {
    return locate_row(layer, row0, local_row, count);
  }
};

// The mbarriers of a block: kGroups for h, one for the statistics.
struct ManyArrivals {
  uint32_t hidden, statistics;
  uint32_t tile_traffic, statistics_traffic;

  // By all threads of the block. A cluster_barrier() has to follow.
  __device__ __forceinline__ ManyArrivals(uint64_t (&barriers)[kGroups + 1], int tiles,
                                          int norm_rows)
      : hidden(shared_address(&barriers[0])),
        statistics(shared_address(&barriers[kGroups])),
        tile_traffic(tiles * kTileBytes),
        statistics_traffic(row_sums_traffic(norm_rows)) {
    if (threadIdx.x <= kGroups) mbarrier::init(hidden + 8 * threadIdx.x);
    mbarrier::fence_init();
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int n = 0; n < kGroups; n++) mbarrier::arrive(hidden + 8 * n);  // h0: no message
      mbarrier::expect(statistics, statistics_traffic);
    }
  }

  __device__ __forceinline__ void wait_for_hidden(int t, int n) const {
    // A block's own slot, the first, comes without a message.
    const int slots = n == 0 ? kGroupSlots - 1 : kGroupSlots;
    receive(hidden + 8 * n, t & 1, slots * tile_traffic);
  }
  __device__ __forceinline__ void wait_for_statistics(int t) const {
    receive(statistics, t & 1, statistics_traffic);
  }
};

// h0 as the product's operand.
template <class T>
__device__ __forceinline__ void write_initial_hidden(Shared& shared, const Rows& rows,
                                                     const Position& at) {
  for (int i = threadIdx.x; i < kManyRows * kWideHidden / 2; i += kWideThreads) {
    const int row = i / (kWideHidden / 2), k = i % (kWideHidden / 2) * 2;
    const int slot = k / kWideUnits, section = k % kWideUnits / 8;
    const int column = static_cast<int>(at.rank ^ slot) * kWideUnits + k % kWideUnits;
    const float2 value = load_initial_pair(rows.layer, rows.locate(row), column);
    *reinterpret_cast<uint32_t*>(&shared.hidden[slot][row / 8 * kTileBytes + section * kCoreBytes +
                                                      row % 8 * 16 + k % 8 * 2]) =
        OperandTraits<T>::pack(value.x, value.y);
  }
}

// r = Uc h. Fragment 4o + i: units 16i..16i+15 of slot o.
template <class T>
struct Product {
  using Split = FragmentSplit<kSharedFragments>;
  uint32_t weights[Split::kInRegisters][4];
  Matrix weight_matrix, hidden_matrix;

  __device__ __forceinline__ Product(Shared& shared, const void* u_, const Position& at, int unit)
      : weight_matrix(0, 0, 0), hidden_matrix(0, 0, 0) {
    const int warpgroup = __shfl_sync(0xffffffffu, at.warp / 4, 0);
#pragma unroll
    for (int f = 0; f < kWideFragments; f++) {
      const int column = static_cast<int>(at.rank ^ (f / kSlotFragments)) * kWideUnits +
                         f % kSlotFragments * 16 + 2 * at.c;
      uint32_t a[4] = {};
      if (unit < at.hidden_size) {
        const T* u = static_cast<const T*>(u_) + int64_t{unit} * at.hidden_size + column;
#pragma unroll
        for (int i = 0; i < 4; i++)  // candidate, gate; then the same 8 columns on
          if (column + i / 2 * 8 < at.hidden_size)
            a[i] = *reinterpret_cast<const uint32_t*>(
                u + i % 2 * int64_t{at.hidden_size} * at.hidden_size + i / 2 * 8);
      }
      if (Split::is_shared(f)) {
        store_fragment(shared_address(&shared.fragments[Split::shared_before(f)][warpgroup][0]), a);
      } else {
#pragma unroll
        for (int i = 0; i < 4; i++) weights[Split::register_index(f)][i] = a[i];
      }
    }
    weight_matrix =
        Matrix(shared_address(&shared.fragments[0][warpgroup][0]), 8 * kCoreBytes, kCoreBytes);
    hidden_matrix = Matrix(shared_address(&shared.hidden[0][0]), kCoreBytes, kTileBytes);
  }

  // Waits for h group by group.
  __device__ __forceinline__ void compute(float (&sums)[kSums], const ManyArrivals& arrivals,
                                          int t) const {
#pragma unroll
    for (int f = 0; f < kWideFragments; f++) {
      constexpr int kGroupFragments = kGroupSlots * kSlotFragments;
      if (f % kGroupFragments == 0) {
        arrivals.wait_for_hidden(t, f / kGroupFragments);
        warpgroup_begin();
      }
      const uint64_t b =
          hidden_matrix.at(f / kSlotFragments * kSlotBytes + f % kSlotFragments * 2 * kCoreBytes);
      if (Split::is_shared(f))
        warpgroup_multiply<T>(
            sums, weight_matrix.at(Split::shared_before(f) * sizeof(Shared::fragments[0])), b,
            f > 0);
      else
        warpgroup_multiply<T>(sums, weights[Split::register_index(f)], b, f > 0);
    }
    warpgroup_finish(sums);
  }
};

// wx of one step, in pieces of 16 bytes, whole 128-byte lines; sections of 8 units permuted by row
// against bank conflicts.
template <class T>
struct Input {
  Shared& shared;
  int rows, block_units, row_gate_bytes;  // block_units may be negative
  bool is_float;
  int pieces, shift;  // of 8 units
  uint32_t gate_bytes, row_bytes;
  uint32_t load_address;

  static __device__ __forceinline__ int section_of(int row, int section) {
    return section ^ (row >> 1 & 3);
  }

  __device__ __forceinline__ Input(Shared& shared, const Sequence& wx, const Position& at,
                                   const Rows& rows)
      : shared(shared), rows(rows.count) {
    const int wx_bytes = wx.bytes();
    is_float = wx.is_float();
    block_units = min(at.hidden_size - at.block_unit0, kWideUnits);
    row_gate_bytes = at.hidden_size * wx_bytes;
    pieces = is_float ? 2 : 1, shift = is_float ? 1 : 0;
    gate_bytes = kWideUnits * wx_bytes, row_bytes = 2 * gate_bytes;
    load_address = shared_address(&shared.wx) + 2 * at.c * row_bytes +
                   (section_of(2 * at.c, at.warp) * 8 + at.g) * wx_bytes;
  }

  __device__ __forceinline__ void fetch(int n) const {
    for (int i = threadIdx.x; i < rows * 2 * kWideWarps * pieces; i += kWideThreads) {
      const int piece = i & shift, j = i >> shift, section = j % kWideWarps;
      const int gate = j / kWideWarps % 2, local_row = j / kWideWarps / 2;
      const RowStream& row = shared.wx_rows[local_row];
      if (row.has(n) && section * 8 < block_units)
        copy_async_16(shared_address(&shared.wx) + local_row * row_bytes + gate * gate_bytes +
                          (section_of(local_row, section) * pieces + piece) * 16,
                      row.at(n) + gate * row_gate_bytes + (section * pieces + piece) * 16);
    }
    copy_async_commit();
  }

  // Of row 8 tile + 2c + i.
  __device__ __forceinline__ GatePair load(int tile, int i) const {
    const uint32_t now = load_address + (8 * tile + i) * row_bytes;
    const float a = is_float ? load_float(now) : load_operand<T>(now);
    return {a, is_float ? load_float(now + gate_bytes) : load_operand<T>(now + gate_bytes)};
  }
};

template <class T, bool kLayerNorm>
__global__ void __launch_bounds__(kWideThreads, 1)
    forward_many_kernel(const __grid_constant__ PersistentForward p) {
#if SB_FAST_SLIGRU_HAS_WARPGROUPS
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  __shared__ alignas(8) uint64_t barriers[kGroups + 1];

  const Recurrence& layer = p.layer;
  const Position at = locate_thread<kWideCluster, kWideUnits>(layer, p.choice.rows);
  if (at.steps == 0) return;  // no sequence of the cluster has any
  const Rows rows = {layer, at.row0, p.choice.rows, (p.choice.rows + 7) / 8};
  const int unit = at.block_unit0 + at.warp * 8 + at.g;
  const bool in_range = at.block_unit0 + at.warp * 8 < at.hidden_size;

  const int norm_rows = kLayerNorm ? 8 * rows.tiles : 0;
  const ManyArrivals arrivals(barriers, rows.tiles, norm_rows);
  write_initial_hidden<T>(shared, rows, at);
  fill_with_zeros<kWideThreads>(shared.wx);  // stays so where units or rows are padding
  const Product<T> product(shared, p.u, at, unit);

  UnitState state[kManyTiles][2];
#pragma unroll
  for (int j = 0; j < kManyTiles; j++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      state[j][i] = UnitState{};  // nvcc 13.0 gives state[0] alone its default values
      if (in_range) state[j][i].load(layer, rows.locate(8 * j + 2 * at.c + i), unit);
    }
  }
  UnitParameters parameters;
  if (kLayerNorm && in_range) parameters.load(layer, unit);

  const Sequence wx_all = wx_sequence(layer), outputs = h_sequence(layer, p.h);
  const bool h_float = outputs.is_float();
  for (int i = threadIdx.x; i < kManyRows; i += kWideThreads) {
    const Row row = rows.locate(i);
    const int h_unit = row.direction * at.hidden_size + at.block_unit0;
    shared.wx_rows[i] = {wx_all.at(layer, row, 0, at.block_unit0), wx_all.step_bytes(row), 0,
                         row.stored_steps()};
    shared.h_rows[i] = {outputs.at(layer, row, 0, h_unit), outputs.step_bytes(row), 0,
                        row.stored_steps()};
    shared.rho[i] = 0.f;
  }
  Input<T> wx(shared, wx_all, at, rows);

  // 16-bit h is stored from the block's own slot, 16 bytes a lane: 8 rows by 4 sections a warp.
  const auto store_h = [&](int n) {
    for (int i = at.warp; i < 2 * rows.tiles; i += kWideWarps) {
      const RowStream& row = shared.h_rows[i / 2 * 8 + at.lane % 8];
      const int section = i % 2 * 4 + at.lane / 8;
      const uint4 words = load_uint4(shared_address(&shared.hidden[0][0]) + i / 2 * kTileBytes +
                                     section * kCoreBytes + at.lane % 8 * 16);
      if (row.has(n) && section * 8 < wx.block_units)
        *reinterpret_cast<uint4*>(const_cast<char*>(row.at(n)) + section * 16) = words;
    }
  };
  // See add_row_sums(): whose rho the lane computes.
  const int rho_local_row = at.warp * kManyTiles + at.lane % 8;
  const bool computes_rho = at.lane % 8 < kManyTiles && rho_local_row < 8 * rows.tiles;
  const Row rho_row = rows.locate(rho_local_row);
  RhoOutput rho_output(p, rho_row, kLayerNorm && at.rank == 0 && at.lane < kManyTiles);

  uint32_t hidden_store =
      shared_address(&shared.hidden[0][at.warp * kCoreBytes + at.g * 16 + at.c * 4]);
  uint32_t sum_store = shared_address(&shared.squares.of_warps[at.warp][2 * at.c + (at.g & 1)]);
  uint32_t rho_load = shared_address(&shared.rho[2 * at.c]);
  RootMeanSquare norm(layer);
  const Activation activation = layer.activation;
  pin(norm.inverse_size), pin(norm.eps), pin(hidden_store), pin(sum_store);
  pin(rho_load), pin(wx.load_address);
  fence_async();
  __syncthreads();
  cluster_barrier();

#pragma unroll 1
  for (int t = 0; t < at.steps; t++) {
    // While h arrives.
    wx.fetch(t);
    if (t > 0 && !h_float) store_h(t - 1);
    float sums[kSums];
    product.compute(sums, arrivals, t);

    if constexpr (kLayerNorm) {
#pragma unroll
      for (int j = 0; j < kManyTiles; j++) {
        const float (&r)[kSums] = sums;
        const float even = fmaf(r[4 * j], r[4 * j], r[4 * j + 2] * r[4 * j + 2]);
        const float odd = fmaf(r[4 * j + 1], r[4 * j + 1], r[4 * j + 3] * r[4 * j + 3]);
        const float sum = sum_over_units(even, odd, at.g);
        if (at.g < 2) store_float(sum_store + 32 * j, sum);
      }
    }
    __syncthreads();
    send_row_sums(shared.squares, norm_rows, at.rank, arrivals.statistics);
    arrivals.wait_for_statistics(t);
    if constexpr (kLayerNorm) {
      const float rho = norm.rho(add_row_sums(shared.squares));
      if (computes_rho && at.lane < 8) shared.rho[rho_local_row] = rho;
      rho_output.store(t < rho_row.length, rho);
    }
    copy_async_wait<0>();
    __syncthreads();

#pragma unroll
    for (int j = 0; j < kManyTiles; j++) {
      float2 rho = make_float2(1.f, 1.f);
      if (kLayerNorm) rho = load_float2(rho_load + 32 * j);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        GatePair wx_t = wx.load(j, i);
        if constexpr (kLayerNorm) wx_t.a += parameters.beta.a, wx_t.z += parameters.beta.z;
        const float scale = i == 0 ? rho.x : rho.y;
        const float a =
            fmaf(sums[4 * j + i], kLayerNorm ? parameters.gamma.a * scale : 1.f, wx_t.a);
        const float s =
            fmaf(sums[4 * j + 2 + i], kLayerNorm ? parameters.gamma.z * scale : 1.f, wx_t.z);
        const float candidate = fast_activate(activation, a) * state[j][i].drop_mask;
        state[j][i].h = next_hidden(state[j][i].h, fast_sigmoid(s), candidate);
        if (h_float) {
          const RowStream& row = shared.h_rows[8 * j + 2 * at.c + i];
          if (row.has(t) && in_range)
            reinterpret_cast<float*>(const_cast<char*>(row.at(t)))[at.warp * 8 + at.g] =
                state[j][i].h;
        }
      }
      // After the transpose lane (g, c) holds units 2c, 2c + 1 of row g.
      const uint32_t words = transpose(OperandTraits<T>::pack(state[j][0].h, state[j][1].h));
      store_uint(hidden_store + j * kTileBytes, words);
    }
    fence_async();
    __syncthreads();
    if (t + 1 < at.steps && threadIdx.x == 0) {
#pragma unroll 1
      for (uint32_t o = 1; o < kWideCluster; o++)
        send_bulk(remote_address(shared_address(&shared.hidden[o][0]), at.rank ^ o),
                  remote_address(arrivals.hidden + 8 * (o / kGroupSlots), at.rank ^ o),
                  shared_address(&shared.hidden[0][0]), arrivals.tile_traffic);
    }
  }
  if (!h_float) store_h(at.steps - 1);
  cluster_barrier();
#endif
}

template <class T>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  const auto kernel =
      p.layer.layer_norm ? forward_many_kernel<T, true> : forward_many_kernel<T, false>;
  const int bytes = sizeof(Shared);
  const ClusterKernel<PersistentForward> in_clusters = {kernel, kWideCluster, kWideThreads, bytes};
  return in_clusters.run(p.choice.groups(p.layer.rows()), p, stream);
}

}  // namespace

cudaError_t run_forward_many(const PersistentForward& p, cudaStream_t stream) {
  return p.layer.operand_type == DType::kBFloat16 ? launch<__nv_bfloat16>(p, stream)
                                                  : launch<__half>(p, stream);
}

}  // namespace sb_fast_sligru
