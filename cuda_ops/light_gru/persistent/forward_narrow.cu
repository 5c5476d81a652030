// The forward recurrence in one launch, for H <= 512 in 16-bit types.
//
//   r = Uc h_{t-1};  rho = rsqrt(mean(r^2) + eps);  a, s = wx_t + gamma r rho + beta   (SLi-GRU)
//   z = sigmoid(s);  c = act(a) mask;  h_t = z h_{t-1} + (1 - z) c
//
// (Moumen and Parcollet 2023, arXiv 2302.10144; Uc = U minus its column means, so that LayerNorm is
// this RMS norm. Li-GRU, Ravanelli et al. 2018, arXiv 1803.10225: a, s = wx_t + U h_{t-1}.)
//
// Block k of a cluster owns 32 units from 32k on, or 64 from 64k on, warp w of it units 8w..8w+7 of
// those: one 16-row tile of Uc (row g: candidate, row g + 8: gate of unit g), all of K, in
// registers for the whole sequence. One step:
//   wait for h -> product -> r^2 over lanes, warps -> send to all blocks     (hop 1, SLi-GRU only)
//   -> sum over blocks -> rho, gates -> h, in float32 in its lane -> send its 16-bit form  (hop 2)
// Buffers (see exchange.cuh): SLi-GRU needs one of each, since hop 1 proves that the reads of h are
// over and hop 2 that the reads of the statistics are; Li-GRU has hop 2 alone and alternates two
// buffers.
#include "light_gru/persistent/geometry.cuh"
#include "light_gru/persistent/launch.h"

namespace sb_fast_sligru {
namespace {

template <class T, int kCluster, int kUnits, bool kLayerNorm>
__global__ void __launch_bounds__(kThreads<kUnits>, kBlockUnits * 2 / kUnits)
    forward_kernel(const __grid_constant__ PersistentForward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  constexpr int kBuffers = kLayerNorm ? 1 : 2;
  // h arrives under so many mbarriers, so that the product starts on the first.
  constexpr int kGroups = kUnits == kBlockUnits ? 2 : 4;
  constexpr int kBlockWarps = kUnits / 8, kBlockParts = kUnits / kBlockUnits;
  constexpr int kGroupSlots = kCluster / kGroups;
  constexpr int kSectionBytes = kRows * 8 * 2;  // 8 units of one warp: [row][8 units]
  constexpr int kSlotBytes = kBlockWarps * kSectionBytes;
  constexpr int kHiddenBytes = kCluster * kSlotBytes;
  constexpr uint32_t kGroupTraffic = kGroupSlots * kSlotBytes;
  constexpr uint32_t kStatisticsTraffic = kCluster * kRows * sizeof(float);
  constexpr int kWarpTargets = kCluster / kBlockWarps;  // blocks to which a warp sends statistics
  // A part of a block: as many units as the four lanes of a column multiply, 16 bytes each.
  constexpr int kPartBytes = kSlotBytes / kBlockParts, kParts = kCluster * kBlockParts;
  constexpr int kRingBytes = kRows * 2 * 8 * 4;  // wx of one warp and step: [row][a, z][8 units]

  __shared__ alignas(128) uint8_t hidden[kBuffers][kHiddenBytes];
  __shared__ alignas(16) float statistics[kCluster][kRows];
  __shared__ alignas(16) float warp_sums[2][kBlockWarps][kRows];  // two in turn: one barrier a step
  __shared__ alignas(16) uint8_t ring[kRingSteps][kBlockWarps][kRingBytes];
  __shared__ alignas(8) uint64_t barriers[kBuffers * kGroups + 1];

  const Recurrence& layer = p.layer;
  const int hidden_size = static_cast<int>(layer.hidden), steps = static_cast<int>(layer.time);
  const auto* h0 = static_cast<const float*>(layer.h0);
  const auto* drop_mask = static_cast<const float*>(layer.drop_mask);
  const auto* ln_weight = static_cast<const float*>(layer.ln_weight);
  const auto* ln_bias = static_cast<const float*>(layer.ln_bias);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const uint32_t rank = cluster_rank();
  const int row0 = static_cast<int>(blockIdx.x / kCluster) * kRows;
  const int unit0 = static_cast<int>(rank) * kUnits + warp * 8;  // first unit of the warp
  const int unit = unit0 + g;                                    // this lane's unit, for row c
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
  // every block starts with its own. Within a 16-byte row of a section lie 8 units; rows are
  // permuted so that the four sections of a part are read without bank conflicts.
  const auto section_row = [](int row, int section) {
    return section * kSectionBytes + (row ^ (section >> 1)) * 16;
  };
  for (int i = threadIdx.x; i < kHiddenBytes / 4; i += kThreads<kUnits>) {
    const int row = i / (kHiddenBytes / 4 / kRows), pair = i % (kHiddenBytes / 4 / kRows);
    const int k = 2 * pair, part = k / kBlockUnits, section = k % kBlockUnits / 8;
    const int column = (rank ^ (k / kUnits)) * kUnits + k % kUnits;
    float2 value = make_float2(0.f, 0.f);
    if (h0 != nullptr && column < hidden_size)
      value = *reinterpret_cast<const float2*>(
          h0 + int64_t{locate_row(layer, row0 + row).index} * hidden_size + column);
    *reinterpret_cast<uint32_t*>(
        &hidden[0][part * kPartBytes + section_row(row, section) + k % 8 * 2]) =
        OperandTraits<T>::pack(value.x, value.y);
  }
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(ring)) / 4; i += kThreads<kUnits>)
    reinterpret_cast<uint32_t*>(ring)[i] = 0;  // stays so where units are padding

  // Lane c multiplies units 8c..8c+7 of every part: the order of k is free as long as both operands
  // agree.
  uint32_t weights[kParts][2][4];
#pragma unroll
  for (int o = 0; o < kParts; o++) {
    const int column = (rank ^ (o / kBlockParts)) * kUnits + o % kBlockParts * kBlockUnits + 8 * c;
    uint4 candidate = make_uint4(0, 0, 0, 0), gate = candidate;
    if (in_range && column < hidden_size) {
      const T* u = static_cast<const T*>(p.u) + int64_t{unit} * hidden_size + column;
      candidate = *reinterpret_cast<const uint4*>(u);
      gate = *reinterpret_cast<const uint4*>(u + int64_t{hidden_size} * hidden_size);
    }
    weights[o][0][0] = candidate.x, weights[o][0][1] = gate.x;
    weights[o][0][2] = candidate.y, weights[o][0][3] = gate.y;
    weights[o][1][0] = candidate.z, weights[o][1][1] = gate.z;
    weights[o][1][2] = candidate.w, weights[o][1][3] = gate.w;
  }

  const Row row = locate_row(layer, row0 + c);
  const bool stored = row.valid && in_range;
  float h = 0.f, mask = 1.f, gamma_a = 1.f, gamma_z = 1.f, beta_a = 0.f, beta_z = 0.f;
  if (in_range) {
    if (h0 != nullptr) h = h0[int64_t{row.index} * hidden_size + unit];
    if (drop_mask != nullptr) mask = drop_mask[int64_t{row.index} * hidden_size + unit];
    if (kLayerNorm && ln_weight != nullptr)
      gamma_a = ln_weight[unit], gamma_z = ln_weight[hidden_size + unit];
    if (kLayerNorm && ln_bias != nullptr)
      beta_a = ln_bias[unit], beta_z = ln_bias[hidden_size + unit];
  }

  // After transpose() lane (g, c) holds units 2c, 2c + 1 of column g, row g / 2; its twin lane (g ^
  // 1, c) holds the same and serves the other half of the blocks.
  uint32_t target[kCluster / 2], target_barrier[kCluster / 2];
  const int part = kBlockParts == 1 ? 0 : warp / kWarps;  // of the own slot
#pragma unroll
  for (int i = 0; i < kCluster / 2; i++) {
    const uint32_t slot = 2 * i + (g & 1);
    target[i] = remote_address(
        shared_address(&hidden[0][slot * kSlotBytes + part * kPartBytes +
                                  section_row(g >> 1, warp - kWarps * part) + c * 4]),
        rank ^ slot);
    target_barrier[i] = remote_address(hidden_barrier + 8 * (slot / kGroupSlots), rank ^ slot);
  }
  const uint32_t sum_rank = warp * kWarpTargets + (lane / kRows) % kWarpTargets;
  const uint32_t sum_target =
      remote_address(shared_address(&statistics[rank][lane % kRows]), sum_rank);
  const uint32_t sum_barrier = remote_address(statistics_barrier, sum_rank);

  // wx: each of the first lanes copies one 16-byte piece a step.
  const Sequence wx = wx_sequence(layer);
  const int wx_bytes = wx.bytes(), pieces = wx_bytes / 2;  // pieces of 8 units
  const bool copies = in_range && lane < 2 * kRows * pieces;
  const Row copy_row = locate_row(layer, row0 + (lane / (2 * pieces)) % kRows);
  const char* source =
      wx.at(layer, copy_row, 0, lane / pieces % 2 * hidden_size + unit0) + lane % pieces * 16;
  int64_t source_step = wx.step_bytes(copy_row);
  uint32_t copy_target = shared_address(&ring[0][warp][lane * 16 % kRingBytes]);
  uint32_t wx_address = shared_address(&ring[0][warp][0]) + (c * 16 + g) * wx_bytes;
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
  const bool wx_float = wx.is_float(), h_float = outputs.is_float();
  const bool stores_rho = kLayerNorm && rank == 0 && warp == 0 && g == 0 && row.valid;
  float* rho_output =
      stores_rho ? p.rho + int64_t{row.index} * steps + layer.time_of(row.index, 0) : nullptr;
  const int rho_step = row.direction ? -1 : 1;
  uint32_t hidden_address = shared_address(&hidden[0][0]) + section_row(g >> 1, c);
  const bool reads_hidden = (g & 1) == 0;  // columns 2n + 1 of the product are never used
  float inverse_size = 1.f / static_cast<float>(2 * hidden_size);
  float eps = static_cast<float>(layer.eps);
  const Activation activation = layer.activation;
  uint32_t sum_store = shared_address(&warp_sums[0][warp][c]);
  uint32_t sum_load = shared_address(&warp_sums[0][0][lane % kRows]);
  uint32_t statistics_load = shared_address(&statistics[g & 1][c]);
  pin(hidden_address);
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
      constexpr int kGroupParts = kParts / kGroups;
      uint4 operand[kGroupParts];
#pragma unroll
      for (int i = 0; i < kGroupParts; i++)
        load_uint4_if(operand[i],
                      hidden_address + buffer * kHiddenBytes + (n * kGroupParts + i) * kPartBytes,
                      reads_hidden);
#pragma unroll
      for (int i = 0; i < kGroupParts; i++) {
        const int o = n * kGroupParts + i;
        multiply<T>(sums[2 * o % 4], weights[o][0], operand[i].x, operand[i].y);
        multiply<T>(sums[(2 * o + 1) % 4], weights[o][1], operand[i].z, operand[i].w);
      }
    }
    float r_a = (sums[0][0] + sums[1][0]) + (sums[2][0] + sums[3][0]);
    float r_z = (sums[0][2] + sums[1][2]) + (sums[2][2] + sums[3][2]);

    if constexpr (kLayerNorm) {
      float square = fmaf(r_a, r_a, r_z * r_z);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) square = add_lane_xor(square, offset);
      const uint32_t turn = t % 2 * sizeof(warp_sums[0]);
      if (g == 0) store_float(sum_store + turn, square);
      __syncthreads();
      if (lane < kWarpTargets * kRows) {
        constexpr int kStride = sizeof(warp_sums[0][0]);
        const uint32_t from = sum_load + turn;
        const auto sum_of_4 = [&](uint32_t from) {
          return (load_float(from) + load_float(from + kStride)) +
                 (load_float(from + 2 * kStride) + load_float(from + 3 * kStride));
        };
        float sum = sum_of_4(from);
        if constexpr (kBlockWarps == 8) sum += sum_of_4(from + 4 * kStride);
        send(sum_target, sum_barrier, __float_as_uint(sum));
      }
    }

    // In the shadow of hop 1: this step's wx, and the copy for a later one, whose place in the ring
    // the warp has read in the step before.
    copy_async_wait<kRingSteps - 2>();
    __syncwarp();
    fetch(t + kRingSteps - 1);
    const uint32_t wx_now = wx_address + t % kRingSteps * sizeof(ring[0]);
    float wx_a, wx_z;
    if (wx_float) {
      wx_a = load_float(wx_now);
      wx_z = load_float(wx_now + 32);
    } else {
      wx_a = load_operand<T>(wx_now);
      wx_z = load_operand<T>(wx_now + 16);
    }
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
    const float z = fast_sigmoid(fmaf(r_z, rho, wx_z));
    const float candidate = fast_activate(activation, fmaf(r_a, rho, wx_a)) * mask;
    h = next_hidden(h, z, candidate);

    const uint32_t words = transpose(OperandTraits<T>::pack(h, h));
    const uint32_t next = (t + 1) % kBuffers;
#pragma unroll
    for (int i = 0; i < kCluster / 2; i++)
      send(target[i] + next * kHiddenBytes, target_barrier[i] + next * kGroups * 8, words);
    if (stored) {
      if (h_float)
        *reinterpret_cast<float*>(output) = h;
      else
        *reinterpret_cast<uint16_t*>(output) = to_bits<T>(h);
    }
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

template <class T, int kCluster, int kUnits>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  const auto kernel = p.layer.layer_norm ? forward_kernel<T, kCluster, kUnits, true>
                                         : forward_kernel<T, kCluster, kUnits, false>;
  const ClusterKernel<PersistentForward> in_clusters = {kernel, kCluster, kThreads<kUnits>};
  return in_clusters.run(p.choice.clusters(p.layer.rows()), p, stream);
}

template <class T>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
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

cudaError_t run_forward_narrow(const PersistentForward& p, cudaStream_t stream) {
  return p.layer.operand_type == DType::kBFloat16 ? launch<__nv_bfloat16>(p, stream)
                                                  : launch<__half>(p, stream);
}

}  // namespace sb_fast_sligru
