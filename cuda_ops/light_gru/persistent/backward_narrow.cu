// The backward recurrence of one chunk of time steps.
//
// For every row and step, with xh = rho Uc h_{n-1} and everything but d known beforehand (passes.cu):
//   Ka = (1 - z) mask act'(a);  Kz = (h_{n-1} - c) z (1 - z)
//   q = Ka gamma_a xh_a + Kz gamma_z xh_z;  V = rho Uc^T Uc h_{n-1}
// the recurrence is linear in d, the gradient with respect to h_n:
//   d = grad_h_n + carry;  dwx = [d Ka, d Kz];  m2 = sum(d q) / 2H
//   carry = d z + rho (Uc^T (gamma dwx) - m2 V)
// Li-GRU: carry = d z + U^T dwx. (Derived from the cell in forward_narrow.cu: the gradient of
// an RMS norm is rho (dx - xh mean(dx xh)), and mean(dx xh) = m2.)
//
// The sequential kernel is a reduce-scatter. Block k of a cluster owns the candidate and gate rows
// of its 32 or 64 units (as in the forward kernel) of Uc and of dwx. Its dwx never leaves it: it
// multiplies them by its rows of Uc for the units of all blocks and sends each block its partial
// carries, float32, which that block sums. m2 travels beside them, under its own mbarrier. Both use
// two buffers in turn (see exchange.cuh): a block writes step k + 1's only after it has all of step
// k's, which every block sends after a __syncthreads that follows its last read of step k - 1's.
#include "light_gru/persistent/geometry.cuh"
#include "light_gru/persistent/launch.h"

namespace sb_fast_sligru {
namespace {

// The sum of a block's terms of m2, of row lane % kRows. From term_load, which depends on the lane.
template <int kParts>
__device__ __forceinline__ float block_sum(uint32_t term_load, int lane) {
  const auto part_sum = [&](int i) {
    const float4 terms = load_float4(term_load + i * 32 * sizeof(float4));
    return (terms.x + terms.y) + (terms.z + terms.w);
  };
  float sum = part_sum(0);
  if constexpr (kParts == 2) sum += part_sum(1);
#pragma unroll
  for (int offset = 1; offset < 8; offset *= 2) sum = add_lane_xor(sum, offset);
  return __shfl_sync(0xffffffffu, sum, lane % kRows * 8);
}

template <class T, int kCluster, int kUnits, bool kLayerNorm>
__global__ void __launch_bounds__(kThreads<kUnits>, kBlockUnits * 2 / kUnits)
    backward_kernel(const __grid_constant__ PersistentBackward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  // A part of a block: as many units as the outputs that a product's lanes send, one piece each.
  constexpr int kBlockWarps = kUnits / 8, kBlockParts = kUnits / kBlockUnits;
  constexpr int kHidden = kCluster * kUnits;  // padded
  constexpr int kStreams = kCoefficientStreams<kLayerNorm>;
  constexpr int kTargetBlocks = kCluster / kBlockWarps;  // blocks that one warp serves
  constexpr int kTargets = kTargetBlocks * kBlockParts;  // and their parts
  constexpr int kM2Targets = kCluster / kWarps;          // blocks to which a warp sends m2
  constexpr int kPieceBytes = 4 * sizeof(float);
  constexpr int kPartBytes = 32 * kPieceBytes;  // [lane][4 units of one row]
  constexpr int kSenderBytes = kBlockParts * kPartBytes;
  constexpr uint32_t kCarryTraffic = kCluster * kSenderBytes;
  constexpr uint32_t kM2Traffic = kCluster * kRows * sizeof(float);
  constexpr int kStreamBytes = kRows * 16;              // [row][8 units]
  constexpr int kGradOffset = kStreams * kStreamBytes;  // [row][8 units], 2 or 4 bytes
  constexpr int kRhoOffset = kGradOffset + kRows * 32;  // [row]
  constexpr int kRingBytes = kRhoOffset + kRows * 4;    // one warp and step
  static_assert(kRingBytes % 16 == 0);

  __shared__ alignas(128) uint8_t partial[2][kCluster][kSenderBytes];
  __shared__ alignas(16) uint16_t operand[2][kBlockWarps][kRows][4][4];  // dwx: [..][c][a a z z]
  __shared__ alignas(16) float m2_sums[2][kCluster][kRows];
  __shared__ alignas(16) float m2_terms[2][kBlockParts][kRows][kBlockUnits];
  __shared__ alignas(16) uint8_t ring[kRingSteps][kBlockWarps][kRingBytes];
  __shared__ alignas(8) uint64_t barriers[4];

  const Recurrence& layer = p.layer;
  const int hidden_size = static_cast<int>(layer.hidden), count = static_cast<int>(p.count);
  const auto* ln_weight = static_cast<const float*>(layer.ln_weight);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const uint32_t rank = cluster_rank();
  const int row0 = static_cast<int>(blockIdx.x / kCluster) * kRows;
  const int unit0 = static_cast<int>(rank) * kUnits + warp * 8;
  const int local_row = g / 2, local_unit = 2 * c + g % 2;  // what this lane computes
  const int unit = unit0 + local_unit;
  const bool in_range = unit0 < hidden_size;

  const uint32_t carry_barrier = shared_address(&barriers[0]);
  const uint32_t m2_barrier = shared_address(&barriers[2]);
  if (threadIdx.x < 4) mbarrier::init(shared_address(&barriers[threadIdx.x]));
  mbarrier::fence_init();
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(ring)) / 4; i += kThreads<kUnits>)
    reinterpret_cast<uint32_t*>(ring)[i] = 0;  // stays so where grad_h has no such unit
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      mbarrier::expect(carry_barrier + 8 * i, kCarryTraffic);
      if (kLayerNorm) mbarrier::expect(m2_barrier + 8 * i, kM2Traffic);
    }
  }

  // Uc^T with gamma folded in. For target i, a part of a block, the lane's outputs are its units
  // 4g..4g+3 (two 16-row tiles, rows g and g + 8 of each); k-tile k holds the 8 candidate and 8
  // gate rows of warp k.
  const auto target_rank = [&](int block) {
    return warp * kTargetBlocks + ((block + rank) & (kTargetBlocks - 1));
  };
  const auto load_weights = [&](int output, int column, float (&u)[4]) {  // 4 columns of one row
    const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const T*>(p.u) +
                                                       int64_t{output} * hidden_size + column);
    const float gamma = kLayerNorm && ln_weight != nullptr ? ln_weight[output] : 1.f;
    u[0] = OperandTraits<T>::to_float(static_cast<uint16_t>(bits.x)) * gamma;
    u[1] = OperandTraits<T>::to_float(static_cast<uint16_t>(bits.x >> 16)) * gamma;
    u[2] = OperandTraits<T>::to_float(static_cast<uint16_t>(bits.y)) * gamma;
    u[3] = OperandTraits<T>::to_float(static_cast<uint16_t>(bits.y >> 16)) * gamma;
  };
  uint32_t weights[kTargets][2][kBlockWarps][4];
  uint32_t target[kTargetBlocks];
#pragma unroll
  for (int i = 0; i < kTargets; i++) {
    uint32_t to = target_rank(i / kBlockParts);
    // Or the addresses of all rows are kept for the next part: more than there are registers.
    if constexpr (kBlockParts > 1) pin(to);
    const int column = static_cast<int>(to) * kUnits + i % kBlockParts * kBlockUnits + 4 * g;
#pragma unroll
    for (int k = 0; k < kBlockWarps; k++) {
      const int row = static_cast<int>(rank) * kUnits + 8 * k + 2 * c;
#pragma unroll
      for (int gate = 0; gate < 2; gate++) {
        float even[4] = {}, odd[4] = {};
        if (row < hidden_size && column < hidden_size) {
          load_weights(gate * hidden_size + row, column, even);
          load_weights(gate * hidden_size + row + 1, column, odd);
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
          weights[i][j / 2][k][2 * gate + j % 2] = OperandTraits<T>::pack(even[j], odd[j]);
      }
    }
    target[i / kBlockParts] =
        remote_address(shared_address(&partial[0][rank][lane * kPieceBytes]), to);
  }
  // From a target to the mbarrier of its block: distances within a block's shared memory are the
  // same.
  const uint32_t to_barrier = carry_barrier - shared_address(&partial[0][rank][lane * kPieceBytes]);
  const int part = kBlockParts == 1 ? 0 : warp / kWarps;
  const uint32_t m2_rank = (warp - kWarps * part) * kM2Targets + (lane / kRows) % kM2Targets;
  const uint32_t m2_target =
      remote_address(shared_address(&m2_sums[0][rank][lane % kRows]), m2_rank);
  const uint32_t m2_target_barrier = remote_address(m2_barrier, m2_rank);

  // Streams of one step: every lane copies at most one piece. Lanes in order: coefficients (16
  // bytes each), grad_h (16), and the last kRows lanes rho (4).
  const int64_t last = p.first + count - 1;
  const Sequence grad_h = {p.grad_h, layer.output_type, p.grad_h_batch_stride,
                           p.grad_h_time_stride};
  const int grad_bytes = grad_h.bytes(), grad_pieces = grad_bytes / 2;
  const char* source = nullptr;
  int64_t source_step = 0;
  int copy_bytes = 0;
  uint32_t copy_target = shared_address(&ring[0][warp][0]);
  if (lane < kStreams * kRows) {
    const Row row = locate_row(layer, row0 + lane % kRows);
    source_step = -static_cast<int64_t>(sizeof(T)) * kStreams * kHidden;
    source = static_cast<const char*>(p.coefficients) -
             (int64_t{row.index + 1} * count - 1) * source_step +
             (lane / kRows * kHidden + unit0) * sizeof(T);
    copy_bytes = 16;
    copy_target += lane * 16;
  } else if (lane < kStreams * kRows + kRows * grad_pieces) {
    const int piece = lane - kStreams * kRows;
    const Row row = locate_row(layer, row0 + piece / grad_pieces);
    source_step = -grad_h.step_bytes(row);
    source =
        grad_h.at(layer, row, last, row.direction * hidden_size + unit0) + piece % grad_pieces * 16;
    copy_bytes = in_range ? 16 : 0;
    copy_target += kGradOffset + piece * 16;
  } else if (kLayerNorm && lane >= 32 - kRows) {
    const Row row = locate_row(layer, row0 + lane % kRows);
    source_step = row.direction ? 4 : -4;  // floats
    source = reinterpret_cast<const char*>(p.rho + row.index * layer.time +
                                           layer.time_of(row.index, last));
    copy_bytes = 4;
    copy_target += kRhoOffset + lane % kRows * 4;
  }
  const auto fetch = [&](int k) {
    const uint32_t to = copy_target + k % kRingSteps * sizeof(ring[0]);
    if (k < count) {
      if (copy_bytes == 16) copy_async_16(to, source);
      if (kLayerNorm && copy_bytes == 4) copy_async_4(to, source);
    }
    source += source_step;
    copy_async_commit();
  };

  const uint32_t stream_address =
      shared_address(&ring[0][warp][local_row * 16 + local_unit * sizeof(T)]);
  const uint32_t grad_address =
      shared_address(&ring[0][warp][kGradOffset]) + (local_row * 8 + local_unit) * grad_bytes;
  const uint32_t rho_address = shared_address(&ring[0][warp][kRhoOffset + local_row * 4]);
  const bool grad_float = grad_h.is_float();
  float coefficients[kStreams], grad = 0.f, rho = 1.f;
  const auto load = [&](int k) {
    const uint32_t offset = k % kRingSteps * sizeof(ring[0]);
#pragma unroll
    for (int i = 0; i < kStreams; i++)
      coefficients[i] = load_operand<T>(stream_address + offset + i * kStreamBytes);
    grad = grad_float ? load_float(grad_address + offset) : load_operand<T>(grad_address + offset);
    if (kLayerNorm) rho = load_float(rho_address + offset);
  };
#pragma unroll
  for (int k = 0; k < kRingSteps - 1; k++) fetch(k);
  copy_async_wait<kRingSteps - 2>();
  __syncwarp();
  load(0);

  const Row row = locate_row(layer, row0 + local_row);
  const bool stored = row.valid && in_range;
  float carry = in_range ? p.carry[int64_t{row.index} * hidden_size + unit] : 0.f;
  int row_step = (row.index + 1) * count - 1;
  const bool stores_m2 = kLayerNorm && rank == 0 && warp == 0 && c == 0 && g % 2 == 0 && row.valid;
  const float inverse_size = 1.f / static_cast<float>(2 * hidden_size);

  const uint32_t operand_store = shared_address(&operand[0][warp][local_row][c][g % 2]);
  const uint32_t operand_load = shared_address(&operand[0][0][local_row][c][0]);
  const uint32_t term_store =
      shared_address(&m2_terms[0][part][local_row][(warp - kWarps * part) * 8 + local_unit]);
  const uint32_t term_load = shared_address(&m2_terms[0][0][0][0]) + lane * 16;
  const uint32_t m2_load = shared_address(&m2_sums[0][c][local_row]);
  // Partial carry of this lane's row and unit: piece (unit / 4) * 4 + row of every sender.
  const int block_unit = warp * 8 + local_unit;
  const uint32_t partial_load =
      shared_address(&partial[0][0][(block_unit / 4 * 4 + local_row) * kPieceBytes +
                                    block_unit % 4 * sizeof(float)]);
  cluster_barrier();

#pragma unroll 1
  for (int k = 0; k < count; k++) {
    const uint32_t buffer = k & 1, parity = k >> 1 & 1;
    const float d = grad + carry;
    const float dwx_a = d * coefficients[0], dwx_z = d * coefficients[1];
    const float complement = coefficients[2], now_rho = rho;
    float v = 0.f;
    const uint32_t packed = OperandTraits<T>::pack(dwx_a, dwx_z);
    const uint16_t bits_a = static_cast<uint16_t>(packed),
                   bits_z = static_cast<uint16_t>(packed >> 16);
    store_bits(operand_store + buffer * sizeof(operand[0]), bits_a);
    store_bits(operand_store + buffer * sizeof(operand[0]) + 4, bits_z);
    if constexpr (kLayerNorm) {
      store_float(term_store + buffer * sizeof(m2_terms[0]), d * coefficients[3]);
      v = coefficients[4];
    }
    __syncthreads();

    float sums[kTargets][2][4] = {};
    uint2 dwx[kBlockWarps];
#pragma unroll
    for (int i = 0; i < kBlockWarps; i++)
      dwx[i] = load_uint2(operand_load + buffer * sizeof(operand[0]) + i * sizeof(operand[0][0]));
    const auto product = [&](int from, int to, int k_from, int k_to) {
#pragma unroll
      for (int i = 0; i < kBlockWarps; i++)
#pragma unroll
        for (int j = 0; j < kTargets; j++)
#pragma unroll
          for (int tile = 0; tile < 2; tile++)
            if (k_from <= i && i < k_to && from <= j && j < to)
              multiply<T>(sums[j][tile], weights[j][tile][i], dwx[i].x, dwx[i].y);
    };
    const auto send_carry = [&](int from, int to) {
#pragma unroll
      for (int i = 0; i < kTargets; i++)
        if (from <= i && i < to)
          send(target[i / kBlockParts] + buffer * kCarryTraffic + i % kBlockParts * kPartBytes,
               target[i / kBlockParts] + to_barrier + buffer * 8, __float_as_uint(sums[i][0][0]),
               __float_as_uint(sums[i][0][2]), __float_as_uint(sums[i][1][0]),
               __float_as_uint(sums[i][1][2]));
    };
    const auto send_m2 = [&] {
      const float sum = block_sum<kBlockParts>(term_load + buffer * sizeof(m2_terms[0]), lane);
      if (lane < kM2Targets * kRows)
        send(m2_target + buffer * kM2Traffic, m2_target_barrier + buffer * 8, __float_as_uint(sum));
    };
    // m2 is summed in the shadow of the product: when all of it is on its way or, where two warps
    // share a tensor core, by one of them while the other multiplies.
    if (kLayerNorm && kBlockParts > 1 && part > 0) send_m2();
    // The first half of the targets is served while the second half is multiplied.
    product(0, kTargets / 2, 0, kBlockWarps);
    product(kTargets / 2, kTargets, 0, kBlockWarps / 2);
    send_carry(0, kTargets / 2);
    product(kTargets / 2, kTargets, kBlockWarps / 2, kBlockWarps);
    if constexpr (kLayerNorm && kBlockParts == 1) send_m2();
    send_carry(kTargets / 2, kTargets);
    if (stored) {
      uint16_t* output =
          static_cast<uint16_t*>(p.dwx_rows) + int64_t{row_step} * 2 * kHidden + unit;
      output[0] = bits_a;
      output[kHidden] = bits_z;
    }
    fetch(k + kRingSteps - 1);
    copy_async_wait<kRingSteps - 2>();
    __syncwarp();
    load(k + 1);

    float own = fmaf(-complement, d, d);
    if constexpr (kLayerNorm) {
      mbarrier::wait(m2_barrier + buffer * 8, parity);
      if (threadIdx.x == 0) mbarrier::expect(m2_barrier + buffer * 8, kM2Traffic);
      float m2 = 0.f;
#pragma unroll
      for (int i = 0; i < kCluster / 4; i++)
        m2 += load_float(m2_load + buffer * kM2Traffic + i * 4 * sizeof(m2_sums[0][0]));
      m2 = add_lane_xor(add_lane_xor(m2, 1), 2) * inverse_size;
      own = fmaf(-now_rho * m2, v, own);
      if (stores_m2) p.m2[row_step] = m2;
    }
    row_step--;
    mbarrier::wait(carry_barrier + buffer * 8, parity);
    if (threadIdx.x == 0) mbarrier::expect(carry_barrier + buffer * 8, kCarryTraffic);
    float received[4] = {};
#pragma unroll
    for (int i = 0; i < kCluster; i++)
      received[i % 4] += load_float(partial_load + buffer * kCarryTraffic + i * kSenderBytes);
    carry = fmaf(now_rho, (received[0] + received[1]) + (received[2] + received[3]), own);
  }
  if (stored) p.carry[int64_t{row.index} * hidden_size + unit] = carry;
  cluster_barrier();
#endif
}

template <class T, int kCluster, int kUnits>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  const auto kernel = p.layer.layer_norm ? backward_kernel<T, kCluster, kUnits, true>
                                         : backward_kernel<T, kCluster, kUnits, false>;
  const ClusterKernel<PersistentBackward> in_clusters = {kernel, kCluster, kThreads<kUnits>};
  return in_clusters.run(p.choice.clusters(p.layer.rows()), p, stream);
}

template <class T>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  if (p.choice.units == 2 * kBlockUnits) return launch<T, 8, 2 * kBlockUnits>(p, stream);
  switch (p.choice.cluster) {
    case 4:
      return launch<T, 4, kBlockUnits>(p, stream);
    case 8:
      return launch<T, 8, kBlockUnits>(p, stream);
    default:
      return launch<T, 16, kBlockUnits>(p, stream);
  }
}

}  // namespace

int coefficient_streams(bool layer_norm) {
  return layer_norm ? kCoefficientStreams<true> : kCoefficientStreams<false>;
}

cudaError_t run_backward_narrow(const PersistentBackward& p, cudaStream_t stream) {
  return p.layer.operand_type == DType::kBFloat16 ? launch<__nv_bfloat16>(p, stream)
                                                  : launch<__half>(p, stream);
}

}  // namespace sb_fast_sligru
