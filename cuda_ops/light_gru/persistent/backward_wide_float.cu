// The backward recurrence of backward_wide.cu in float32: same equations, same
// reduce-scatter, same division of the work. The operands are pairs of float16 (wide_float.cuh).
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

template <class Place>
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

template <class Place, bool kLayerNorm>
__global__ void __launch_bounds__(kWideThreads, 1)
    backward_wide_float_kernel(const __grid_constant__ PersistentBackward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  constexpr int kStreams = kCoefficientStreams<kLayerNorm>;
  constexpr int kStreamBytes = kWideHidden * 4, kStepBytes = kStreams * kStreamBytes;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<Place>*>(shared_bytes);

  const Recurrence& layer = p.layer;
  const int hidden_size = static_cast<int>(layer.hidden), count = static_cast<int>(p.count);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const uint32_t rank = cluster_rank();
  const int row0 = static_cast<int>(blockIdx.x / kWideCluster) * kWideRows;
  // This lane computes units unit and unit + 1 of row g.
  const int unit = static_cast<int>(rank) * kWideUnits + warp * 8 + 2 * c;
  const bool in_range = unit < hidden_size;

  uint32_t carry_barrier = shared_address(&shared.barriers[0]);
  uint32_t m2_barrier = shared_address(&shared.barriers[1]);
  if (threadIdx.x < 2) mbarrier::init(carry_barrier + 8 * threadIdx.x);
  mbarrier::fence_init();
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier::expect(carry_barrier, kCarryTraffic);
    mbarrier::expect(m2_barrier, kM2Traffic);
  }

  Fragments<Place> weights;
  weights.shared_address = shared_address(&shared.fragments[0][warp][lane * 16]);
  weights.ring_address = shared_address(&shared.streamed[0][warp][lane * 16]);
  weights.packed =
      static_cast<const char*>(p.u) + (rank * kWideWarps + warp) * kWarpBytes + lane * 16;
  float inverse_scale = reinterpret_cast<const float*>(static_cast<const char*>(p.u) +
                                                       kScalesOffset)[rank * kWideWarps + warp];
  weights.load_kept();
  weights.request_first();

  // Item i: half i % 2 of the units of block first_target ^ (i / 2). Pieces of odd rows have their
  // lanes exchanged by 2, against bank conflicts.
  uint32_t first_target = 2 * warp + (rank & 1);
  uint32_t carry_send = shared_address(&shared.partial[rank][lane * kPieceBytes]);
  const int odd_row = 32 * kPieceBytes + ((lane ^ 2) - lane) * kPieceBytes;
  const int receive_lane = ((2 * (warp & 3) + (c >> 1)) * 4 + (g >> 1)) ^ ((g & 1) * 2);
  uint32_t carry_receive = shared_address(
      &shared.partial[0][((warp >> 2) * 64 + (g & 1) * 32 + receive_lane) * kPieceBytes +
                         (c & 1) * 8]);
  const uint32_t m2_rank = 2 * warp + ((lane >> 3) & 1);
  const uint32_t m2_target =
      remote_address(shared_address(&shared.m2_sums[0][rank][lane & 7]), m2_rank);
  const uint32_t m2_target_barrier = remote_address(m2_barrier, m2_rank);
  uint32_t warp_store = shared_address(&shared.m2_terms[0][g][warp]);
  constexpr uint32_t kMaxima = sizeof(shared.m2_terms);  // from m2_terms to maxima
  uint32_t term_load = shared_address(&shared.m2_terms[0][lane & 7][0]);
  uint32_t maxima_load = shared_address(&shared.maxima[g][0]);
  uint32_t m2_load = shared_address(&shared.m2_sums[0][c][g]);
  uint32_t operand_store = shared_address(&shared.operand[warp][lane * 16]);
  uint32_t operand_load = shared_address(&shared.operand[0][lane * 16]);

  const Row row = locate_row(layer, row0 + g);
  const int64_t last = p.first + count - 1;
  const int64_t row_last = int64_t{row.index + 1} * count - 1;
  const Sequence grad_h = {p.grad_h, DType::kFloat32, p.grad_h_batch_stride, p.grad_h_time_stride};
  const char* coefficients =
      static_cast<const char*>(p.coefficients) + row_last * kStepBytes + unit * 4;
  const char* grads = grad_h.at(layer, row, last, row.direction * hidden_size + unit);
  const int64_t grad_step = -grad_h.step_bytes(row);
  const float* rhos = nullptr;
  if (kLayerNorm) rhos = p.rho + row.index * layer.time + layer.time_of(row.index, last);
  const int rho_step = row.direction ? 1 : -1;
  float2 coefficient[kStreams], grad = make_float2(0.f, 0.f);
  float rho = 1.f;
  // Loads the coefficients of a step and moves on to the next one, k.
  const auto load = [&](int k) {
#pragma unroll
    for (int i = 0; i < kStreams; i++)
      coefficient[i] = load_global_float2(coefficients + i * kStreamBytes);
    if (in_range) grad = load_global_float2(grads);
    if (kLayerNorm) rho = *rhos;
    if (k < count) {
      coefficients -= kStepBytes;
      grads += grad_step;
      if (kLayerNorm) rhos += rho_step;
    }
  };
  // One lane for each line of 128 bytes: 4 warps share it.
  const auto prefetch_next = [&] {
    if (warp % 4 == 0 && c == 0) {
#pragma unroll
      for (int i = 0; i < kStreams; i++) prefetch(coefficients + i * kStreamBytes);
      if (in_range) prefetch(grads);
      if (kLayerNorm) prefetch(rhos);
    }
  };
  load(1);

  float2* state = reinterpret_cast<float2*>(p.carry + int64_t{row.index} * hidden_size + unit);
  float2 carry = in_range ? *state : make_float2(0.f, 0.f);
  const bool stored = row.valid && in_range;
  char* output = static_cast<char*>(p.dwx_rows) + row_last * 2 * kStreamBytes + unit * 4;
  const bool stores_m2 = kLayerNorm && rank == 0 && warp == 0 && c == 0 && row.valid;
  float inverse_size = 1.f / static_cast<float>(2 * hidden_size);
  pin(inverse_size), pin(inverse_scale), pin(carry_receive), pin(carry_send), pin(operand_store),
      pin(operand_load);
  pin(warp_store), pin(term_load), pin(maxima_load), pin(m2_load), pin(first_target);
  pin(weights.shared_address), pin(weights.ring_address), pin(carry_barrier), pin(m2_barrier);
  cluster_barrier();

#pragma unroll 1
  for (int k = 0; k < count; k++) {
    const uint32_t parity = k & 1;
    const float2 d = make_float2(grad.x + carry.x, grad.y + carry.y);
    const float2 dwx_a = make_float2(d.x * coefficient[0].x, d.y * coefficient[0].y);
    const float2 dwx_z = make_float2(d.x * coefficient[1].x, d.y * coefficient[1].y);
    float2 own = make_float2(fmaf(-coefficient[2].x, d.x, d.x), fmaf(-coefficient[2].y, d.y, d.y));
    float2 v = make_float2(0.f, 0.f);
    const float now_rho = rho;
    float largest =
        fmaxf(fmaxf(fabsf(dwx_a.x), fabsf(dwx_a.y)), fmaxf(fabsf(dwx_z.x), fabsf(dwx_z.y)));
    largest = max_lane_xor(max_lane_xor(largest, 1), 2);
    float term = 0.f;
    if constexpr (kLayerNorm) {
      v = make_float2(rho * coefficient[4].x, rho * coefficient[4].y);
      term = fmaf(d.x, coefficient[3].x, d.y * coefficient[3].y);
      term = add_lane_xor(add_lane_xor(term, 1), 2);
    }
    if (c == 0) {
      store_float(warp_store + kMaxima, largest);
      if (kLayerNorm) store_float(warp_store + parity * sizeof(shared.m2_terms[0]), term);
    }
    __syncthreads();
    {
      const float4 x = load_float4(maxima_load), y = load_float4(maxima_load + 16);
      largest =
          fmaxf(fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)), fmaxf(fmaxf(y.x, y.y), fmaxf(y.z, y.w)));
    }
    const float scale = scale_for(largest), inverse = inverse_of(scale) * inverse_scale;
    const float inverses[2] = {__shfl_sync(0xffffffffu, inverse, 8 * c),
                               __shfl_sync(0xffffffffu, inverse, 8 * c + 4)};
    const SplitPair pair_a = split(dwx_a.x * scale, dwx_a.y * scale);
    const SplitPair pair_z = split(dwx_z.x * scale, dwx_z.y * scale);
    store_uint4(operand_store, make_uint4(pair_a.high, pair_z.high, pair_a.low, pair_z.low));
    __syncthreads();

    if (stored) {
      *reinterpret_cast<float2*>(output) = dwx_a;
      *reinterpret_cast<float2*>(output + kStreamBytes) = dwx_z;
    }
    output -= 2 * kStreamBytes;
    prefetch_next();
    float sums[2][4], low_sums[2][4];
    uint4 dwx[2];  // of a batch, of the next
    const auto stage = [&](int batch) {
      weights.stage(batch);
      dwx[batch % 2] = load_uint4(operand_load + batch % kWideWarps * kOperandBytes);
    };
    stage(0);
#pragma unroll
    for (int batch = 0; batch < kBatches; batch++) {
      const int item = batch / kItemBatches;
      if (batch % kItemBatches == 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) sums[i / 4][i % 4] = low_sums[i / 4][i % 4] = 0.f;
      }
      if (batch + 1 < kBatches) stage(batch + 1);
      const uint4& b = dwx[batch % 2];
      weights.multiply_batch(sums[0], sums[1], low_sums[0], low_sums[1], batch,
                             make_uint2(b.x, b.y), make_uint2(b.z, b.w));
      weights.request(batch + Place::kAhead);
      if (batch == 0 && lane < 2 * kWideRows) {
        float sum = 0.f;
        if constexpr (kLayerNorm) {
          const uint32_t from = term_load + parity * sizeof(shared.m2_terms[0]);
          const float4 x = load_float4(from), y = load_float4(from + 16);
          sum = ((x.x + x.y) + (x.z + x.w)) + ((y.x + y.y) + (y.z + y.w));
        }
        send(m2_target + parity * sizeof(shared.m2_sums[0]), m2_target_barrier,
             __float_as_uint(sum));
      }
      if (batch == kItemBatches - 1) {
        mbarrier::wait(m2_barrier, parity);
        if (threadIdx.x == 0) mbarrier::expect(m2_barrier, kM2Traffic);
        if constexpr (kLayerNorm) {
          float m2 = 0.f;
#pragma unroll
          for (int i = 0; i < kWideCluster / 4; i++)
            m2 += load_float(m2_load + parity * sizeof(shared.m2_sums[0]) +
                             i * 4 * sizeof(shared.m2_sums[0][0]));
          m2 = add_lane_xor(add_lane_xor(m2, 1), 2) * inverse_size;
          own.x = fmaf(-m2, v.x, own.x);
          own.y = fmaf(-m2, v.y, own.y);
          if (stores_m2) p.m2[row_last - k] = m2;
        }
      }
      if (batch == kBatches - 1) load(k + 2);
      if (batch % kItemBatches == kItemBatches - 1) {
        float out[2][4];  // [row parity][unit]
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int tile = 0; tile < 2; tile++)
            out[i % 2][2 * tile + i / 2] =
                fmaf(low_sums[tile][i], 1.f / kLowScale, sums[tile][i]) * inverses[i % 2];
        const uint32_t to = first_target ^ (item / 2);
        const uint32_t address = remote_address(carry_send + item % 2 * 64 * kPieceBytes, to);
        const uint32_t barrier = remote_address(carry_barrier, to);
#pragma unroll
        for (int i = 0; i < 2; i++)
          send(address + i * odd_row, barrier, __float_as_uint(out[i][0]),
               __float_as_uint(out[i][1]), __float_as_uint(out[i][2]), __float_as_uint(out[i][3]));
      }
    }

    mbarrier::wait(carry_barrier, parity);
    if (threadIdx.x == 0) mbarrier::expect(carry_barrier, kCarryTraffic);
    float2 received[4] = {};
#pragma unroll
    for (int i = 0; i < kWideCluster; i++) {
      const float2 x = load_float2(carry_receive + i * kSenderBytes);
      received[i % 4].x += x.x;
      received[i % 4].y += x.y;
    }
    carry.x =
        fmaf(now_rho, (received[0].x + received[1].x) + (received[2].x + received[3].x), own.x);
    carry.y =
        fmaf(now_rho, (received[0].y + received[1].y) + (received[2].y + received[3].y), own.y);
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

using Place = Placement<54, 38, 9, 5>;

template <bool kLayerNorm>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  static_assert(sizeof(Shared<Place>) <= kWideSharedBytes);
  constexpr ClusterKernel<PersistentBackward> kKernel = {
      backward_wide_float_kernel<Place, kLayerNorm>, kWideCluster, kWideThreads,
      sizeof(Shared<Place>)};
  return kKernel.run(p.choice.clusters(p.layer.rows()), p, stream);
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
