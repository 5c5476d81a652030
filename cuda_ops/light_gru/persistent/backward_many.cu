// The backward recurrence of backward_narrow.cu for many rows at 512 < H <= 1024: same
// equations, same exchange, up to 40 rows a cluster (why: forward_many.cu).
//
// Lane (g, c) of warp w computes units 8w + 2c, 8w + 2c + 1 of its block for row 8j + g of every
// tile j. dwx of the block is an operand in shared memory; k counts its 128 values of a row as 16
// octets of 4 units: a0 a1 z0 z1 a2 a3 z2 z3. Warpgroup v multiplies it by Uc^T for the 64 units of
// the 8 blocks rank ^ (2i + v), one block at a time: row m of warp w's 16 is unit 2 (m % 8) + m /
// 8, so that a lane holds pairs of neighbouring units, which it packs and sends.
//
// Buffers (see exchange.cuh): one of each. The sums for m2 double as the proof that a block has
// read the partial carries of the step before, and without a norm a word takes their place; a block
// sends partial carries only when those of all blocks are there. They prove, in turn, that it has
// read the sums: any one block gets them from one of its warpgroups only, so both meet between
// their reads and the first send.
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/many.cuh"

namespace sb_fast_sligru {
namespace {

constexpr int kSharedFragments = 24;
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
  int last[kManyRows];  // row by row, the chunk's last step; -1 for a row the cluster lacks
};

static_assert(sizeof(Shared<true>) <= kManySharedBytes);

template <class T, bool kLayerNorm>
__global__ void __launch_bounds__(kWideThreads, 1)
    backward_many_kernel(const __grid_constant__ PersistentBackward p) {
#if SB_FAST_SLIGRU_HAS_WARPGROUPS
  using Split = FragmentSplit<kSharedFragments>;
  constexpr int kStreams = kCoefficientStreams<kLayerNorm>;
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kLayerNorm>*>(shared_bytes);
  __shared__ alignas(8) uint64_t barriers[kGroups + 1];

  const Recurrence& layer = p.layer;
  const int hidden_size = static_cast<int>(layer.hidden), count = static_cast<int>(p.count);
  const int rows = p.choice.rows, tiles = (rows + 7) / 8;
  const auto* ln_weight = static_cast<const float*>(layer.ln_weight);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  uint32_t rank = cluster_rank();
  const int row0 = static_cast<int>(blockIdx.x / kWideCluster) * rows;
  const int block_unit0 = static_cast<int>(rank) * kWideUnits;
  const int unit = block_unit0 + warp * 8 + 2 * c;  // and unit + 1
  const bool in_range = unit < hidden_size;
  const auto locate = [&](int local_row) { return locate_row(layer, row0, local_row, rows); };

  const uint32_t carry_barrier = shared_address(&barriers[0]);
  const uint32_t m2_barrier = shared_address(&barriers[kGroups]);
  const uint32_t group_traffic = kGroupSlots * tiles * kTileBytes;
  const int norm_rows = kLayerNorm ? 8 * tiles : 0;
  const uint32_t m2_traffic = row_sums_traffic(norm_rows);
  if (threadIdx.x <= kGroups) mbarrier::init(carry_barrier + 8 * threadIdx.x);
  mbarrier::fence_init();
  // All of it zero, which stays so where units or rows are padding.
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(shared)) / 4; i += kWideThreads)
    reinterpret_cast<uint32_t*>(shared_bytes)[i] = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int n = 0; n < kGroups; n++) mbarrier::expect(carry_barrier + 8 * n, group_traffic);
    mbarrier::expect(m2_barrier, m2_traffic);
  }

  // Uc^T with gamma folded in. Fragment 8i + j: block rank ^ (2i + warpgroup), octets 2j, 2j + 1.
  uint32_t weights[Split::kInRegisters][4];
  const int warpgroup = __shfl_sync(0xffffffffu, warp / 4, 0);
#pragma unroll
  for (int f = 0; f < kWideFragments; f++) {
    const int target = static_cast<int>(rank ^ (f / kTargetFragments * 2 + warpgroup));
    const int column = target * kWideUnits + warp % 4 * 16 + 2 * g;
    uint32_t a[4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {  // lane c: gate c % 2 of the octet's units 2 (c / 2)...
      const int row = block_unit0 + (f % kTargetFragments * 2 + half) * 4 + c / 2 * 2;
      if (row < hidden_size && column < hidden_size) {
        const int output = c % 2 * hidden_size + row;
        const T* u = static_cast<const T*>(p.u) + int64_t{output} * hidden_size + column;
        float2 low = unpack_pair<T>(*reinterpret_cast<const uint32_t*>(u));
        float2 high = unpack_pair<T>(*reinterpret_cast<const uint32_t*>(u + hidden_size));
        if (kLayerNorm && ln_weight != nullptr) {
          const float2 gamma = *reinterpret_cast<const float2*>(ln_weight + output);
          low.x *= gamma.x, low.y *= gamma.x, high.x *= gamma.y, high.y *= gamma.y;
        }
        a[2 * half] = OperandTraits<T>::pack(low.x, high.x);
        a[2 * half + 1] = OperandTraits<T>::pack(low.y, high.y);
      }
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
  const Matrix operand_matrix(shared_address(&shared.operand[0][0]), kCoreBytes, kOperandTileBytes);

  const Sequence grad_h = {p.grad_h, layer.output_type, p.grad_h_batch_stride,
                           p.grad_h_time_stride};
  const bool grad_float = grad_h.is_float();
  for (int i = threadIdx.x; i < kManyRows; i += kWideThreads) {  // step k of a row: from the last
    const Row row = locate(i);
    shared.last[i] = row.valid ? (row.index + 1) * count - 1 : -1;
    shared.grad_rows[i] = {row.valid ? grad_h.at(layer, row, p.first + count - 1,
                                                 row.direction * hidden_size + block_unit0)
                                     : nullptr,
                           -grad_h.step_bytes(row)};
  }
  const int block_units = min(hidden_size - block_unit0, kWideUnits);  // maybe negative

  // The streams of one step in pieces of 16 bytes, whole 128-byte lines; sections of 8 units
  // permuted by row against bank conflicts.
  const int grad_bytes = grad_h.bytes(), grad_pieces = grad_float ? 2 : 1;  // of 8 units
  const int grad_shift = grad_float ? 1 : 0;
  const auto fetch = [&](int k) {
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
    for (int i = threadIdx.x; i < rows * kWideWarps * grad_pieces; i += kWideThreads) {
      const int piece = i & grad_shift, section = (i >> grad_shift) % kWideWarps;
      const int local_row = (i >> grad_shift) / kWideWarps;
      const RowStream& row = shared.grad_rows[local_row];
      if (row.data != nullptr && section * 8 < block_units)
        copy_async_16(
            shared_address(&shared.grad[0][0]) +
                ((local_row * kWideWarps + (section ^ (local_row & 7))) * grad_pieces + piece) * 16,
            row.at(k) + (section * grad_pieces + piece) * 16);
    }
    copy_async_commit();
  };
  __syncthreads();  // the tables
  fetch(0);

  // dwx is stored in pieces of 4 units of a row: 8 rows by 4 pieces a warp.
  const auto store_dwx = [&](int k) {
    for (int i = warp; i < 4 * tiles; i += kWideWarps) {
      const int last = shared.last[i / 4 * 8 + lane % 8];
      const int octet = i % 4 * 4 + lane / 8;
      const uint4 x = load_uint4(shared_address(&shared.operand[0][0]) + i / 4 * kOperandTileBytes +
                                 octet * kCoreBytes + lane % 8 * 16);
      if (last >= 0 && octet * 4 < block_units) {
        uint16_t* output = static_cast<uint16_t*>(p.dwx_rows) +
                           int64_t{last - k} * 2 * kWideHidden + block_unit0 + octet * 4;
        *reinterpret_cast<uint2*>(output) = make_uint2(x.x, x.z);
        *reinterpret_cast<uint2*>(output + kWideHidden) = make_uint2(x.y, x.w);
      }
    }
  };

  float2 carry[kManyTiles];
#pragma unroll
  for (int j = 0; j < kManyTiles; j++)
    carry[j] = in_range ? *reinterpret_cast<const float2*>(
                              p.carry + int64_t{locate(8 * j + g).index} * hidden_size + unit)
                        : make_float2(0.f, 0.f);

  uint32_t stream_load = shared_address(&shared.streams[g][0][(warp ^ g) * 16 + 4 * c]);
  uint32_t grad_load =
      shared_address(&shared.grad[0][0]) + ((g * kWideWarps + (warp ^ g)) * 8 + 2 * c) * grad_bytes;
  const uint32_t grad_tile_bytes = 8 * kWideUnits * grad_bytes;
  uint32_t operand_store =
      shared_address(&shared.operand[0][(warp * 2 + c / 2) * kCoreBytes + g * 16 + c % 2 * 8]);
  // A tile of partial carries: [units 16w...][row % 2][row / 2][pair of units], the pairs of odd
  // rows exchanged by 4 against bank conflicts.
  uint32_t carry_send = shared_address(&shared.partial[0][warp % 4 * 256 + c * 32 + g * 4]);
  const int odd_row = 128 + ((g ^ 4) - g) * 4;
  uint32_t carry_receive =
      shared_address(&shared.partial[0][warp / 2 * 256 + (g & 1) * 128 + (g >> 1) * 32 +
                                        ((4 * (warp & 1) + c) ^ (4 * (g & 1))) * 4]);
  // See add_row_sums(): whose m2 the lane sums.
  const int m2_local_row = warp * kManyTiles + lane % 8;
  const bool sums_m2 = lane % 8 < kManyTiles && m2_local_row < 8 * tiles;
  const Row m2_row = locate(m2_local_row);
  const bool stores_m2 = kLayerNorm && rank == 0 && lane < kManyTiles && m2_row.valid;
  const int64_t m2_last = (int64_t{m2_row.index} + 1) * count - 1;
  const float* rho_input = nullptr;
  if (kLayerNorm)
    rho_input =
        p.rho + m2_row.index * layer.time + layer.time_of(m2_row.index, p.first + count - 1);
  const int rho_step = m2_row.direction ? 1 : -1;
  uint32_t term_store = shared_address(&shared.m2.of_warps[warp][g]);
  uint32_t factor_load = shared_address(&shared.factors[g]);
  float inverse_size = 1.f / static_cast<float>(2 * hidden_size);
  pin(inverse_size), pin(stream_load), pin(grad_load), pin(operand_store), pin(carry_receive);
  pin(term_store), pin(factor_load);
  fence_async();
  copy_async_wait<0>();
  __syncthreads();
  cluster_barrier();

#pragma unroll 1
  for (int k = 0; k < count; k++) {
    uint32_t v[kManyTiles];
#pragma unroll
    for (int j = 0; j < kManyTiles; j++) {
      const uint32_t from = stream_load + j * 8 * sizeof(shared.streams[0]);
      const float2 k_a = unpack_pair<T>(load_uint(from));
      const float2 k_z = unpack_pair<T>(load_uint(from + kLineBytes));
      const float2 complement = unpack_pair<T>(load_uint(from + 2 * kLineBytes));
      const float2 grad = grad_float ? load_float2(grad_load + j * grad_tile_bytes)
                                     : unpack_pair<T>(load_uint(grad_load + j * grad_tile_bytes));
      const float2 d = make_float2(grad.x + carry[j].x, grad.y + carry[j].y);
      store_uint2(operand_store + j * kOperandTileBytes,
                  OperandTraits<T>::pack(d.x * k_a.x, d.y * k_a.y),
                  OperandTraits<T>::pack(d.x * k_z.x, d.y * k_z.y));
      carry[j] = make_float2(fmaf(-complement.x, d.x, d.x), fmaf(-complement.y, d.y, d.y));
      if constexpr (kLayerNorm) {
        const float2 q = unpack_pair<T>(load_uint(from + 3 * kLineBytes));
        v[j] = load_uint(from + 4 * kLineBytes);
        const float term = add_lane_xor(add_lane_xor(fmaf(d.x, q.x, d.y * q.y), 1), 2);
        if (c == 0) store_float(term_store + 32 * j, term);
      }
    }
    fence_async();
    __syncthreads();
    asm volatile("" : "+r"(rank));  // or the addresses of all sends would be kept in registers

    send_row_sums(shared.m2, norm_rows, rank, m2_barrier);

#pragma unroll
    for (int i = 0; i < kTargets; i++) {
      float sums[kSums];
      warpgroup_begin();
#pragma unroll
      for (int j = 0; j < kTargetFragments; j++) {
        const int f = i * kTargetFragments + j;
        const uint64_t b = operand_matrix.at(j * 2 * kCoreBytes);
        if (Split::is_shared(f))
          warpgroup_multiply<T>(
              sums, weight_matrix.at(Split::shared_before(f) * sizeof(shared.fragments[0])), b,
              j > 0);
        else
          warpgroup_multiply<T>(sums, weights[Split::register_index(f)], b, j > 0);
      }
      // In the shadow of the product; not of the first, which the hop of m2 shadows.
      if (i == 1 && k + 1 < count) fetch(k + 1);
      if (i == 2) store_dwx(k);
      if (i == 0) {
        mbarrier::wait(m2_barrier, k & 1);
        if (threadIdx.x == 0) mbarrier::expect(m2_barrier, m2_traffic);
        if constexpr (kLayerNorm) {
          const float m2 = add_row_sums(shared.m2) * inverse_size;
          const float rho = *rho_input;
          rho_input += rho_step;
          if (sums_m2 && lane < 8) shared.factors[m2_local_row] = make_float2(rho, -rho * m2);
          if (stores_m2) p.m2[m2_last - k] = m2;
        }
        __syncthreads();  // all have read the sums for m2: see Buffers
      }
      warpgroup_finish(sums);
      const uint32_t slot = 2 * i + warpgroup;
      const uint32_t target = rank ^ slot;
      const uint32_t barrier = remote_address(carry_barrier + 8 * (slot / kGroupSlots), target);
      const uint32_t to = remote_address(carry_send + slot * kSlotBytes, target);
#pragma unroll
      for (int j = 0; j < kManyTiles; j++) {
        if (j >= tiles) break;
        send(to + j * kTileBytes, barrier, OperandTraits<T>::pack(sums[4 * j], sums[4 * j + 2]));
        send(to + j * kTileBytes + odd_row, barrier,
             OperandTraits<T>::pack(sums[4 * j + 1], sums[4 * j + 3]));
      }
    }
    copy_async_wait<0>();
    __syncthreads();

    float2 received[kManyTiles] = {};
#pragma unroll
    for (int n = 0; n < kGroups; n++) {
      mbarrier::wait(carry_barrier + 8 * n, k & 1);
      if (threadIdx.x == 0) mbarrier::expect(carry_barrier + 8 * n, group_traffic);
#pragma unroll
      for (int j = 0; j < kManyTiles; j++) {
#pragma unroll
        for (int i = 0; i < kGroupSlots; i++) {
          const float2 x = unpack_pair<T>(
              load_uint(carry_receive + (n * kGroupSlots + i) * kSlotBytes + j * kTileBytes));
          received[j].x += x.x;
          received[j].y += x.y;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kManyTiles; j++) {
      if constexpr (kLayerNorm) {
        const float2 factor = load_float2(factor_load + 64 * j), value = unpack_pair<T>(v[j]);
        carry[j].x = fmaf(factor.y, value.x, fmaf(factor.x, received[j].x, carry[j].x));
        carry[j].y = fmaf(factor.y, value.y, fmaf(factor.x, received[j].y, carry[j].y));
      } else {
        carry[j].x += received[j].x;
        carry[j].y += received[j].y;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kManyTiles; j++) {
    const Row row = locate(8 * j + g);
    if (in_range && row.valid)
      *reinterpret_cast<float2*>(p.carry + int64_t{row.index} * hidden_size + unit) = carry[j];
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
  return in_clusters.run(p.choice.clusters(p.layer.rows()), p, stream);
}

}  // namespace

cudaError_t run_backward_many(const PersistentBackward& p, cudaStream_t stream) {
  return p.layer.operand_type == DType::kBFloat16 ? launch<__nv_bfloat16>(p, stream)
                                                  : launch<__half>(p, stream);
}

}  // namespace sb_fast_sligru
