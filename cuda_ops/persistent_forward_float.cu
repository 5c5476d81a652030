// The forward recurrence of persistent_forward.cu with float32 operands, for H <= 512. Its two hops
// and buffers are the same; the products are those of persistent_float.cuh.
//
// Block k of a cluster owns units 32k..32k+31, warp w of it units 4w..4w+3 of those: their
// candidate and gate rows are the 8 rows of Uc that the warp multiplies, all of K, in registers for
// the whole sequence. Lane 4g + c holds r of row g (g < 4: candidate of unit g, else gate of unit g
// - 4) and batch row c; after an exchange with lane 4 (g ^ 4) + c both compute that unit's new
// state.
#include "cluster_launch.cuh"
#include "persistent_float.cuh"
#include "persistent_wide_float.cuh"

namespace sb_fast_sligru {
namespace {

template <int kCluster, bool kLayerNorm>
__global__ void __launch_bounds__(kFloatThreads, 1)
    forward_float_kernel(const __grid_constant__ PersistentForward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  constexpr int kWarpUnits = kBlockUnits / kFloatWarps;
  constexpr int kBuffers = kLayerNorm ? 1 : 2;
  // h arrives under several mbarriers, so that the product starts on the first.
  constexpr int kGroups = kCluster < 8 ? 2 : 4;
  constexpr int kGroupSlots = kCluster / kGroups;
  static_assert(kGroupSlots % 2 == 0);  // a lane sends slots 2i and 2i + 1 to the same mbarrier
  constexpr int kColumns = 2 * kRows;   // high and low part of each row
  constexpr int kSectionBytes = kColumns * kWarpUnits * 2;  // of one warp: [column][4 units]
  constexpr int kSlotBytes = kFloatWarps * kSectionBytes;
  constexpr int kHiddenBytes = kCluster * kSlotBytes;
  constexpr uint32_t kGroupTraffic = kGroupSlots * kSlotBytes;
  constexpr uint32_t kStatisticsTraffic = kCluster * kRows * sizeof(float);
  // Blocks to which one warp sends statistics; of the smallest cluster only half of the warps do.
  constexpr int kWarpTargets = kCluster < kFloatWarps ? 1 : kCluster / kFloatWarps;
  constexpr int kRingBytes = kRows * 2 * kWarpUnits * 4;  // wx of one warp and step: [row][a, z][4]

  __shared__ alignas(128) uint8_t hidden[kBuffers][kHiddenBytes];
  __shared__ alignas(16) float statistics[kCluster][kRows];
  __shared__ alignas(16) float warp_sums[2][kRows][kFloatWarps];  // two in turn: one barrier a step
  __shared__ alignas(16) uint8_t ring[kRingSteps][kFloatWarps][kRingBytes];
  __shared__ alignas(8) uint64_t barriers[kBuffers * kGroups + 1];

  const Recurrence& layer = p.layer;
  const int hidden_size = static_cast<int>(layer.hidden), steps = static_cast<int>(layer.time);
  const auto* h0 = static_cast<const float*>(layer.h0);
  const auto* drop_mask = static_cast<const float*>(layer.drop_mask);
  const auto* ln_weight = static_cast<const float*>(layer.ln_weight);
  const auto* ln_bias = static_cast<const float*>(layer.ln_bias);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int gate = g / kWarpUnits;
  const uint32_t rank = cluster_rank();
  const int row0 = static_cast<int>(blockIdx.x / kCluster) * kRows;
  const int unit0 = static_cast<int>(rank) * kBlockUnits + warp * kWarpUnits;
  const int unit = unit0 + g % kWarpUnits;  // this lane's unit, for row c
  const bool in_range = unit0 < hidden_size;

  const uint32_t hidden_barrier = shared_address(&barriers[0]);
  const uint32_t statistics_barrier = shared_address(&barriers[kBuffers * kGroups]);
  if (threadIdx.x <= kBuffers * kGroups) mbarrier::init(shared_address(&barriers[threadIdx.x]));
  mbarrier::fence_init();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kGroups; i++)
      mbarrier::arrive(hidden_barrier + 8 * i);  // h0 needs no message
    for (int i = kGroups; i < kBuffers * kGroups; i++)
      mbarrier::expect(hidden_barrier + 8 * i, kGroupTraffic);
    if (kLayerNorm) mbarrier::expect(statistics_barrier, kStatisticsTraffic);
  }

  // Slot o of `hidden` belongs to block rank ^ o: senders and receivers use the same slot, and
  // every block starts with its own.
  for (int i = threadIdx.x; i < kHiddenBytes / 16; i += kFloatThreads) {
    const int row = i % kRows, section = i / kRows % kFloatWarps, slot = i / kRows / kFloatWarps;
    const int column = (rank ^ slot) * kBlockUnits + section * kWarpUnits;
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    if (h0 != nullptr && column < hidden_size)
      x = *reinterpret_cast<const float4*>(
          h0 + int64_t{locate_row(layer, row0 + row).index} * hidden_size + column);
    const SplitPair first = split(x.x, x.y);
    const SplitPair second = split(x.z, x.w);
    *reinterpret_cast<uint4*>(&hidden[0][i * 16]) =
        make_uint4(first.high, second.high, first.low, second.low);
  }
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(ring)) / 4; i += kFloatThreads)
    reinterpret_cast<uint32_t*>(ring)[i] = 0;  // stays so where units are padding

  // The two products of a slot take 16 units each. Lane c multiplies the units of sections c and
  // 4 + c: the order of k is free as long as both operands agree. First the floats, then, in their
  // place, the high and low parts.
  uint32_t weights[kCluster][2][4];
  float largest = 0.f;
#pragma unroll
  for (int o = 0; o < kCluster; o++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int column = (rank ^ o) * kBlockUnits + 16 * j + kWarpUnits * c;
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
      if (in_range && column < hidden_size)
        x = *reinterpret_cast<const float4*>(static_cast<const float*>(p.u) +
                                             (int64_t{gate} * hidden_size + unit) * hidden_size +
                                             column);
      weights[o][j][0] = __float_as_uint(x.x), weights[o][j][1] = __float_as_uint(x.y);
      weights[o][j][2] = __float_as_uint(x.z), weights[o][j][3] = __float_as_uint(x.w);
      largest = fmaxf(fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y))), fmaxf(fabsf(x.z), fabsf(x.w)));
    }
  }
  largest = max_lane_xor(max_lane_xor(largest, 1), 2);  // of the row
  const float scale = scale_for(largest);
#pragma unroll
  for (int o = 0; o < kCluster; o++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      uint32_t (&w)[4] = weights[o][j];
      const SplitPair first = split(__uint_as_float(w[0]) * scale, __uint_as_float(w[1]) * scale);
      const SplitPair second = split(__uint_as_float(w[2]) * scale, __uint_as_float(w[3]) * scale);
      w[0] = first.high, w[1] = first.low, w[2] = second.high, w[3] = second.low;
    }
  }
  float high_factor = inverse_of(scale);  // of the products
  float low_factor = high_factor / kLowScale;

  const Row row = locate_row(layer, row0 + c);
  const bool stored = row.valid && in_range && gate == 0;
  float h = 0.f, mask = 1.f, gamma_a = 1.f, gamma_z = 1.f, beta_a = 0.f, beta_z = 0.f;
  if (in_range) {
    if (h0 != nullptr) h = h0[int64_t{row.index} * hidden_size + unit];
    if (drop_mask != nullptr) mask = drop_mask[int64_t{row.index} * hidden_size + unit];
    if (kLayerNorm && ln_weight != nullptr)
      gamma_a = ln_weight[unit], gamma_z = ln_weight[hidden_size + unit];
    if (kLayerNorm && ln_bias != nullptr)
      beta_a = ln_bias[unit], beta_z = ln_bias[hidden_size + unit];
  }

  // Of units 2k, 2k + 1 and row c, lane g even sends the high parts and g odd the low parts, g < 4
  // to even slots and g >= 4 to odd ones.
  const uint32_t part = g & 1;
  uint32_t word_bytes = part ? 0x3276 : 0x5410;  // which bytes of its own and its neighbour's word
  const uint32_t first_target =
      shared_address(&hidden[0][gate * kSlotBytes + warp * kSectionBytes +
                                ((2 * c + part) * kWarpUnits + (g & 2)) * 2]);
  uint32_t target[kCluster / 2];
#pragma unroll
  for (int i = 0; i < kCluster / 2; i++)
    target[i] = remote_address(first_target + 2 * i * kSlotBytes, rank ^ (2 * i + gate));
  // Distances within a block's shared memory are the same in all blocks.
  uint32_t to_barrier = hidden_barrier - first_target;
  const uint32_t sum_rank = warp * kWarpTargets + (lane / kRows) % kWarpTargets;
  const bool sends_sum = lane < kWarpTargets * kRows && sum_rank < kCluster;
  const uint32_t sum_target =
      remote_address(shared_address(&statistics[rank][lane % kRows]), sum_rank % kCluster);
  const uint32_t sum_barrier = remote_address(statistics_barrier, sum_rank % kCluster);

  // wx: each of the first lanes copies the 16 bytes of one row and gate a step.
  const Sequence wx = wx_sequence(layer);
  const bool copies = in_range && lane < 2 * kRows;
  const Row copy_row = locate_row(layer, row0 + lane / 2 % kRows);
  const char* source = wx.at(layer, copy_row, 0, lane % 2 * hidden_size + unit0);
  int64_t source_step = wx.step_bytes(copy_row);
  uint32_t copy_target = shared_address(&ring[0][warp][lane * 16 % kRingBytes]);
  uint32_t wx_address = shared_address(&ring[0][warp][c * 32 + g % kWarpUnits * 4]);
  const auto fetch = [&](int n) {
    if (n < steps && copies) copy_async_16(copy_target + n % kRingSteps * sizeof(ring[0]), source);
    source += source_step;
    copy_async_commit();
  };
  __syncthreads();  // the ring is zero before copies land in it
#pragma unroll
  for (int n = 0; n < kRingSteps - 1; n++) fetch(n);

  const Sequence outputs = h_sequence(layer, p.h);
  char* output = const_cast<char*>(outputs.at(layer, row, 0, row.direction * hidden_size + unit));
  int64_t output_step = outputs.step_bytes(row);
  const bool stores_rho = kLayerNorm && rank == 0 && warp == 0 && g == 0 && row.valid;
  float* rho_output =
      stores_rho ? p.rho + int64_t{row.index} * steps + layer.time_of(row.index, 0) : nullptr;
  const int rho_step = row.direction ? -1 : 1;
  uint32_t hidden_address = shared_address(&hidden[0][0]) + c * kSectionBytes + g * kWarpUnits * 2;
  float inverse_size = 1.f / static_cast<float>(2 * hidden_size);
  float eps = static_cast<float>(layer.eps);
  const Activation activation = layer.activation;
  uint32_t sum_store = shared_address(&warp_sums[0][c][warp]);
  uint32_t sum_load = shared_address(&warp_sums[0][lane % kRows][0]);
  uint32_t statistics_load = shared_address(&statistics[g & 1][c]);
  pin(hidden_address), pin(to_barrier), pin(word_bytes), pin(high_factor), pin(low_factor);
  pin(copy_target), pin(wx_address), pin(sum_store), pin(sum_load), pin(statistics_load);
  pin(source_step), pin(output_step), pin(inverse_size), pin(eps);
  cluster_barrier();

#pragma unroll 1
  for (int t = 0; t < steps; t++) {
    const uint32_t buffer = t % kBuffers, parity = t / kBuffers & 1;
    float sums[4][4] = {};
#pragma unroll
    for (int n = 0; n < kGroups; n++) {
      const uint32_t barrier = hidden_barrier + 8 * (buffer * kGroups + n);
      mbarrier::wait(barrier, parity);
      if (threadIdx.x == 0) mbarrier::expect(barrier, kGroupTraffic);
      uint2 operand[kGroupSlots][2];
#pragma unroll
      for (int i = 0; i < kGroupSlots; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          operand[i][j] = load_uint2(hidden_address + buffer * kHiddenBytes +
                                     (n * kGroupSlots + i) * kSlotBytes + j * 4 * kSectionBytes);
#pragma unroll
      for (int i = 0; i < kGroupSlots; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          multiply<__half>(sums[(2 * i + j) % 4], weights[n * kGroupSlots + i][j], operand[i][j].x,
                           operand[i][j].y);
    }
    float r;
    {
      float total[3];
#pragma unroll
      for (int i = 0; i < 3; i++) total[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
      r = fmaf(total[1] + total[2], low_factor, total[0] * high_factor);
    }

    if constexpr (kLayerNorm) {
      float square = r * r;
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) square = add_lane_xor(square, offset);
      const uint32_t turn = t % 2 * sizeof(warp_sums[0]);
      if (g == 0) store_float(sum_store + turn, square);
      __syncthreads();
      if (sends_sum) {
        const float4 low = load_float4(sum_load + turn), high = load_float4(sum_load + turn + 16);
        const float sum =
            ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
        send(sum_target, sum_barrier, __float_as_uint(sum));
      }
    }

    // In the shadow of hop 1: the other row of U, this step's wx, and the copy for a later one.
    const float other = __shfl_xor_sync(0xffffffffu, r, 4 * kWarpUnits);
    float r_a = gate ? other : r, r_z = gate ? r : other;
    fetch(t + kRingSteps - 1);
    copy_async_wait<kRingSteps - 1>();
    __syncwarp();
    const uint32_t wx_now = wx_address + t % kRingSteps * sizeof(ring[0]);
    float wx_a = load_float(wx_now), wx_z = load_float(wx_now + 16);
    float rho = 1.f;
    if constexpr (kLayerNorm) {
      wx_a += beta_a, wx_z += beta_z;
      r_a *= gamma_a, r_z *= gamma_z;
      mbarrier::wait(statistics_barrier, t & 1);
      if (threadIdx.x == 0) mbarrier::expect(statistics_barrier, kStatisticsTraffic);
      float even = 0.f, odd = 0.f;  // two lanes, g and g ^ 1, share the sum over the blocks
#pragma unroll
      for (int i = 0; i < kCluster / 2; i++)
        (i % 2 ? odd : even) += load_float(statistics_load + i * 2 * sizeof(statistics[0]));
      rho = reciprocal_sqrt(fmaf(add_lane_xor(even + odd, 4), inverse_size, eps));
    }
    const float z = sigmoid(fmaf(r_z, rho, wx_z));
    const float candidate = fast_activate(activation, fmaf(r_a, rho, wx_a)) * mask;
    h = next_hidden(h, z, candidate);

    const float high = __half2float(__float2half_rn(h));
    const uint32_t parts = OperandTraits<__half>::pack(h, (h - high) * kLowScale);
    const uint32_t word = __byte_perm(parts, __shfl_xor_sync(0xffffffffu, parts, 4), word_bytes);
    const uint32_t next = (t + 1) % kBuffers;
#pragma unroll
    for (int i = 0; i < kCluster / 2; i++)
      send(target[i] + next * kHiddenBytes,
           target[i] + to_barrier + 8 * (next * kGroups + 2 * i / kGroupSlots) - 2 * i * kSlotBytes,
           word);
    if (stored) *reinterpret_cast<float*>(output) = h;
    output += output_step;
    if (stores_rho) {
      *rho_output = rho;
      rho_output += rho_step;
    }
  }
  for (int n = 0; n < kGroups; n++)
    mbarrier::wait(hidden_barrier + 8 * (steps % kBuffers * kGroups + n), steps / kBuffers & 1);
  cluster_barrier();
#endif
}

template <int kCluster>
cudaError_t launch_forward(const PersistentForward& p, cudaStream_t stream) {
  const auto kernel = p.layer.layer_norm ? forward_float_kernel<kCluster, true>
                                         : forward_float_kernel<kCluster, false>;
  return ClusterKernel<PersistentForward>{kernel, kCluster, kFloatThreads}.run(
      ceil_div(p.layer.rows(), kRows), p, stream);
}

template <int kCluster>
int resident_clusters() {
  return ClusterKernel<PersistentForward>{forward_float_kernel<kCluster, true>, kCluster,
                                          kFloatThreads}
      .resident();
}

}  // namespace

int resident_clusters_float(int padded) {
  return padded == 128   ? resident_clusters<4>()
         : padded == 256 ? resident_clusters<8>()
         : padded == 512 ? resident_clusters<16>()
                         : resident_clusters_wide_float();
}

cudaError_t run_forward_float(const PersistentForward& p, cudaStream_t stream) {
  switch (padded_hidden(p.layer.hidden)) {
    case 128:
      return launch_forward<4>(p, stream);
    case 256:
      return launch_forward<8>(p, stream);
    case 512:
      return launch_forward<16>(p, stream);
    case kWideHidden:
      return run_forward_wide_float(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace sb_fast_sligru
