// The backward recurrence of backward_narrow.cu with float32 operands, for H <= 512: the same
// reduce-scatter, buffers and order of messages; the products are those of split_float.cuh.
//
// Block k of a cluster owns the 64 rows 32k..32k+31 (candidate and gate) of Uc and of dwx. Each of
// its first 4 warps computes dwx of 8 units, one (unit, row) a lane; all 8 multiply, each for the
// units of its own target blocks. Gradients have any range, so each of the first warps scales its
// 16 rows of dwx, every row of the batch by its own power of two: the partial products of different
// warps' dwx are therefore added up outside the tensor core, each with its own factor.
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/narrow_float.cuh"

namespace sb_fast_sligru {
namespace {

template <int kCluster, bool kLayerNorm>
__global__ void __launch_bounds__(kFloatThreads, 1)
    backward_float_kernel(const __grid_constant__ PersistentBackward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  constexpr int kHidden = kCluster * kBlockUnits;  // padded
  constexpr int kStreams = kCoefficientStreams<kLayerNorm>;
  // Blocks that one warp serves; for the smallest cluster half of the warps do.
  constexpr int kTargets = kCluster < kFloatWarps ? 1 : kCluster / kFloatWarps;
  constexpr int kTiles = 4;     // of 8 units of a target: the lane's outputs are its units 4g..4g+3
  constexpr int kInFlight = 2;  // products of a warp that run while others are added up
  constexpr int kPieceBytes = kTiles * sizeof(float);
  constexpr int kSenderRowBytes = kBlockUnits * sizeof(float);
  constexpr int kSenderBytes = kRows * kSenderRowBytes;  // [row][8 pieces of 4 units]
  constexpr uint32_t kCarryBytes = kCluster * kSenderBytes;
  constexpr uint32_t kM2Bytes = kCluster * kRows * sizeof(float);
  // 32 units, and 32 bytes that keep the four rows in different banks.
  constexpr int kRowBytes = kBlockUnits * 4 + 32;
  constexpr int kStreamBytes = kRows * kRowBytes;
  constexpr int kGradOffset = kStreams * kStreamBytes;
  constexpr int kRhoOffset = kGradOffset + kStreamBytes;
  constexpr int kRingBytes = kRhoOffset + kRows * 4;  // one step
  static_assert(kRingBytes % 16 == 0);

  __shared__ alignas(128) uint8_t partial[2][kCluster][kSenderBytes];
  // Scaled dwx: [warp][row, high or low][c][a a z z].
  __shared__ alignas(16) uint16_t operand[2][kWarps][2 * kRows][4][4];
  __shared__ alignas(16) float inverse_scale[2][kRows][kWarps];
  __shared__ alignas(16) float m2_sums[2][kCluster][kRows];
  __shared__ alignas(16) uint8_t m2_terms[2][kRows][kRowBytes];
  __shared__ alignas(16) uint8_t ring[kRingSteps][kRingBytes];
  __shared__ alignas(8) uint64_t barriers[4];

  const Recurrence& layer = p.layer;
  const int hidden_size = static_cast<int>(layer.hidden), count = static_cast<int>(p.count);
  const auto* ln_weight = static_cast<const float*>(layer.ln_weight);
  // The shuffle shows the compiler that a warp's number is the same in all its lanes.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const uint32_t rank = cluster_rank();
  const int rows = p.choice.rows;
  const int row0 = static_cast<int>(blockIdx.x / kCluster) * rows;
  const int block_unit0 = static_cast<int>(rank) * kBlockUnits;
  const bool owns = warp < kWarps;
  const int local_row = g / 2, block_unit = warp % kWarps * 8 + 2 * c + g % 2;
  const int unit = block_unit0 + block_unit;  // what this lane computes
  const bool in_range = unit < hidden_size;   // the same for the whole warp

  const uint32_t carry_barrier = shared_address(&barriers[0]);
  const uint32_t m2_barrier = shared_address(&barriers[2]);
  const uint32_t carry_traffic = kCarryBytes / kRows * rows, m2_traffic = kM2Bytes / kRows * rows;
  if (threadIdx.x < 4) mbarrier::init(shared_address(&barriers[threadIdx.x]));
  mbarrier::fence_init();
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(ring)) / 4; i += kFloatThreads)
    reinterpret_cast<uint32_t*>(ring)[i] = 0;  // stays so where grad_h has no such unit
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      mbarrier::expect(carry_barrier + 8 * i, carry_traffic);
      if (kLayerNorm) mbarrier::expect(m2_barrier + 8 * i, m2_traffic);
    }
  }

  // Uc^T with gamma folded in: first the floats, then, in their place, their high and low parts.
  // For target block i the lane's row of tile m is unit 4g + m; k-tile k holds the 8 candidate and
  // 8 gate rows of warp k.
  const bool serves = warp * kTargets < kCluster;
  const auto target_rank = [&](int i) {
    return (warp * kTargets + ((i + rank) & (kTargets - 1))) % kCluster;
  };
  // Piece g of a row lies where the four rows of a reading warp do not meet in a bank.
  const auto piece_offset = [](int row, int piece) {
    return row * kSenderRowBytes + (piece ^ (2 * row)) * kPieceBytes;
  };
  const uint32_t own_piece = shared_address(&partial[0][rank][piece_offset(c, g)]);
  uint32_t weights[kTargets][kTiles][kWarps][4];
  uint32_t target[kTargets];
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < kTargets; i++) {
    const uint32_t to = target_rank(i);
    const int column = static_cast<int>(to) * kBlockUnits + 4 * g;
#pragma unroll
    for (int k = 0; k < kWarps; k++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {  // candidate rows 2c and 2c + 1, gate rows 2c and 2c + 1
        const int row = block_unit0 + 8 * k + 2 * c + j % 2;
        const int output = j / 2 * hidden_size + row;
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
        float gamma = 1.f;
        if (row < hidden_size && column < hidden_size) {
          x = *reinterpret_cast<const float4*>(static_cast<const float*>(p.u) +
                                               int64_t{output} * hidden_size + column);
          if (kLayerNorm && ln_weight != nullptr) gamma = ln_weight[output];
        }
        const float values[kTiles] = {x.x * gamma, x.y * gamma, x.z * gamma, x.w * gamma};
#pragma unroll
        for (int m = 0; m < kTiles; m++) {
          weights[i][m][k][j] = __float_as_uint(values[m]);
          largest = fmaxf(largest, fabsf(values[m]));
        }
      }
    }
    target[i] = remote_address(own_piece, to);
  }
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) largest = max_lane_xor(largest, offset);
  const float weight_scale = scale_for(largest);
  float weight_factor = inverse_of(weight_scale);
#pragma unroll
  for (int i = 0; i < kTargets; i++)
#pragma unroll
    for (int m = 0; m < kTiles; m++)
#pragma unroll
      for (int k = 0; k < kWarps; k++) {
        uint32_t (&w)[4] = weights[i][m][k];
        const SplitPair candidate =
            split(__uint_as_float(w[0]) * weight_scale, __uint_as_float(w[1]) * weight_scale);
        const SplitPair gate =
            split(__uint_as_float(w[2]) * weight_scale, __uint_as_float(w[3]) * weight_scale);
        w[0] = candidate.high, w[1] = candidate.low, w[2] = gate.high, w[3] = gate.low;
      }
  // From a target to the mbarrier of its block: distances within a block's shared memory are the
  // same.
  const uint32_t to_barrier = carry_barrier - own_piece;
  const uint32_t m2_rank = (warp * kTargets + (lane / kRows) % kTargets) % kCluster;
  const bool sends_carry = c < rows;
  const bool sends_m2 = lane < kTargets * kRows && lane % kRows < rows;
  const uint32_t m2_target =
      remote_address(shared_address(&m2_sums[0][rank][lane % kRows]), m2_rank);
  const uint32_t m2_target_barrier = remote_address(m2_barrier, m2_rank);

  // Streams of one step: every thread of the block copies at most one piece. Threads in order:
  // coefficients (16 bytes each, 8 threads a row), grad_h (the same), rho (4 bytes).
  constexpr int kRowPieces = kBlockUnits / 4, kStreamPieces = kRows * kRowPieces;
  constexpr int kGradPiece = kStreams * kStreamPieces, kRhoPiece = kGradPiece + kStreamPieces;
  static_assert(kRhoPiece + kRows <= kFloatThreads);
  const int64_t last = p.first + count - 1;
  const Sequence grad_h = {p.grad_h, layer.output_type, p.grad_h_batch_stride,
                           p.grad_h_time_stride};
  const int piece = threadIdx.x;
  const char* source = nullptr;
  int64_t source_step = 0;
  int copy_bytes = 0;
  uint32_t copy_target = shared_address(&ring[0][0]);
  if (piece < kRhoPiece) {
    const int stream = piece / kStreamPieces, piece_row = piece / kRowPieces % kRows;
    const int piece_unit = block_unit0 + piece % kRowPieces * 4;
    const Row row = locate_row(layer, row0 + piece_row);
    copy_target += stream * kStreamBytes + piece_row * kRowBytes + piece % kRowPieces * 16;
    copy_bytes = 16;
    if (stream < kStreams) {
      source_step = -static_cast<int64_t>(sizeof(float)) * kStreams * kHidden;
      source = static_cast<const char*>(p.coefficients) -
               (int64_t{row.index + 1} * count - 1) * source_step +
               (stream * kHidden + piece_unit) * sizeof(float);
    } else {
      source_step = -grad_h.step_bytes(row);
      source = grad_h.at(layer, row, last, row.direction * hidden_size + piece_unit);
      if (piece_unit >= hidden_size) copy_bytes = 0;
    }
  } else if (kLayerNorm && piece < kRhoPiece + kRows) {
    const Row row = locate_row(layer, row0 + piece - kRhoPiece);
    source_step = row.direction ? 4 : -4;
    source = reinterpret_cast<const char*>(p.rho + row.index * layer.time +
                                           layer.time_of(row.index, last));
    copy_bytes = 4;
    copy_target += kRhoOffset + (piece - kRhoPiece) * 4;
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

  const uint32_t stream_address = shared_address(&ring[0][local_row * kRowBytes + block_unit * 4]);
  const uint32_t rho_address = shared_address(&ring[0][kRhoOffset + local_row * 4]);
  float coefficients[kStreams], grad = 0.f, rho = 1.f;
  const auto load = [&](int k) {
    const uint32_t offset = k % kRingSteps * sizeof(ring[0]);
#pragma unroll
    for (int i = 0; i < kStreams; i++)
      coefficients[i] = load_float(stream_address + offset + i * kStreamBytes);
    grad = load_float(stream_address + offset + kGradOffset);
    if (kLayerNorm) rho = load_float(rho_address + offset);
  };
  // Before the __syncthreads of step k every thread has seen its own copies for step k + 1 land.
#pragma unroll
  for (int k = 0; k < kRingSteps - 1; k++) fetch(k);
  copy_async_wait<kRingSteps - 3>();
  __syncthreads();
  load(0);

  const Row row = locate_row(layer, row0 + local_row);
  const bool used = local_row < rows;
  const bool stored = owns && row.valid && used && in_range;
  float carry = in_range ? p.carry[int64_t{row.index} * hidden_size + unit] : 0.f;
  const bool stores_m2 =
      kLayerNorm && rank == 0 && warp == 0 && c == 0 && g % 2 == 0 && row.valid && used;
  const float inverse_size = 1.f / static_cast<float>(2 * hidden_size);

  const uint32_t operand_store =
      shared_address(&operand[0][warp % kWarps][2 * local_row][c][g % 2]);
  const uint32_t operand_load = shared_address(&operand[0][0][g][c][0]);
  const uint32_t scale_store = shared_address(&inverse_scale[0][local_row][warp % kWarps]);
  const uint32_t scale_load = shared_address(&inverse_scale[0][c][0]);
  const uint32_t term_store = shared_address(&m2_terms[0][local_row][block_unit * 4]);
  const uint32_t term_load = shared_address(&m2_terms[0][lane / 8][lane % 8 * 16]);
  const uint32_t m2_load = shared_address(&m2_sums[0][c][local_row]);
  const uint32_t partial_load = shared_address(
      &partial[0][0][piece_offset(local_row, block_unit / 4) + block_unit % 4 * sizeof(float)]);
  float scale = 0.f;  // of this warp's dwx of local_row
  pin(weight_factor);
  cluster_barrier();

#pragma unroll 1
  for (int k = 0; k < count; k++) {
    const uint32_t buffer = k & 1, parity = k >> 1 & 1;
    const int row_step = (row.index + 1) * count - 1 - k;
    float d = 0.f, dwx_a = 0.f, dwx_z = 0.f, complement = 0.f, v = 0.f;
    const float now_rho = rho;
    if (owns) {
      d = used ? grad + carry : 0.f;
      dwx_a = d * coefficients[0], dwx_z = d * coefficients[1];
      complement = coefficients[2];
      // The scale of the step before will mostly do: nothing too large for float16, and in every
      // row something large enough for the low part to have all its bits.
      float magnitude = fmaxf(fabsf(dwx_a), fabsf(dwx_z));
      const float scaled = magnitude * scale;
      const bool large = __any_sync(0xffffffffu, !(scaled < 32768.f));
      const uint32_t fair = __ballot_sync(0xffffffffu, !used || scaled >= 1.f / 256.f);
      if (large || has_zero_byte(fair)) {
#pragma unroll
        for (int offset = 1; offset < 8; offset *= 2) magnitude = max_lane_xor(magnitude, offset);
        scale = scale_for(magnitude * 256.f);
      }
      const SplitPair parts = split(dwx_a * scale, dwx_z * scale);
      const uint32_t store = operand_store + buffer * sizeof(operand[0]);
      store_bits(store, static_cast<uint16_t>(parts.high));
      store_bits(store + 4, static_cast<uint16_t>(parts.high >> 16));
      store_bits(store + sizeof(operand[0][0][0]), static_cast<uint16_t>(parts.low));
      store_bits(store + sizeof(operand[0][0][0]) + 4, static_cast<uint16_t>(parts.low >> 16));
      if (c == 0 && g % 2 == 0)
        store_float(scale_store + buffer * sizeof(inverse_scale[0]), inverse_of(scale));
      if constexpr (kLayerNorm) {
        store_float(term_store + buffer * sizeof(m2_terms[0]), d * coefficients[3]);
        v = coefficients[4];
      }
    }
    __syncthreads();

    if (serves) {
      uint2 dwx[kWarps];
#pragma unroll
      for (int i = 0; i < kWarps; i++)
        dwx[i] = load_uint2(operand_load + buffer * sizeof(operand[0]) + i * sizeof(operand[0][0]));
      const float4 inverse = load_float4(scale_load + buffer * sizeof(inverse_scale[0]));
      const float factor[kWarps] = {inverse.x * weight_factor, inverse.y * weight_factor,
                                    inverse.z * weight_factor, inverse.w * weight_factor};
      // While some products are computed, those before them are added up; a block is served while
      // the next one's units are multiplied.
      float sums[kTargets][kTiles], products[2][kInFlight][4], m2_sum = 0.f;
      constexpr int kGroups = kTiles / kInFlight, kRounds = kTargets * kWarps * kGroups;
#pragma unroll
      for (int n = 0; n <= kRounds; n++) {
        if (n < kRounds) {
          const int i = n / kGroups / kWarps, tile = n / kGroups % kWarps;
#pragma unroll
          for (int m = 0; m < kInFlight; m++)
            multiply_new(products[n % 2][m], weights[i][n % kGroups * kInFlight + m][tile],
                         dwx[tile].x, dwx[tile].y);
        }
        if constexpr (kLayerNorm) {  // the block's part of m2, a step of its sum a round
          constexpr int kFirst = kRounds / 2;
          static_assert(kFirst + 4 <= kRounds);
          if (n == kFirst) {
            const float4 terms = load_float4(term_load + buffer * sizeof(m2_terms[0]));
            m2_sum = (terms.x + terms.y) + (terms.z + terms.w);
          } else if (kFirst < n && n < kFirst + 4) {
            m2_sum = add_lane_xor(m2_sum, 1 << (n - kFirst - 1));
          } else if (n == kFirst + 4) {
            m2_sum = __shfl_sync(0xffffffffu, m2_sum, lane % kRows * 8);
            if (sends_m2)
              send(m2_target + buffer * kM2Bytes, m2_target_barrier + buffer * 8,
                   __float_as_uint(m2_sum));
          }
        }
        if (n > 0) {
          const int i = (n - 1) / kGroups / kWarps, tile = (n - 1) / kGroups % kWarps;
#pragma unroll
          for (int m = 0; m < kInFlight; m++) {
            const float (&product)[4] = products[(n - 1) % 2][m];
            const float value = fmaf(product[1] + product[2], 1.f / kLowScale, product[0]);
            float& sum = sums[i][(n - 1) % kGroups * kInFlight + m];
            sum = tile == 0 ? value * factor[0] : fmaf(value, factor[tile], sum);
          }
        }
        // A block is served when the first products for the next one are under way.
        constexpr int kTargetRounds = kWarps * kGroups;
        if (n == kRounds || (n > kTargetRounds && n % kTargetRounds == 1)) {
          const int to = (n - 1) / kTargetRounds - (n == kRounds ? 0 : 1);
          if (sends_carry)
            send(target[to] + buffer * kCarryBytes, target[to] + to_barrier + buffer * 8,
                 __float_as_uint(sums[to][0]), __float_as_uint(sums[to][1]),
                 __float_as_uint(sums[to][2]), __float_as_uint(sums[to][3]));
        }
      }
    }
    if (stored) {
      float* output = static_cast<float*>(p.dwx_rows) + int64_t{row_step} * 2 * kHidden + unit;
      output[0] = dwx_a;
      output[kHidden] = dwx_z;
    }
    fetch(k + kRingSteps - 1);
    copy_async_wait<kRingSteps - 3>();
    if (owns) {
      load(k + 1);
      float own = fmaf(-complement, d, d);
      if constexpr (kLayerNorm) {
        mbarrier::wait(m2_barrier + buffer * 8, parity);
        if (threadIdx.x == 0) mbarrier::expect(m2_barrier + buffer * 8, m2_traffic);
        float m2 = 0.f;
#pragma unroll
        for (int i = 0; i < kCluster / 4; i++)
          m2 += load_float(m2_load + buffer * kM2Bytes + i * 4 * sizeof(m2_sums[0][0]));
        m2 = add_lane_xor(add_lane_xor(m2, 1), 2) * inverse_size;
        own = fmaf(-now_rho * m2, v, own);
        if (stores_m2) p.m2[row_step] = m2;
      }
      mbarrier::wait(carry_barrier + buffer * 8, parity);
      if (threadIdx.x == 0) mbarrier::expect(carry_barrier + buffer * 8, carry_traffic);
      float received[4] = {};
#pragma unroll
      for (int i = 0; i < kCluster; i++)
        received[i % 4] += load_float(partial_load + buffer * kCarryBytes + i * kSenderBytes);
      carry = fmaf(now_rho, (received[0] + received[1]) + (received[2] + received[3]), own);
    }
  }
  if (stored) p.carry[int64_t{row.index} * hidden_size + unit] = carry;
  cluster_barrier();
#endif
}

template <int kCluster>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  const auto kernel = p.layer.layer_norm ? backward_float_kernel<kCluster, true>
                                         : backward_float_kernel<kCluster, false>;
  const ClusterKernel<PersistentBackward> in_clusters = {kernel, kCluster, kFloatThreads};
  return in_clusters.run(p.choice.clusters(p.layer.rows()), p, stream);
}

}  // namespace

cudaError_t run_backward_narrow_float(const PersistentBackward& p, cudaStream_t stream) {
  switch (p.choice.cluster) {
    case 4:
      return launch<4>(p, stream);
    case 8:
      return launch<8>(p, stream);
    default:
      return launch<16>(p, stream);
  }
}

}  // namespace sb_fast_sligru
