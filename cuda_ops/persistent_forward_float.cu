// The forward recurrence of persistent_forward.cu with float32 operands, for H <= 512. Its two hops
// and buffers of h are the same; the products are those of persistent_float.cuh.
//
// Block k of a cluster owns units 32k..32k+31, four octets. Its warps form two teams: each holds
// the rows of Uc of two octets in registers for the whole sequence, as tiles of one gate of one
// octet, and its four warps split K: warp i multiplies what the blocks of the slots i modulo 4
// sent. So a warp reads a quarter of h from shared memory; with all of h in every warp these reads
// were a third of a step. When the partial sums have met in shared memory, warps 2j and 2j + 1 both
// compute octet j, lane 4g + c unit g of row c, and each sends the new state to half of the blocks.
//
// So a block that has all of h knows that half of the warps of every other block, not that all of
// them, are done with the step. What a slow warp may still read then has two buffers in turn: the
// statistics (re-used only after all statistics of the step between, which a block sends after its
// __syncthreads) and, in a Li-GRU, the partial sums (re-used only after the team's barrier of the
// step between; with the norm, the __syncthreads of the same step orders them).
#include "cluster_launch.cuh"
#include "persistent_float.cuh"
#include "persistent_wide_float.cuh"

namespace sb_fast_sligru {
namespace {

template <int kCluster, bool kLayerNorm>
__global__ void __launch_bounds__(kFloatThreads, 1)
    forward_float_kernel(const __grid_constant__ PersistentForward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  constexpr int kTeamWarps = 4, kTeamOctets = 2, kOctets = 4;
  constexpr int kSlots = kCluster / kTeamWarps;  // that one warp multiplies
  constexpr int kBuffers = kLayerNorm ? 1 : 2;
  // h arrives under several mbarriers, so that the product starts on the first.
  constexpr int kGroups = kSlots, kGroupSlots = kCluster / kGroups;
  constexpr int kSectionBytes = 2 * kRows * 8 * 2;  // an octet: [row, high or low][8 units]
  constexpr int kSlotBytes = kOctets * kSectionBytes;
  constexpr int kHiddenBytes = kCluster * kSlotBytes;
  // Blocks to which one warp sends statistics; of the smallest cluster only half of the warps do.
  constexpr int kWarpTargets = kCluster < kFloatWarps ? 1 : kCluster / kFloatWarps;
  constexpr int kRingBytes = kRows * 2 * 8 * 4;  // wx of an octet and step: [row][a, z][8 units]

  __shared__ alignas(128) uint8_t hidden[kBuffers][kHiddenBytes];
  __shared__ alignas(16) float statistics[2][kCluster][kRows];
  __shared__ alignas(16) float octet_sums[2][kRows][kOctets];  // two in turn: one barrier a step
  // Of r: [buffer][octet][warp][lane](a, z).
  __shared__ alignas(16) float2 partial[kBuffers][kOctets][kTeamWarps][32];
  __shared__ alignas(16) uint8_t ring[kRingSteps][kOctets][kRingBytes];
  __shared__ alignas(8) uint64_t barriers[kBuffers * kGroups + 1];

  const Recurrence& layer = p.layer;
  const int hidden_size = static_cast<int>(layer.hidden), steps = static_cast<int>(layer.time);
  const auto* h0 = static_cast<const float*>(layer.h0);
  const auto* drop_mask = static_cast<const float*>(layer.drop_mask);
  const auto* ln_weight = static_cast<const float*>(layer.ln_weight);
  const auto* ln_bias = static_cast<const float*>(layer.ln_bias);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int team = warp / kTeamWarps, part = warp % kTeamWarps, octet = warp / 2, half = warp % 2;
  const uint32_t rank = cluster_rank();
  const int rows = cluster_rows(layer, kCluster);
  const int row0 = static_cast<int>(blockIdx.x / kCluster) * rows;
  const int block_unit0 = static_cast<int>(rank) * kBlockUnits;
  const int unit0 = block_unit0 + octet * 8, unit = unit0 + g;  // this lane's unit, for row c
  const bool in_range = unit0 < hidden_size;

  const uint32_t hidden_barrier = shared_address(&barriers[0]);
  const uint32_t statistics_barrier = shared_address(&barriers[kBuffers * kGroups]);
  const uint32_t group_traffic = kGroupSlots * kSlotBytes / kRows * rows;
  const uint32_t statistics_traffic = kCluster * sizeof(float) * rows;
  if (threadIdx.x <= kBuffers * kGroups) mbarrier::init(shared_address(&barriers[threadIdx.x]));
  mbarrier::fence_init();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kGroups; i++)
      mbarrier::arrive(hidden_barrier + 8 * i);  // h0 needs no message
    for (int i = kGroups; i < kBuffers * kGroups; i++)
      mbarrier::expect(hidden_barrier + 8 * i, group_traffic);
    if (kLayerNorm) mbarrier::expect(statistics_barrier, statistics_traffic);
  }

  // Slot o of `hidden` belongs to block rank ^ o: senders and receivers use the same slot, and
  // every block starts with its own.
  for (int i = threadIdx.x; i < kHiddenBytes / 16; i += kFloatThreads) {
    const int pair = i % 2, row = i / 2 % kRows, section = i / 2 / kRows;  // 4 units, high and low
    const int column = static_cast<int>(rank ^ (section / kOctets)) * kBlockUnits +
                       section % kOctets * 8 + pair * 4;
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    if (h0 != nullptr && column < hidden_size)
      x = *reinterpret_cast<const float4*>(
          h0 + int64_t{locate_row(layer, row0 + row).index} * hidden_size + column);
    const SplitPair first = split(x.x, x.y), second = split(x.z, x.w);
    uint2* to = reinterpret_cast<uint2*>(&hidden[0][section * kSectionBytes + row * 32 + pair * 8]);
    to[0] = make_uint2(first.high, second.high);
    to[2] = make_uint2(first.low, second.low);
  }
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(ring)) / 4; i += kFloatThreads)
    reinterpret_cast<uint32_t*>(ring)[i] = 0;  // stays so where units are padding

  // Lane c multiplies units 8c..8c+7 of every slot, four in each of two products: the order of k is
  // free as long as both operands agree. First the floats, then, in their place, their parts.
  uint32_t weights[kSlots][2][kTeamOctets][2][4];
  float factor[kTeamOctets][2];  // of the products
#pragma unroll
  for (int e = 0; e < kTeamOctets; e++) {
    const int tile_unit = block_unit0 + (team * kTeamOctets + e) * 8 + g;
#pragma unroll
    for (int gate = 0; gate < 2; gate++) {
      float largest = 0.f;
#pragma unroll
      for (int i = 0; i < kSlots; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int column =
              static_cast<int>(rank ^ (kTeamWarps * i + part)) * kBlockUnits + 8 * c + 4 * j;
          float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
          if (tile_unit < hidden_size && column < hidden_size)
            x = *reinterpret_cast<const float4*>(
                static_cast<const float*>(p.u) +
                (int64_t{gate} * hidden_size + tile_unit) * hidden_size + column);
          uint32_t (&w)[4] = weights[i][j][e][gate];
          w[0] = __float_as_uint(x.x), w[1] = __float_as_uint(x.y);
          w[2] = __float_as_uint(x.z), w[3] = __float_as_uint(x.w);
          largest =
              fmaxf(fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y))), fmaxf(fabsf(x.z), fabsf(x.w)));
        }
      }
      const float scale = scale_for(max_lane_xor(max_lane_xor(largest, 1), 2));  // of the row
      factor[e][gate] = inverse_of(scale);
#pragma unroll
      for (int i = 0; i < kSlots; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          uint32_t (&w)[4] = weights[i][j][e][gate];
          const SplitPair first =
              split(__uint_as_float(w[0]) * scale, __uint_as_float(w[1]) * scale);
          const SplitPair second =
              split(__uint_as_float(w[2]) * scale, __uint_as_float(w[3]) * scale);
          w[0] = first.high, w[1] = first.low, w[2] = second.high, w[3] = second.low;
        }
    }
  }

  const Row row = locate_row(layer, row0 + c);
  const bool stored = row.valid && c < rows && in_range && half == 0;
  float h = 0.f, mask = 1.f, gamma_a = 1.f, gamma_z = 1.f, beta_a = 0.f, beta_z = 0.f;
  if (in_range) {
    if (h0 != nullptr) h = h0[int64_t{row.index} * hidden_size + unit];
    if (drop_mask != nullptr) mask = drop_mask[int64_t{row.index} * hidden_size + unit];
    if (kLayerNorm && ln_weight != nullptr)
      gamma_a = ln_weight[unit], gamma_z = ln_weight[hidden_size + unit];
    if (kLayerNorm && ln_bias != nullptr)
      beta_a = ln_bias[unit], beta_z = ln_bias[hidden_size + unit];
  }

  // After transpose() lane (g, c) holds units 2c, 2c + 1 of column g, the high (g even) or low part
  // of row g / 2. Warp 2j sends octet j to the even slots, warp 2j + 1 to the odd ones.
  const bool sends_hidden = g < 2 * rows;
  const uint32_t first_target =
      shared_address(&hidden[0][half * kSlotBytes + octet * kSectionBytes + lane * 4]);
  uint32_t target[kCluster / 2];
#pragma unroll
  for (int i = 0; i < kCluster / 2; i++)
    target[i] = remote_address(first_target + 2 * i * kSlotBytes, rank ^ (2 * i + half));
  // Distances within a block's shared memory are the same in all blocks.
  uint32_t to_barrier = hidden_barrier - first_target;
  const uint32_t sum_rank = warp * kWarpTargets + (lane / kRows) % kWarpTargets;
  const bool sends_sum = lane < kWarpTargets * kRows && sum_rank < kCluster && lane % kRows < rows;
  const uint32_t sum_target =
      remote_address(shared_address(&statistics[0][rank][lane % kRows]), sum_rank % kCluster);
  const uint32_t sum_barrier = remote_address(statistics_barrier, sum_rank % kCluster);

  // wx of an octet: the first lanes of warp 2j each copy one 16-byte piece a step. A team meets at
  // its barrier between the wait for a copy and its use.
  const Sequence wx = wx_sequence(layer);
  const bool copies = in_range && half == 0 && lane < 4 * kRows;
  const Row copy_row = locate_row(layer, row0 + lane / 4 % kRows);
  const char* source =
      wx.at(layer, copy_row, 0, lane / 2 % 2 * hidden_size + unit0) + lane % 2 * 16;
  int64_t source_step = wx.step_bytes(copy_row);
  uint32_t copy_target = shared_address(&ring[0][octet][lane * 16 % kRingBytes]);
  uint32_t wx_address = shared_address(&ring[0][octet][c * 64 + g * 4]);
  const auto fetch = [&](int n) {
    if (n < steps && copies) copy_async_16(copy_target + n % kRingSteps * sizeof(ring[0]), source);
    source += source_step;
    copy_async_commit();
  };
  __syncthreads();  // the ring is zero before copies land in it
#pragma unroll
  for (int n = 0; n < kRingSteps - 1; n++) fetch(n);
  copy_async_wait<kRingSteps - 2>();

  const Sequence outputs = h_sequence(layer, p.h);
  char* output = const_cast<char*>(outputs.at(layer, row, 0, row.direction * hidden_size + unit));
  int64_t output_step = outputs.step_bytes(row);
  const bool stores_rho = kLayerNorm && rank == 0 && warp == 0 && g == 0 && row.valid && c < rows;
  float* rho_output =
      stores_rho ? p.rho + int64_t{row.index} * steps + layer.time_of(row.index, 0) : nullptr;
  const int rho_step = row.direction ? -1 : 1;
  uint32_t hidden_address =
      shared_address(&hidden[0][part * kSlotBytes]) + c * kSectionBytes + g * 16;
  uint32_t partial_store = shared_address(&partial[0][team * kTeamOctets][part][lane]);
  uint32_t partial_load = shared_address(&partial[0][octet][0][lane]);
  float inverse_size = 1.f / static_cast<float>(2 * hidden_size);
  float eps = static_cast<float>(layer.eps);
  const Activation activation = layer.activation;
  uint32_t sum_store = shared_address(&octet_sums[0][c][octet]);
  uint32_t sum_load = shared_address(&octet_sums[0][lane % kRows][0]);
  uint32_t statistics_load = shared_address(&statistics[0][g & 1][c]);
  pin(hidden_address), pin(to_barrier), pin(partial_store), pin(partial_load);
  pin(copy_target), pin(wx_address), pin(sum_store), pin(sum_load), pin(statistics_load);
  pin(source_step), pin(output_step), pin(inverse_size), pin(eps);
  cluster_barrier();

#pragma unroll 1
  for (int t = 0; t < steps; t++) {
    const uint32_t buffer = t % kBuffers, parity = t / kBuffers & 1;
    float sums[kTeamOctets][2][4] = {};
#pragma unroll
    for (int n = 0; n < kGroups; n++) {
      const uint32_t barrier = hidden_barrier + 8 * (buffer * kGroups + n);
      mbarrier::wait(barrier, parity);
      if (threadIdx.x == 0) mbarrier::expect(barrier, group_traffic);
      const float4 operand =
          load_float4(hidden_address + buffer * kHiddenBytes + n * kGroupSlots * kSlotBytes);
#pragma unroll
      for (int e = 0; e < kTeamOctets; e++)
#pragma unroll
        for (int gate = 0; gate < 2; gate++)
          multiply<__half>(sums[e][gate], weights[n][0][e][gate], __float_as_uint(operand.x),
                           __float_as_uint(operand.y));
#pragma unroll
      for (int e = 0; e < kTeamOctets; e++)
#pragma unroll
        for (int gate = 0; gate < 2; gate++)
          multiply<__half>(sums[e][gate], weights[n][1][e][gate], __float_as_uint(operand.z),
                           __float_as_uint(operand.w));
    }
    // The team's partial sums meet.
    const uint32_t partial_buffer = buffer * sizeof(partial[0]);
#pragma unroll
    for (int e = 0; e < kTeamOctets; e++) {
      float r[2];
#pragma unroll
      for (int gate = 0; gate < 2; gate++) {
        const float (&sum)[4] = sums[e][gate];
        r[gate] = fmaf(sum[1] + sum[2], 1.f / kLowScale, sum[0]) * factor[e][gate];
      }
      store_float2(partial_store + partial_buffer + e * sizeof(partial[0][0]), r[0], r[1]);
    }
    named_barrier(1 + team, 32 * kTeamWarps);
    float r_a, r_z;
    {
      float2 parts[kTeamWarps];
#pragma unroll
      for (int i = 0; i < kTeamWarps; i++)
        parts[i] = load_float2(partial_load + partial_buffer + i * sizeof(partial[0][0][0]));
      r_a = (parts[0].x + parts[1].x) + (parts[2].x + parts[3].x);
      r_z = (parts[0].y + parts[1].y) + (parts[2].y + parts[3].y);
    }

    const uint32_t statistics_buffer = t % 2 * sizeof(statistics[0]);
    if constexpr (kLayerNorm) {
      float square = fmaf(r_a, r_a, r_z * r_z);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) square = add_lane_xor(square, offset);
      const uint32_t turn = t % 2 * sizeof(octet_sums[0]);
      if (g == 0 && half == 0) store_float(sum_store + turn, square);
      __syncthreads();
      if (sends_sum) {
        const float4 sums = load_float4(sum_load + turn);
        send(sum_target + statistics_buffer, sum_barrier,
             __float_as_uint((sums.x + sums.y) + (sums.z + sums.w)));
      }
    }

    // In the shadow of hop 1: this step's wx, and the copy for a later one.
    fetch(t + kRingSteps - 1);
    copy_async_wait<kRingSteps - 2>();
    const uint32_t wx_now = wx_address + t % kRingSteps * sizeof(ring[0]);
    float wx_a = load_float(wx_now), wx_z = load_float(wx_now + 32);
    float rho = 1.f;
    if constexpr (kLayerNorm) {
      wx_a += beta_a, wx_z += beta_z;
      r_a *= gamma_a, r_z *= gamma_z;
      mbarrier::wait(statistics_barrier, t & 1);
      if (threadIdx.x == 0) mbarrier::expect(statistics_barrier, statistics_traffic);
      float even = 0.f, odd = 0.f;  // two lanes, g and g ^ 1, share the sum over the blocks
#pragma unroll
      for (int i = 0; i < kCluster / 2; i++)
        (i % 2 ? odd : even) +=
            load_float(statistics_load + statistics_buffer + i * 2 * sizeof(statistics[0][0]));
      rho = reciprocal_sqrt(fmaf(add_lane_xor(even + odd, 4), inverse_size, eps));
    }
    const float z = sigmoid(fmaf(r_z, rho, wx_z));
    const float candidate = fast_activate(activation, fmaf(r_a, rho, wx_a)) * mask;
    h = next_hidden(h, z, candidate);

    const float high = __half2float(__float2half_rn(h));
    const uint32_t word = transpose(OperandTraits<__half>::pack(h, (h - high) * kLowScale));
    const uint32_t next = (t + 1) % kBuffers;
    if (sends_hidden) {
#pragma unroll
      for (int i = 0; i < kCluster / 2; i++)
        send(target[i] + next * kHiddenBytes,
             target[i] + to_barrier + 8 * (next * kGroups + 2 * i / kGroupSlots) -
                 2 * i * kSlotBytes,
             word);
    }
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
  return run_clusters(ClusterKernel<PersistentForward>{kernel, kCluster, kFloatThreads}, p, stream);
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
