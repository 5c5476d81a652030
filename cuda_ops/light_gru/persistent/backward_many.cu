// The backward recurrence of backward_narrow.cu for many rows at 512 < H <= 1024: same equations,
// same exchange, up to 40 rows a cluster (why: forward_many.cu).
//
// Lane (g, c) of warp w computes units 8w + 2c, 8w + 2c + 1 of its block for row 8j + g of every
// tile j. dwx of the block is an operand in shared memory; k counts its 128 values of a row as 16
// octets of 4 units: a0 a1 z0 z1 a2 a3 z2 z3. Warpgroup v multiplies it by Uc^T for the 64 units
// of the 8 blocks rank ^ (2i + v), one block at a time: row m of warp w's 16 is unit
//   2 (m % 8) + m / 8,
// so that a lane holds pairs of neighbouring units, which it packs and sends.
//
// Buffers (see exchange.cuh): one of each. The sums for m2 double as the proof that a block has
// read the partial carries of the step before, and without a norm a word takes their place; a block
// sends partial carries only when those of all blocks are there. They prove, in turn, that it has
// read the sums: any one block gets them from one of its warpgroups only, so both meet between
// their reads and the first send.
//
// One step, tile by tile where the rows are a lane's:
//   d = grad_h + carry -> dwx, to shared memory; terms of m2 -> sum over the block -> send to all
//   -> product, of dwx and the block's rows of Uc, target by target; in the shadow of the first:
//   wait for m2, sum over blocks; of the others: fetch the next step's inputs, store dwx
//   -> send each target its partial carries
//   -> wait for the partial carries, group by group, sum over blocks -> carry
#include "light_gru/persistent/backward_stages.cuh"
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/many.cuh"

namespace sb_fast_sligru {
namespace {

constexpr int kSharedFragments = 24;
using Split = FragmentSplit<kSharedFragments>;
constexpr int kGroups = 4;  // mbarriers under which carries arrive
constexpr int kGroupSlots = kWideCluster / kGroups;
static_assert(kGroups * kGroupSlots == kWideCluster);
constexpr int kTargets = kWideCluster / kWarpgroups;  // blocks that a warpgroup serves
[[maybe_unused]] constexpr int kTargetFragments = kWideFragments / kTargets;  // of 16 k
constexpr int kTileBytes = 8 * kWideUnits * 2;  // partial carries of 8 rows
constexpr int kSlotBytes = kManyTiles * kTileBytes;
constexpr int kOctets = 2 * kWideUnits / 8;
constexpr int kOperandTileBytes = kOctets * kCoreBytes;
constexpr int kLineBytes = kWideUnits * 2;  // one row of one 16-bit stream

template <bool kLayerNorm>
struct Shared {
  alignas(128) uint8_t partial[kWideCluster][kSlotBytes];
  uint8_t fragments[kSharedFragments][kWarpgroups][kGroupFragmentBytes];
  uint8_t operand[kManyTiles][kOperandTileBytes];
  uint8_t streams[kManyRows][kCoefficientStreams<kLayerNorm>][kLineBytes];  // of one step
  uint8_t grad[kManyRows][2 * kLineBytes];
  RowSums m2;
  float2 factors[kManyRows];       // rho, -rho m2
  RowStream grad_rows[kManyRows];  // from the block's first unit on
  int last[kManyRows];       // row_step_at() of k = 0; -1 for a row that the cluster does not have
  int rho_steps[kManyRows];  // from a rho to that of the next step: 1 or -1
};

static_assert(sizeof(Shared<true>) <= kManySharedBytes);

// Uc^T with gamma folded in. Fragment 8i + j: block rank ^ (2i + warpgroup), octets 2j, 2j + 1.
template <class T>
struct Weights {
  uint32_t kept[Split::kInRegisters][4];
  int warpgroup;
  Matrix fragments, operand;

  template <bool kLayerNorm>
  __device__ __forceinline__ Weights(const PersistentBackward& p, const WideLane& at,
                                     Shared<kLayerNorm>& shared)
      : warpgroup(__shfl_sync(0xffffffffu, at.warp / 4, 0)),
        fragments(shared_address(&shared.fragments[0][warpgroup][0]), 8 * kCoreBytes, kCoreBytes),
        operand(shared_address(&shared.operand[0][0]), kCoreBytes, kOperandTileBytes) {
#pragma unroll
    for (int f = 0; f < kWideFragments; f++) {
      uint32_t a[4] = {};
      load(p, at, kLayerNorm, f, a);
      if (Split::is_shared(f)) {
        store_fragment(shared_address(&shared.fragments[Split::shared_before(f)][warpgroup][0]), a);
      } else {
#pragma unroll
        for (int i = 0; i < 4; i++) kept[Split::register_index(f)][i] = a[i];
      }
    }
  }
  __device__ __forceinline__ void load(const PersistentBackward& p, const WideLane& at,
                                       bool layer_norm, int f, uint32_t (&a)[4]) const {
    const int hidden_size = static_cast<int>(p.layer.hidden);
    const auto* ln_weight = static_cast<const float*>(p.layer.ln_weight);
    const int target = static_cast<int>(at.rank ^ (f / kTargetFragments * 2 + warpgroup));
    const int column = target * kWideUnits + at.warp % 4 * 16 + 2 * at.g;
#pragma unroll
    for (int half = 0; half < 2; half++) {  // lane c: gate c % 2 of the octet's units 2 (c / 2)...
      const int row = at.block_unit0 + (f % kTargetFragments * 2 + half) * 4 + at.c / 2 * 2;
      if (row < hidden_size && column < hidden_size) {
        const int output = at.c % 2 * hidden_size + row;
        const T* u = static_cast<const T*>(p.u) + int64_t{output} * hidden_size + column;
        float2 low = unpack_pair<T>(*reinterpret_cast<const uint32_t*>(u));
        float2 high = unpack_pair<T>(*reinterpret_cast<const uint32_t*>(u + hidden_size));
        if (layer_norm && ln_weight != nullptr) {
          const float2 gamma = *reinterpret_cast<const float2*>(ln_weight + output);
          low.x *= gamma.x, low.y *= gamma.x, high.x *= gamma.y, high.y *= gamma.y;
        }
        a[2 * half] = OperandTraits<T>::pack(low.x, high.x);
        a[2 * half + 1] = OperandTraits<T>::pack(low.y, high.y);
      }
    }
  }

  // Starts sums = the products for target i. They run until warpgroup_finish().
  __device__ __forceinline__ void begin_product(float (&sums)[kSums], int i) const {
    warpgroup_begin();
#pragma unroll
    for (int j = 0; j < kTargetFragments; j++) {
      const int f = i * kTargetFragments + j;
      const uint64_t b = operand.at(j * 2 * kCoreBytes);
      if (Split::is_shared(f))
        warpgroup_multiply<T>(
            sums, fragments.at(Split::shared_before(f) * kWarpgroups * kGroupFragmentBytes), b,
            j > 0);
      else
        warpgroup_multiply<T>(sums, kept[Split::register_index(f)], b, j > 0);
    }
  }
};

// The coefficients and grad_h of one step, in pieces of 16 bytes, whole 128-byte lines; sections of
// 8 units permuted by row against bank conflicts.
template <class T, bool kLayerNorm>
struct Streams {
  using Memory = Shared<kLayerNorm>;
  static constexpr int kStreams = kCoefficientStreams<kLayerNorm>;
  static constexpr int kInputTileBytes = 8 * kStreams * kLineBytes;

  struct Input {
    float2 k_a, k_z, complement, grad_h;  // complement: 1 - z
  };

  bool grad_float;
  int rows, block_unit0, block_units;
  uint32_t coefficient_load, grad_load, grad_tile_bytes;

  // Fills the tables of the rows.
  __device__ __forceinline__ Streams(const PersistentBackward& p, const WideLane& at,
                                     Memory& shared)
      : rows(p.choice.rows), block_unit0(at.block_unit0) {
    const int hidden_size = static_cast<int>(p.layer.hidden), count = static_cast<int>(p.count);
    const Sequence grad_h = grad_h_sequence(p);
    grad_float = grad_h.is_float();
    for (int i = threadIdx.x; i < kManyRows; i += kWideThreads) {
      const Row row = locate_row(p.layer, at.row0, i, rows);
      const Stream stream = grad_h_stream(p, grad_h, row, 0, block_unit0);
      shared.rho_steps[i] = row.direction ? 1 : -1;
      shared.last[i] = row.valid ? row_step_at(p, row, 0) : -1;
      shared.grad_rows[i] = {stream.source, stream.step, row.valid ? entry_step(p, row) : count,
                             count};
    }
    block_units = min(hidden_size - block_unit0, kWideUnits);  // maybe negative
    coefficient_load = shared_address(&shared.streams[at.g][0][(at.warp ^ at.g) * 16 + 4 * at.c]);
    grad_load = shared_address(&shared.grad[0][0]) +
                ((at.g * kWideWarps + (at.warp ^ at.g)) * 8 + 2 * at.c) * grad_h.bytes();
    grad_tile_bytes = 8 * kWideUnits * grad_h.bytes();
  }

  __device__ __forceinline__ void fetch(const PersistentBackward& p, const Memory& shared,
                                        int k) const {
    for (int i = threadIdx.x; i < rows * kStreams * kWideWarps; i += kWideThreads) {
      const int section = i % kWideWarps, line = i / kWideWarps, stream = line % kStreams;
      const int local_row = line / kStreams;
      const int last = shared.last[local_row];
      if (last >= 0)
        copy_async_16(shared_address(&shared.streams[0][0][0]) + line * kLineBytes +
                          (section ^ (local_row & 7)) * 16,
                      static_cast<const T*>(p.coefficients) +
                          (int64_t{last - k} * kStreams + stream) * kWideHidden + block_unit0 +
                          section * 8);
    }
    const int grad_pieces = grad_float ? 2 : 1, grad_shift = grad_float ? 1 : 0;  // of 8 units
    for (int i = threadIdx.x; i < rows * kWideWarps * grad_pieces; i += kWideThreads) {
      const int piece = i & grad_shift, section = (i >> grad_shift) % kWideWarps;
      const int local_row = (i >> grad_shift) / kWideWarps;
      const RowStream& row = shared.grad_rows[local_row];
      if (row.has(k) && section * 8 < block_units)
        copy_async_16(
            shared_address(&shared.grad[0][0]) +
                ((local_row * kWideWarps + (section ^ (local_row & 7))) * grad_pieces + piece) * 16,
            row.at(k) + (section * grad_pieces + piece) * 16);
    }
    copy_async_commit();
  }

  // Of tile j's row. q and V, which are needed later, apart.
  __device__ __forceinline__ Input load(int j) const {
    const uint32_t grad = grad_load + j * grad_tile_bytes;
    Input x;
    x.k_a = unpack_pair<T>(load_coefficient(j, 0));
    x.k_z = unpack_pair<T>(load_coefficient(j, 1));
    x.complement = unpack_pair<T>(load_coefficient(j, 2));
    x.grad_h = grad_float ? load_float2(grad) : unpack_pair<T>(load_uint(grad));
    return x;
  }
  __device__ __forceinline__ float2 load_q(int j) const {
    return unpack_pair<T>(load_coefficient(j, 3));
  }
  __device__ __forceinline__ uint32_t load_packed_v(int j) const { return load_coefficient(j, 4); }
  __device__ __forceinline__ uint32_t load_coefficient(int j, int stream) const {
    return load_uint(coefficient_load + j * kInputTileBytes + stream * kLineBytes);
  }
};

// dwx of the block: the product's other operand, in shared memory.
template <class T>
struct BlockDwx {
  int tiles;
  uint32_t store_address;

  template <bool kLayerNorm>
  __device__ __forceinline__ BlockDwx(const WideLane& at, int tiles,
                                      const Shared<kLayerNorm>& shared)
      : tiles(tiles) {
    store_address = shared_address(
        &shared.operand[0][(at.warp * 2 + at.c / 2) * kCoreBytes + at.g * 16 + at.c % 2 * 8]);
  }

  __device__ __forceinline__ void store(int j, float2 a, float2 z) const {
    store_uint2(store_address + j * kOperandTileBytes, OperandTraits<T>::pack(a.x, a.y),
                OperandTraits<T>::pack(z.x, z.y));
  }
  // Stores it in pieces of 4 units of a row: 8 rows by 4 pieces a warp.
  template <bool kLayerNorm>
  __device__ __forceinline__ void write(const PersistentBackward& p, const WideLane& at,
                                        int block_units, const Shared<kLayerNorm>& shared,
                                        int k) const {
    for (int i = at.warp; i < 4 * tiles; i += kWideWarps) {
      const int last = shared.last[i / 4 * 8 + at.lane % 8];
      const int octet = i % 4 * 4 + at.lane / 8;
      const uint4 x = load_uint4(shared_address(&shared.operand[0][0]) + i / 4 * kOperandTileBytes +
                                 octet * kCoreBytes + at.lane % 8 * 16);
      if (last >= 0 && octet * 4 < block_units) {
        uint16_t* output = static_cast<uint16_t*>(p.dwx_rows) +
                           int64_t{last - k} * 2 * kWideHidden + at.block_unit0 + octet * 4;
        *reinterpret_cast<uint2*>(output) = make_uint2(x.x, x.z);
        *reinterpret_cast<uint2*>(output + kWideHidden) = make_uint2(x.y, x.w);
      }
    }
  }
};

// m2 of every row, and from it the factors of what a step adds to the carries. See add_row_sums():
// whose m2 a lane sums. Without a norm an empty message takes the place of m2.
template <bool kLayerNorm>
struct M2Sum {
  using Memory = Shared<kLayerNorm>;

  Arrival arrival;
  int norm_rows;
  bool stores_term, stores_factors, stores_m2;
  int local_row;
  int rho_last;  // index of k = 0
  uint32_t term_store, factor_load;
  float inverse_size;

  __device__ __forceinline__ M2Sum(const PersistentBackward& p, const WideLane& at,
                                   const Arrival& arrival, int norm_rows, int tiles,
                                   const Memory& shared)
      : arrival(arrival), norm_rows(norm_rows), stores_term(at.c == 0) {
    local_row = at.warp * kManyTiles + at.lane % 8;
    stores_factors = at.lane % 8 < kManyTiles && local_row < 8 * tiles && at.lane < 8;
    const Row row = locate_row(p.layer, at.row0, local_row, p.choice.rows);
    stores_m2 = kLayerNorm && at.rank == 0 && at.lane < kManyTiles && row.valid;
    rho_last = static_cast<int>(row.index * p.layer.time + row.time_of(p.first + p.count - 1));
    term_store = shared_address(&shared.m2.of_warps[at.warp][at.g]);
    factor_load = shared_address(&shared.factors[at.g]);
    inverse_size = 1.f / static_cast<float>(2 * static_cast<int>(p.layer.hidden));
  }

  // The sum over the lanes of tile j's row.
  __device__ __forceinline__ void store_term(int j, float term) const {
    term = add_lane_xor(add_lane_xor(term, 1), 2);
    if (stores_term) store_float(term_store + 32 * j, term);
  }
  __device__ __forceinline__ void send(uint32_t rank, const Memory& shared) const {
    send_row_sums(shared.m2, norm_rows, rank, arrival.barrier);
  }
  __device__ __forceinline__ void receive(const PersistentBackward& p, Memory& shared, int k) {
    arrival.receive(0, k & 1);
    if constexpr (kLayerNorm) {
      const float m2 = add_row_sums(shared.m2) * inverse_size;
      const int table_row = min(local_row, kManyRows - 1);
      float rho = 0.f;
      if (shared.grad_rows[table_row].has(k))
        rho = p.rho[rho_last + k * shared.rho_steps[table_row]];
      if (stores_factors) shared.factors[local_row] = make_float2(rho, -rho * m2);
      if (stores_m2) p.m2[shared.last[local_row] - k] = m2;
    }
  }
  // rho, -rho m2 of tile j's row.
  __device__ __forceinline__ float2 load_factors(int j) const {
    return load_float2(factor_load + 64 * j);
  }
};

// The messages of partial carries, packed in the operand type. A tile of them: [units 16w...]
// [row % 2][row / 2][pair of units], the pairs of odd rows exchanged by 4 against bank conflicts.
template <class T>
struct PartialCarries {
  Arrival arrival;  // of a group of blocks
  int tiles, warpgroup;
  uint32_t send_address, receive_address;
  int odd_row;

  template <bool kLayerNorm>
  __device__ __forceinline__ PartialCarries(const WideLane& at, const Arrival& arrival, int tiles,
                                            int warpgroup, const Shared<kLayerNorm>& shared)
      : arrival(arrival), tiles(tiles), warpgroup(warpgroup) {
    const int warp = at.warp, g = at.g, c = at.c;
    send_address = shared_address(&shared.partial[0][warp % 4 * 256 + c * 32 + g * 4]);
    odd_row = 128 + ((g ^ 4) - g) * 4;
    receive_address =
        shared_address(&shared.partial[0][warp / 2 * 256 + (g & 1) * 128 + (g >> 1) * 32 +
                                          ((4 * (warp & 1) + c) ^ (4 * (g & 1))) * 4]);
  }

  // Target i's.
  __device__ __forceinline__ void send(uint32_t rank, int i, const float (&sums)[kSums]) const {
    const uint32_t slot = 2 * i + warpgroup;
    const uint32_t target = rank ^ slot;
    const uint32_t barrier = remote_address(arrival.barrier_of(slot / kGroupSlots), target);
    const uint32_t to = remote_address(send_address + slot * kSlotBytes, target);
#pragma unroll
    for (int j = 0; j < kManyTiles; j++) {
      if (j >= tiles) break;
      sb_fast_sligru::send(to + j * kTileBytes, barrier,
                           OperandTraits<T>::pack(sums[4 * j], sums[4 * j + 2]));
      sb_fast_sligru::send(to + j * kTileBytes + odd_row, barrier,
                           OperandTraits<T>::pack(sums[4 * j + 1], sums[4 * j + 3]));
    }
  }
  // received += Uc^T (gamma dwx) of every tile's row.
  __device__ __forceinline__ void receive(int k, float2 (&received)[kManyTiles]) const {
#pragma unroll
    for (int n = 0; n < kGroups; n++) {
      arrival.receive(n, k & 1);
#pragma unroll
      for (int j = 0; j < kManyTiles; j++) {
#pragma unroll
        for (int i = 0; i < kGroupSlots; i++)
          received[j] = received[j] +
                        unpack_pair<T>(load_uint(
                            receive_address + (n * kGroupSlots + i) * kSlotBytes + j * kTileBytes));
      }
    }
  }
};

template <class T, bool kLayerNorm>
__global__ void __launch_bounds__(kWideThreads, 1)
    backward_many_kernel(const __grid_constant__ PersistentBackward p) {
#if SB_FAST_SLIGRU_HAS_WARPGROUPS
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kLayerNorm>*>(shared_bytes);
  __shared__ alignas(8) uint64_t barriers[kGroups + 1];

  const int hidden_size = static_cast<int>(p.layer.hidden), count = static_cast<int>(p.count);
  const int rows = p.choice.rows, tiles = (rows + 7) / 8, norm_rows = kLayerNorm ? 8 * tiles : 0;
  WideLane at(hidden_size, rows);
  const int begin = begin_step(p, at.row0);
  if (begin == count) return;

  const Arrival carry_arrival = {shared_address(&barriers[0]),
                                 static_cast<uint32_t>(kGroupSlots * tiles * kTileBytes)};
  const Arrival m2_arrival = {shared_address(&barriers[kGroups]), row_sums_traffic(norm_rows)};
  if (threadIdx.x <= kGroups) mbarrier::init(carry_arrival.barrier_of(threadIdx.x));
  mbarrier::fence_init();
  // All of it zero, which stays so where units or rows are padding.
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(shared)) / 4; i += kWideThreads)
    reinterpret_cast<uint32_t*>(shared_bytes)[i] = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int n = 0; n < kGroups; n++) carry_arrival.expect(n);
    m2_arrival.expect(0);
  }

  const Weights<T> weights(p, at, shared);
  Streams<T, kLayerNorm> streams(p, at, shared);
  __syncthreads();  // the tables
  streams.fetch(p, shared, begin);

  float2 carry[kManyTiles];
#pragma unroll
  for (int j = 0; j < kManyTiles; j++)
    carry[j] =
        at.in_range
            ? *reinterpret_cast<const float2*>(
                  p.carry +
                  int64_t{locate_row(p.layer, at.row0, 8 * j + at.g, rows).index} * hidden_size +
                  at.unit)
            : make_float2(0.f, 0.f);

  BlockDwx<T> block_dwx(at, tiles, shared);
  PartialCarries<T> partial_carries(at, carry_arrival, tiles, weights.warpgroup, shared);
  M2Sum<kLayerNorm> m2_sum(p, at, m2_arrival, norm_rows, tiles, shared);
  pin(m2_sum.inverse_size), pin(streams.coefficient_load), pin(streams.grad_load);
  pin(block_dwx.store_address), pin(partial_carries.receive_address);
  pin(m2_sum.term_store), pin(m2_sum.factor_load);
  fence_async();
  copy_async_wait<0>();
  __syncthreads();
  cluster_barrier();

#pragma unroll 1
  for (int k = begin; k < count; k++) {
    uint32_t v[kManyTiles];
#pragma unroll
    for (int j = 0; j < kManyTiles; j++) {
      const auto now = streams.load(j);
      const float2 d = now.grad_h + carry[j];
      block_dwx.store(j, d * now.k_a, d * now.k_z);
      carry[j] = times_z(d, now.complement);
      if constexpr (kLayerNorm) {
        const float2 q = streams.load_q(j);
        v[j] = streams.load_packed_v(j);
        m2_sum.store_term(j, fmaf(d.x, q.x, d.y * q.y));
      }
    }
    fence_async();
    __syncthreads();
    asm volatile("" : "+r"(at.rank));  // or the addresses of all sends would be kept in registers

    m2_sum.send(at.rank, shared);
#pragma unroll
    for (int i = 0; i < kTargets; i++) {
      float sums[kSums];
      weights.begin_product(sums, i);
      // In the shadow of the product; not of the first, which the hop of m2 shadows.
      if (i == 1 && k + 1 < count) streams.fetch(p, shared, k + 1);
      if (i == 2) block_dwx.write(p, at, streams.block_units, shared, k);
      if (i == 0) {
        m2_sum.receive(p, shared, k);
        __syncthreads();  // all have read the sums for m2: see Buffers
      }
      warpgroup_finish(sums);
      partial_carries.send(at.rank, i, sums);
    }
    copy_async_wait<0>();
    __syncthreads();

    float2 received[kManyTiles] = {};
    partial_carries.receive(k, received);
#pragma unroll
    for (int j = 0; j < kManyTiles; j++) {
      if constexpr (kLayerNorm) {
        const float2 factors = m2_sum.load_factors(j);
        carry[j] = add_scaled(add_scaled(carry[j], factors.x, received[j]), factors.y,
                              unpack_pair<T>(v[j]));
      } else {
        carry[j] = carry[j] + received[j];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kManyTiles; j++) {
    const Row row = locate_row(p.layer, at.row0, 8 * j + at.g, rows);
    if (at.in_range && row.valid)
      *reinterpret_cast<float2*>(p.carry + int64_t{row.index} * hidden_size + at.unit) = carry[j];
  }
  cluster_barrier();
#endif
}

template <class T>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  const auto kernel =
      p.layer.layer_norm ? backward_many_kernel<T, true> : backward_many_kernel<T, false>;
  const int bytes = p.layer.layer_norm ? sizeof(Shared<true>) : sizeof(Shared<false>);
  const ClusterKernel<PersistentBackward> in_clusters = {kernel, kWideCluster, kWideThreads, bytes};
  return in_clusters.run(p.choice.groups(p.layer.rows()), p, stream);
}

}  // namespace

cudaError_t run_backward_many(const PersistentBackward& p, cudaStream_t stream) {
  return p.layer.operand_type == DType::kBFloat16 ? launch<__nv_bfloat16>(p, stream)
                                                  : launch<__half>(p, stream);
}

}  // namespace sb_fast_sligru
