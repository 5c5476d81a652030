// The backward recurrence of backward_wide.cu in float32: same equations, same reduce-scatter, same
// division of the work. The operands are pairs of float16 (wide_float.cuh).
//
//   Scale of dwx. Gradients may have any magnitude, float16 has not: every row of dwx is scaled in
//     every block by a power of two of its own, and the partial carries, which travel as float, are
//     scaled back before they are sent.
//   Buffers. m2 is sent early in a step, after a __syncthreads that follows the block's last read
//     of the partial carries of the step before; no block sends partial carries before it has the
//     m2 of all. One buffer of carries is therefore enough. Li-GRU, which has no m2, sends an empty
//     one. Of m2 there are two, in turn: the carries that let a block go on come from one warp of
//     each block, whose other warps may not have read m2 yet; those of the next step come after a
//     __syncthreads. Of the block's own terms of m2 there are two as well: a __syncthreads of the
//     step between then stands between their reads and the next writes.
//   Coefficients go from global memory, ahead of time into L2, straight to the lanes that use them.
//
// One step:
//   d = grad_h + carry -> dwx; its maximum and the term of m2 of every row, over the block
//   -> scale -> dwx, split, to the block's warps -> store dwx, prefetch the next step's inputs
//   -> product, of dwx and the block's rows of Uc, batch by batch; meanwhile: send m2 to all blocks
//   -> wait for m2, sum over blocks -> send the partial carries of each item after its batches
//   -> load the next step's inputs -> wait for the partial carries, sum over blocks -> carry
#include "light_gru/persistent/backward_stages.cuh"
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/wide_float.cuh"

namespace sb_fast_sligru {
namespace {

constexpr int kItems = 4;                           // of a warp: 32 units of one block each
constexpr int kItemBatches = kBatches / kItems;     // a batch: one k-tile, two tiles
constexpr int kPieceBytes = 16;                     // 4 units of one row
constexpr int kSenderBytes = 4 * 32 * kPieceBytes;  // [half][row parity][lane]
constexpr uint32_t kCarryTraffic = kWideCluster * kSenderBytes;
constexpr uint32_t kM2Traffic = kWideCluster * kWideRows * sizeof(float);
constexpr int kOperandBytes = kWideRows * 4 * 16;  // of a warp's dwx

using Place = Placement<54, 38, 9, 5>;

struct Shared {
  alignas(1024) uint8_t partial[kWideCluster][kSenderBytes];
  uint8_t fragments[Place::kShared][kWideWarps][kFragmentBytes];
  uint8_t streamed[Place::kRing][kWideWarps][kFragmentBytes];
  uint8_t operand[kWideWarps][kOperandBytes];  // dwx: [warp][row][c][high a z, low a z]
  float m2_sums[2][kWideCluster][kWideRows];
  float m2_terms[2][kWideRows][kWideWarps];
  float maxima[kWideRows][kWideWarps];
  uint64_t barriers[2];
};

#if SB_FAST_SLIGRU_HAS_CLUSTERS
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

__device__ __forceinline__ float2 load_global_float2(const char* from) {
  float2 x;
  asm volatile("ld.global.L1::no_allocate.v2.f32 {%0, %1}, [%2];"
               : "=f"(x.x), "=f"(x.y)
               : "l"(from));
  return x;
}

// The largest magnitude.
__device__ __forceinline__ float largest_of(float2 x, float2 y) {
  return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(y.x), fabsf(y.y)));
}

// The coefficients, grad_h and rho of every step: of the lane's row and units, in registers.
template <bool kLayerNorm>
struct Streams {
  static constexpr int kStreams = kCoefficientStreams<kLayerNorm>;
  static constexpr int kStreamBytes = kWideHidden * 4, kStepBytes = kStreams * kStreamBytes;

  int count;
  int entry;  // the step from which on there are grad_h and rho
  const char* coefficients;
  Stream grad_h;
  const float* rhos = nullptr;
  int rho_step;
  bool in_range, prefetches;
  StepInput<float2, kLayerNorm> next;

  __device__ __forceinline__ Streams(const PersistentBackward& p, const WideLane& at,
                                     const Row& row, int begin)
      : count(static_cast<int>(p.count)), entry(entry_step(p, row)), in_range(at.in_range) {
    const Sequence grads = {p.grad_h, DType::kFloat32, p.grad_h_batch_stride, p.grad_h_time_stride};
    coefficients =
        coefficient_stream<float, kStreams, kWideHidden>(p, row, begin, 0, at.unit).source;
    grad_h = grad_h_stream(p, grads, row, begin, at.unit);
    if (kLayerNorm) rhos = reinterpret_cast<const float*>(rho_stream(p, row, begin).source);
    rho_step = row.direction ? 1 : -1;
    prefetches = at.warp % 4 == 0 && at.c == 0;
  }

  // Loads `next` and moves on to the step after it, k.
  __device__ __forceinline__ void load(int k) {
#pragma unroll
    for (int i = 0; i < kStreams; i++)
      next.coefficients[i] = load_global_float2(coefficients + i * kStreamBytes);
    if (in_range && k > entry) next.grad_h = load_global_float2(grad_h.source);
    if (kLayerNorm) next.rho = k > entry ? *rhos : 0.f;
    if (k < count) {
      coefficients -= kStepBytes;
      grad_h.source += grad_h.step;
      if (kLayerNorm) rhos += rho_step;
    }
  }
  // What load() will load, step k, into L2. One lane for each line of 128 bytes: 4 warps share it.
  __device__ __forceinline__ void prefetch(int k) const {
    if (!prefetches) return;
#pragma unroll
    for (int i = 0; i < kStreams; i++) sb_fast_sligru::prefetch(coefficients + i * kStreamBytes);
    if (in_range && k >= entry) sb_fast_sligru::prefetch(grad_h.source);
    if (kLayerNorm) sb_fast_sligru::prefetch(rhos);
  }
};

// What the warps of a block tell each other about every row: the largest dwx and the terms of m2.
template <bool kLayerNorm>
struct RowTerms {
  static constexpr uint32_t kMaxima = sizeof(Shared::m2_terms);  // from m2_terms to maxima
  static constexpr uint32_t kTermsBytes = sizeof(Shared::m2_terms) / 2;

  uint32_t store_address, sum_address, maximum_address;
  bool stores;

  __device__ __forceinline__ RowTerms(const WideLane& at, const Shared& shared)
      : store_address(shared_address(&shared.m2_terms[0][at.g][at.warp])),
        sum_address(shared_address(&shared.m2_terms[0][at.lane & 7][0])),
        maximum_address(shared_address(&shared.maxima[at.g][0])),
        stores(at.c == 0) {}

  __device__ __forceinline__ void store(uint32_t parity, float largest, float term) const {
    largest = max_lane_xor(max_lane_xor(largest, 1), 2);
    if (kLayerNorm) term = add_lane_xor(add_lane_xor(term, 1), 2);
    if (stores) {
      store_float(store_address + kMaxima, largest);
      if (kLayerNorm) store_float(store_address + parity * kTermsBytes, term);
    }
  }
  // Of row g.
  __device__ __forceinline__ float load_maximum() const {
    const float4 x = load_float4(maximum_address), y = load_float4(maximum_address + 16);
    return fmaxf(fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)), fmaxf(fmaxf(y.x, y.y), fmaxf(y.z, y.w)));
  }
  // Of row lane % 8.
  __device__ __forceinline__ float load_sum(uint32_t parity) const {
    const uint32_t from = sum_address + parity * kTermsBytes;
    const float4 x = load_float4(from), y = load_float4(from + 16);
    return ((x.x + x.y) + (x.z + x.w)) + ((y.x + y.y) + (y.z + y.w));
  }
};

// m2: the sums of the blocks -> sums over the cluster. Every warp serves its own two blocks.
struct M2Sum {
  static constexpr uint32_t kBufferBytes = sizeof(Shared::m2_sums) / 2;

  Arrival arrival;
  uint32_t target, target_barrier, load_address;
  float inverse_size;

  __device__ __forceinline__ M2Sum(int hidden_size, const WideLane& at, const Shared& shared)
      : arrival{shared_address(&shared.barriers[1]), kM2Traffic} {
    const uint32_t target_rank = 2 * at.warp + ((at.lane >> 3) & 1);
    target = remote_address(shared_address(&shared.m2_sums[0][at.rank][at.lane & 7]), target_rank);
    target_barrier = remote_address(arrival.barrier, target_rank);
    load_address = shared_address(&shared.m2_sums[0][at.c][at.g]);
    inverse_size = 1.f / static_cast<float>(2 * hidden_size);
  }

  // By lanes 0..15: the sum of row lane % 8.
  __device__ __forceinline__ void send(uint32_t parity, float sum) const {
    sb_fast_sligru::send(target + parity * kBufferBytes, target_barrier, __float_as_uint(sum));
  }
  // m2 of the lane's row, once all blocks' messages are there.
  __device__ __forceinline__ float add(uint32_t parity) const {
    return add_m2<kWideCluster>(load_address + parity * kBufferBytes, kWideRows * sizeof(float),
                                inverse_size);
  }
};

// dwx of the block, which its warps exchange: each k-tile's part of the product's operand.
struct BlockDwx {
  uint32_t store_address, load_address;

  __device__ __forceinline__ BlockDwx(const WideLane& at, const Shared& shared)
      : store_address(shared_address(&shared.operand[at.warp][at.lane * 16])),
        load_address(shared_address(&shared.operand[0][at.lane * 16])) {}

  __device__ __forceinline__ void store(float2 dwx_a, float2 dwx_z, float scale) const {
    const SplitPair pair_a = split(dwx_a.x * scale, dwx_a.y * scale);
    const SplitPair pair_z = split(dwx_z.x * scale, dwx_z.y * scale);
    store_uint4(store_address, make_uint4(pair_a.high, pair_z.high, pair_a.low, pair_z.low));
  }
  __device__ __forceinline__ uint4 load(int k_tile) const {
    return load_uint4(load_address + k_tile * kOperandBytes);
  }
};

// The messages of partial carries. Item i: half i % 2 of the units of block first_target ^ (i / 2).
// Pieces of odd rows have their lanes exchanged by 2, against bank conflicts.
struct PartialCarries {
  Arrival arrival;
  uint32_t first_target;
  uint32_t send_address, receive_address;
  int odd_row;

  __device__ __forceinline__ PartialCarries(const WideLane& at, const Shared& shared)
      : arrival{shared_address(&shared.barriers[0]), kCarryTraffic} {
    const int g = at.g, c = at.c;
    first_target = 2 * at.warp + (at.rank & 1);
    send_address = shared_address(&shared.partial[at.rank][at.lane * kPieceBytes]);
    odd_row = 32 * kPieceBytes + ((at.lane ^ 2) - at.lane) * kPieceBytes;
    const int lane = ((2 * (at.warp & 3) + (c >> 1)) * 4 + (g >> 1)) ^ ((g & 1) * 2);
    receive_address = shared_address(
        &shared
             .partial[0][((at.warp >> 2) * 64 + (g & 1) * 32 + lane) * kPieceBytes + (c & 1) * 8]);
  }

  // sums, low_sums: of an item; [tile]. inverses: what undoes the scales, [row parity].
  __device__ __forceinline__ void send(int item, const float (&sums)[2][4],
                                       const float (&low_sums)[2][4],
                                       const float (&inverses)[2]) const {
    float out[2][4];  // [row parity][unit]
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int tile = 0; tile < 2; tile++)
        out[i % 2][2 * tile + i / 2] =
            fmaf(low_sums[tile][i], 1.f / kLowScale, sums[tile][i]) * inverses[i % 2];
    const uint32_t to = first_target ^ (item / 2);
    const uint32_t address = remote_address(send_address + item % 2 * 64 * kPieceBytes, to);
    const uint32_t barrier = remote_address(arrival.barrier, to);
#pragma unroll
    for (int i = 0; i < 2; i++)
      sb_fast_sligru::send(address + i * odd_row, barrier, __float_as_uint(out[i][0]),
                           __float_as_uint(out[i][1]), __float_as_uint(out[i][2]),
                           __float_as_uint(out[i][3]));
  }
  // Uc^T (gamma dwx) of the lane's row and units.
  __device__ __forceinline__ float2 receive(uint32_t parity) const {
    arrival.receive(0, parity);
    return add_partial_carries<kWideCluster>(
        [&](int i) { return load_float2(receive_address + i * kSenderBytes); });
  }
};

#endif  // SB_FAST_SLIGRU_HAS_CLUSTERS

template <bool kLayerNorm>
__global__ void __launch_bounds__(kWideThreads, 1)
    backward_wide_float_kernel(const __grid_constant__ PersistentBackward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  constexpr int kStreamBytes = kWideHidden * 4;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);

  const int hidden_size = static_cast<int>(p.layer.hidden), count = static_cast<int>(p.count);
  const WideLane at(hidden_size);
  const int begin = begin_step(p, at.row0);
  if (begin == count) return;
  PartialCarries partial_carries(at, shared);
  M2Sum m2_sum(hidden_size, at, shared);
  if (threadIdx.x < 2) mbarrier::init(partial_carries.arrival.barrier_of(threadIdx.x));
  mbarrier::fence_init();
  __syncthreads();
  if (threadIdx.x == 0) partial_carries.arrival.expect(0), m2_sum.arrival.expect(0);

  Fragments<Place> weights;
  weights.shared_address = shared_address(&shared.fragments[0][at.warp][at.lane * 16]);
  weights.ring_address = shared_address(&shared.streamed[0][at.warp][at.lane * 16]);
  weights.packed =
      static_cast<const char*>(p.u) + (at.rank * kWideWarps + at.warp) * kWarpBytes + at.lane * 16;
  float inverse_scale = reinterpret_cast<const float*>(
      static_cast<const char*>(p.u) + kScalesOffset)[at.rank * kWideWarps + at.warp];
  weights.load_kept();
  weights.request_first();

  RowTerms<kLayerNorm> row_terms(at, shared);
  BlockDwx block_dwx(at, shared);
  const Row row = locate_row(p.layer, at.row0 + at.g);
  Streams<kLayerNorm> streams(p, at, row, begin);
  streams.load(begin + 1);

  float2* state = reinterpret_cast<float2*>(p.carry + int64_t{row.index} * hidden_size + at.unit);
  float2 carry = at.in_range ? *state : make_float2(0.f, 0.f);
  const bool stored = row.valid && at.in_range;
  const int row_last = row_step_at(p, row, 0);
  char* output =
      static_cast<char*>(p.dwx_rows) + int64_t{row_last - begin} * 2 * kStreamBytes + at.unit * 4;
  const bool stores_m2 = kLayerNorm && at.rank == 0 && at.warp == 0 && at.c == 0 && row.valid;
  pin(m2_sum.inverse_size), pin(inverse_scale), pin(partial_carries.receive_address);
  pin(partial_carries.send_address), pin(block_dwx.store_address), pin(block_dwx.load_address);
  pin(row_terms.store_address), pin(row_terms.sum_address), pin(row_terms.maximum_address);
  pin(m2_sum.load_address), pin(partial_carries.first_target);
  pin(weights.shared_address), pin(weights.ring_address);
  pin(partial_carries.arrival.barrier), pin(m2_sum.arrival.barrier);
  cluster_barrier();

#pragma unroll 1
  for (int k = begin; k < count; k++) {
    const uint32_t parity = k & 1;
    const auto now = streams.next;
    const float2 d = now.grad_h + carry;
    const float2 dwx_a = d * now.k_a(), dwx_z = d * now.k_z();
    float2 own = times_z(d, now.complement()), v = make_float2(0.f, 0.f);
    float term = 0.f;
    if constexpr (kLayerNorm) {
      v = make_float2(now.rho * now.v().x, now.rho * now.v().y);
      term = fmaf(d.x, now.q().x, d.y * now.q().y);
    }
    row_terms.store(parity, largest_of(dwx_a, dwx_z), term);
    __syncthreads();

    const float scale = scale_for(row_terms.load_maximum());
    const float inverse = inverse_of(scale) * inverse_scale;
    // Of the rows whose sums this lane gets.
    const float inverses[2] = {__shfl_sync(0xffffffffu, inverse, 8 * at.c),
                               __shfl_sync(0xffffffffu, inverse, 8 * at.c + 4)};
    block_dwx.store(dwx_a, dwx_z, scale);
    __syncthreads();

    if (stored) {
      *reinterpret_cast<float2*>(output) = dwx_a;
      *reinterpret_cast<float2*>(output + kStreamBytes) = dwx_z;
    }
    output -= 2 * kStreamBytes;
    streams.prefetch(k + 1);

    float sums[2][4], low_sums[2][4];
    uint4 all_dwx[2];  // of a batch, of the next
    const auto stage = [&](int batch) {
      weights.stage(batch);
      all_dwx[batch % 2] = block_dwx.load(batch % kWideWarps);
    };
    stage(0);
#pragma unroll
    for (int batch = 0; batch < kBatches; batch++) {
      if (batch % kItemBatches == 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) sums[i / 4][i % 4] = low_sums[i / 4][i % 4] = 0.f;
      }
      if (batch + 1 < kBatches) stage(batch + 1);
      const uint4& b = all_dwx[batch % 2];
      weights.multiply_batch(sums[0], sums[1], low_sums[0], low_sums[1], batch,
                             make_uint2(b.x, b.y), make_uint2(b.z, b.w));
      weights.request(batch + Place::kAhead);
      if (batch == 0 && at.lane < 2 * kWideRows)
        m2_sum.send(parity, kLayerNorm ? row_terms.load_sum(parity) : 0.f);
      if (batch == kItemBatches - 1) {
        m2_sum.arrival.receive(0, parity);
        if constexpr (kLayerNorm) {
          const float m2 = m2_sum.add(parity);
          own = add_scaled(own, -m2, v);
          if (stores_m2) p.m2[row_last - k] = m2;
        }
      }
      if (batch == kBatches - 1) streams.load(k + 2);
      if (batch % kItemBatches == kItemBatches - 1)
        partial_carries.send(batch / kItemBatches, sums, low_sums, inverses);
    }
    carry = add_scaled(own, now.rho, partial_carries.receive(parity));
  }
  copy_async_wait<0>();
  if (stored) *state = carry;
  cluster_barrier();
#endif
}

// Uc^T with gamma folded in. Pair [item][k-tile][tile] of a warp; the lane's outputs are units
// 4g..4g+3 of the item (rows g and g + 8 of two tiles); k-tile k holds the 8 candidate and 8 gate
// rows of warp k.
__global__ void __launch_bounds__(kWideThreads)
    pack_backward_kernel(const float* __restrict__ u, const float* __restrict__ gamma,
                         char* __restrict__ packed, int hidden_size) {
  const int warp = static_cast<int>(blockIdx.x) % kWideWarps;
  const int rank = static_cast<int>(blockIdx.x) / kWideWarps;
  pack_fragments(packed, [=](int f, int lane, float (&x)[8]) {
    const int g = lane / 4, c = lane % 4;
    const int item = f / (kWideFragments / kItems), k_tile = f / 2 % kWideWarps, tile = f % 2;
    const int target = (2 * warp + (rank & 1)) ^ (item / 2);
    const int column = target * kWideUnits + item % 2 * 32 + 4 * g + 2 * tile;
    const int row = rank * kWideUnits + k_tile * 8 + 2 * c;
#pragma unroll
    for (int gate = 0; gate < 2; gate++) {
      float2 even = make_float2(0.f, 0.f), odd = even, factor = make_float2(1.f, 1.f);
      if (row < hidden_size && column < hidden_size) {
        const int64_t at = gate * hidden_size + row;
        even = *reinterpret_cast<const float2*>(u + at * hidden_size + column);
        odd = *reinterpret_cast<const float2*>(u + (at + 1) * hidden_size + column);
        if (gamma != nullptr) factor = *reinterpret_cast<const float2*>(gamma + at);
      }
      x[4 * gate] = even.x * factor.x, x[4 * gate + 1] = odd.x * factor.y;
      x[4 * gate + 2] = even.y * factor.x, x[4 * gate + 3] = odd.y * factor.y;
    }
  });
}

template <bool kLayerNorm>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  static_assert(sizeof(Shared) <= kWideSharedBytes);
  constexpr ClusterKernel<PersistentBackward> kKernel = {
      backward_wide_float_kernel<kLayerNorm>, kWideCluster, kWideThreads, sizeof(Shared)};
  return kKernel.run(p.choice.groups(p.layer.rows()), p, stream);
}

}  // namespace

cudaError_t pack_backward(const float* u, const float* ln_weight, void* packed, int64_t hidden,
                          cudaStream_t stream) {
  pack_backward_kernel<<<kWideCluster * kWideWarps, kWideThreads, 0, stream>>>(
      u, ln_weight, static_cast<char*>(packed), static_cast<int>(hidden));
  return cudaGetLastError();
}

cudaError_t run_backward_wide_float(const PersistentBackward& p, cudaStream_t stream) {
  return p.layer.layer_norm ? launch<true>(p, stream) : launch<false>(p, stream);
}

}  // namespace sb_fast_sligru
