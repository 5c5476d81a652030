// The forward recurrence of forward_wide.cu in float32: same equations, same two hops,
// same division of the work. What differs is in wide_float.cuh.
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/wide_float.cuh"

namespace sb_fast_sligru {
namespace {

constexpr int kTiles = 4;   // tiles of a warp, warps of a group
constexpr int kGroups = 4;  // mbarriers under which h arrives
constexpr int kGroupSlots = kWideCluster / kGroups;
constexpr int kRowBytes = 8 * 4;                        // 8 units: 4 times high, high, low, low
constexpr int kSectionBytes = kWideRows * kRowBytes;    // 8 units of one warp
constexpr int kSlotBytes = kWideWarps * kSectionBytes;  // what one block sends
constexpr int kHiddenBytes = kWideCluster * kSlotBytes;
constexpr uint32_t kGroupTraffic = kGroupSlots * kSlotBytes;
constexpr uint32_t kStatisticsTraffic = kWideCluster * kWideRows * sizeof(float);
constexpr int kPartialBytes = 32 * 16;                      // a tile's partial sums of one warp
constexpr int kRingBytes = kWideRows * 2 * kWideUnits * 4;  // wx of a block and step
constexpr int kStateStride = kWideUnits + 4;                // float; against bank conflicts

static_assert(kBatchFragments == kTiles);  // a batch: two tiles (high, low) of one slot of h

template <class Place, bool kLayerNorm>
struct Shared {
  static constexpr int kBuffers = kLayerNorm ? 1 : 2;
  alignas(1024) uint8_t hidden[kBuffers][kHiddenBytes];
  uint8_t fragments[Place::kShared][kWideWarps][kFragmentBytes];
  uint8_t streamed[Place::kRing][kWideWarps][kFragmentBytes];
  uint8_t partial[kBuffers][kWideWarps][kTiles - 1][kPartialBytes];  // [tile][sender ^ own]
  float states[2][kWideRows][kStateStride];
  uint8_t ring[2][kRingBytes];
  float statistics[kWideCluster][kWideRows];
  float warp_sums[2][kWideRows][kWideWarps];  // two in turn: one barrier a step
  uint64_t barriers[kBuffers * kGroups + 1];
};

template <class Place, bool kLayerNorm>
__global__ void __launch_bounds__(kWideThreads, 1)
    forward_wide_float_kernel(const __grid_constant__ PersistentForward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  constexpr int kBuffers = Shared<Place, kLayerNorm>::kBuffers;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<Place, kLayerNorm>*>(shared_bytes);

  const Recurrence& layer = p.layer;
  const int hidden_size = static_cast<int>(layer.hidden), steps = static_cast<int>(layer.time);
  const auto* h0 = static_cast<const float*>(layer.h0);
  const auto* drop_mask = static_cast<const float*>(layer.drop_mask);
  const auto* ln_weight = static_cast<const float*>(layer.ln_weight);
  const auto* ln_bias = static_cast<const float*>(layer.ln_bias);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int group = warp / kTiles, quarter = warp % kTiles;
  uint32_t rank = cluster_rank();
  const int row0 = static_cast<int>(blockIdx.x / kWideCluster) * kWideRows;
  const int block_unit0 = static_cast<int>(rank) * kWideUnits;
  const int unit = block_unit0 + warp * 8 + g;
  const bool in_range = block_unit0 + warp * 8 < hidden_size;

  const uint32_t hidden_barrier = shared_address(&shared.barriers[0]);
  const uint32_t statistics_barrier = shared_address(&shared.barriers[kBuffers * kGroups]);
  if (threadIdx.x <= kBuffers * kGroups) mbarrier::init(hidden_barrier + 8 * threadIdx.x);
  mbarrier::fence_init();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kGroups; i++) mbarrier::arrive(hidden_barrier + 8 * i);  // h0: no message
    for (int i = kGroups; i < kBuffers * kGroups; i++)
      mbarrier::expect(hidden_barrier + 8 * i, kGroupTraffic);
    if (kLayerNorm) mbarrier::expect(statistics_barrier, kStatisticsTraffic);
  }

  // Slot o of `hidden` belongs to block rank ^ o. The rows of a section are turned by twice its
  // number against bank conflicts.
  const auto section_row = [](int row, int section) {
    return section * kSectionBytes + ((row + 2 * section) & 7) * kRowBytes;
  };
  for (int i = threadIdx.x; i < kWideRows * kWideHidden / 2; i += kWideThreads) {
    const int row = i / (kWideHidden / 2), k = i % (kWideHidden / 2) * 2;
    const int slot = k / kWideUnits, section = k % kWideUnits / 8;
    const int column = (rank ^ slot) * kWideUnits + k % kWideUnits;
    float2 value = make_float2(0.f, 0.f);
    if (h0 != nullptr && column < hidden_size)
      value = *reinterpret_cast<const float2*>(
          h0 + int64_t{locate_row(layer, row0 + row).index} * hidden_size + column);
    const SplitPair words = split(value.x, value.y);
    *reinterpret_cast<uint2*>(
        &shared.hidden[0][slot * kSlotBytes + section_row(row, section) + k % 8 * 4]) =
        make_uint2(words.high, words.low);
  }
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(shared.ring)) / 4; i += kWideThreads)
    reinterpret_cast<uint32_t*>(shared.ring)[i] = 0;  // stays so where units are padding

  Fragments<Place> weights;
  weights.shared_address = shared_address(&shared.fragments[0][warp][lane * 16]);
  weights.ring_address = shared_address(&shared.streamed[0][warp][lane * 16]);
  weights.packed =
      static_cast<const char*>(p.u) + (rank * kWideWarps + warp) * kWarpBytes + lane * 16;
  float inverse_scale = reinterpret_cast<const float*>(static_cast<const char*>(p.u) +
                                                       kScalesOffset)[rank * kWideWarps + warp];
  weights.load_kept();

  const int local_row = 2 * c;  // and 2c + 1
  float h[2] = {}, mask[2] = {1.f, 1.f};
  float gamma_a = 1.f, gamma_z = 1.f, beta_a = 0.f, beta_z = 0.f;
  if (in_range) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t state =
          int64_t{locate_row(layer, row0 + local_row + i).index} * hidden_size + unit;
      if (h0 != nullptr) h[i] = h0[state];
      if (drop_mask != nullptr) mask[i] = drop_mask[state];
    }
    if (kLayerNorm && ln_weight != nullptr)
      gamma_a = ln_weight[unit], gamma_z = ln_weight[hidden_size + unit];
    if (kLayerNorm && ln_bias != nullptr)
      beta_a = ln_bias[unit], beta_z = ln_bias[hidden_size + unit];
  }

  uint32_t hidden_load =
      shared_address(&shared.hidden[0][section_row(g, 2 * quarter + (c >> 1)) + (c & 1) * 16]);
  // After transpose() lane (g, c) holds units 2c, 2c + 1 of row g.
  uint32_t hidden_send = shared_address(&shared.hidden[0][section_row(g, warp) + c * 8]);
  const uint32_t sum_rank = 2 * warp + ((lane >> 3) & 1);
  const uint32_t sum_target =
      remote_address(shared_address(&shared.statistics[rank][lane & 7]), sum_rank);
  const uint32_t sum_barrier = remote_address(statistics_barrier, sum_rank);
  uint32_t sum_store = shared_address(&shared.warp_sums[0][local_row + (g & 1)][warp]);
  uint32_t sum_load = shared_address(&shared.warp_sums[0][lane & 7][0]);
  uint32_t statistics_load = shared_address(&shared.statistics[g][local_row]);
  uint32_t partial_store = shared_address(&shared.partial[0][0][0][lane * 16]);
  uint32_t partial_load = shared_address(&shared.partial[0][warp][0][lane * 16]);

  // wx in whole 128-byte lines: 8 neighbouring threads a line. In the ring: [row][a, z][8 units of
  // a warp], warps permuted by row against bank conflicts.
  const Sequence wx = wx_sequence(layer);
  const int copy_section = threadIdx.x / 2 % kWideWarps, copy_half = threadIdx.x / 16 % 2;
  const int copy_local_row = threadIdx.x / 32;
  const bool copies = block_unit0 + copy_section * 8 < hidden_size;
  const Row copy_row = locate_row(layer, row0 + copy_local_row);
  const char* source =
      wx.at(layer, copy_row, 0, copy_half * hidden_size + block_unit0 + copy_section * 8) +
      threadIdx.x % 2 * 16;
  int64_t source_step = wx.step_bytes(copy_row);
  const auto ring_section = [](int row, int half, int section) {
    return ((row * 2 + half) * kWideWarps + (section ^ (row >> 1 & 3))) * kRowBytes;
  };
  const uint32_t copy_target = shared_address(&shared.ring[0][0]) +
                               ring_section(copy_local_row, copy_half, copy_section) +
                               threadIdx.x % 2 * 16;
  uint32_t wx_address =
      shared_address(&shared.ring[0][0]) + ring_section(local_row, 0, warp) + g * 4;
  constexpr uint32_t kHalfBytes = kWideUnits * 4;
  const auto fetch = [&](int n) {
    if (n < steps && copies) copy_async_16(copy_target + n % 2 * kRingBytes, source);
    source += source_step;
  };
  __syncthreads();  // the ring is zero before copies land in it
  fetch(0);
  weights.request_first();

  // h is stored one step late, since global traffic between the sends of h would delay them: warp w
  // stores row w, lane i units 2i and 2i + 1, in whole lines.
  const Sequence outputs = h_sequence(layer, p.h);
  const Row output_row = locate_row(layer, row0 + warp);
  const bool stored = output_row.valid && block_unit0 + 2 * lane < hidden_size;
  char* output = const_cast<char*>(outputs.at(
      layer, output_row, 0, output_row.direction * hidden_size + block_unit0 + 2 * lane));
  int64_t output_step = outputs.step_bytes(output_row);
  const uint32_t state_store = shared_address(&shared.states[0][local_row][warp * 8 + g]);
  const uint32_t state_load = shared_address(&shared.states[0][warp][2 * lane]);
  const auto store_h = [&](int n) {
    if (stored)
      *reinterpret_cast<float2*>(output) =
          load_float2(state_load + n % 2 * sizeof(shared.states[0]));
    output += output_step;
  };
  // The first block's first 8 lanes store rho of row 2c + g.
  const Row rho_row = locate_row(layer, row0 + local_row + (g & 1));
  const bool stores_rho = kLayerNorm && rank == 0 && warp == 0 && g < 2 && rho_row.valid;
  float* rho_output = nullptr;
  if (stores_rho)
    rho_output = p.rho + int64_t{rho_row.index} * steps + layer.time_of(rho_row.index, 0);
  const int rho_step = rho_row.direction ? -1 : 1;
  float inverse_size = 1.f / static_cast<float>(2 * hidden_size);
  float eps = static_cast<float>(layer.eps);
  const Activation activation = layer.activation;
  pin(source_step), pin(output_step), pin(inverse_size), pin(inverse_scale), pin(eps);
  pin(hidden_load), pin(hidden_send), pin(sum_store), pin(sum_load), pin(statistics_load);
  pin(partial_store), pin(partial_load), pin(wx_address);
  pin(weights.shared_address), pin(weights.ring_address);
  __syncthreads();
  cluster_barrier();

#pragma unroll 1
  for (int t = 0; t < steps; t++) {
    const uint32_t buffer = t % kBuffers, parity = t / kBuffers & 1;
    float sums[kTiles][4] = {}, low_sums[kTiles][4] = {};
    uint4 operand[2];  // of a slot, of the next
    const auto stage = [&](int batch) {
      weights.stage(batch);
      const int slot = batch / 2;
      if (batch % (2 * kGroupSlots) == 0) {
        const uint32_t barrier = hidden_barrier + 8 * (buffer * kGroups + slot / kGroupSlots);
        mbarrier::wait(barrier, parity);
        if (threadIdx.x == 0) mbarrier::expect(barrier, kGroupTraffic);
      }
      if (batch % 2 == 0)
        operand[slot % 2] = load_uint4(hidden_load + buffer * kHiddenBytes + slot * kSlotBytes);
    };
    stage(0);
#pragma unroll
    for (int batch = 0; batch < kBatches; batch++) {
      if (batch + 1 < kBatches) stage(batch + 1);
      const int m = batch % 2 * 2;
      const uint4& b = operand[batch / 2 % 2];
      weights.multiply_batch(sums[m], sums[m + 1], low_sums[m], low_sums[m + 1], batch,
                             make_uint2(b.x, b.z), make_uint2(b.y, b.w));
      weights.request(batch + Place::kAhead);
    }
#pragma unroll
    for (int m = 0; m < kTiles; m++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[m][i] = fmaf(low_sums[m][i], 1.f / kLowScale, sums[m][i]) * inverse_scale;
#pragma unroll
    for (int m = 1; m < kTiles; m++)
      store_uint4(partial_store + buffer * sizeof(shared.partial[0]) +
                      (warp ^ m) * sizeof(shared.partial[0][0]) + (m - 1) * kPartialBytes,
                  make_uint4(__float_as_uint(sums[m][0]), __float_as_uint(sums[m][1]),
                             __float_as_uint(sums[m][2]), __float_as_uint(sums[m][3])));
    if (kLayerNorm)
      named_barrier(1 + group, kTiles * 32);
    else
      __syncthreads();  // for the ring: with the norm, the one below serves
#pragma unroll
    for (int m = 1; m < kTiles; m++) {
      const float4 x =
          load_float4(partial_load + buffer * sizeof(shared.partial[0]) + (m - 1) * kPartialBytes);
      sums[0][0] += x.x, sums[0][1] += x.y, sums[0][2] += x.z, sums[0][3] += x.w;
    }
    float r_a[2] = {sums[0][0], sums[0][1]}, r_z[2] = {sums[0][2], sums[0][3]};

    if constexpr (kLayerNorm) {
      const float square[2] = {fmaf(r_a[0], r_a[0], r_z[0] * r_z[0]),
                               fmaf(r_a[1], r_a[1], r_z[1] * r_z[1])};
      float sum = (g & 1) ? square[1] : square[0];  // lane g: row 2c + (g & 1)
      sum += __shfl_xor_sync(0xffffffffu, (g & 1) ? square[0] : square[1], 4);
      sum = add_lane_xor(add_lane_xor(sum, 8), 16);
      const uint32_t turn = t % 2 * sizeof(shared.warp_sums[0]);
      if (g < 2) store_float(sum_store + turn, sum);
      __syncthreads();
      if (lane < 2 * kWideRows) {
        const float4 x = load_float4(sum_load + turn), y = load_float4(sum_load + turn + 16);
        send(sum_target, sum_barrier,
             __float_as_uint(((x.x + x.y) + (x.z + x.w)) + ((y.x + y.y) + (y.z + y.w))));
      }
    }

    // In the shadow of hop 1: the copy of the next step's wx, which belongs to the first request of
    // that step and so is there before its product ends; this step's; the store of the step before.
    fetch(t + 1);
    float wx_a[2], wx_z[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t now = wx_address + t % 2 * kRingBytes + i * 2 * kHalfBytes;
      wx_a[i] = load_float(now);
      wx_z[i] = load_float(now + kHalfBytes);
    }
    if (t > 0) store_h(t - 1);
    float rho[2] = {1.f, 1.f};
    if constexpr (kLayerNorm) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        wx_a[i] += beta_a, wx_z[i] += beta_z;
        r_a[i] *= gamma_a, r_z[i] *= gamma_z;
      }
      mbarrier::wait(statistics_barrier, t & 1);
      if (threadIdx.x == 0) mbarrier::expect(statistics_barrier, kStatisticsTraffic);
      const float2 low = load_float2(statistics_load);  // of blocks g and g + 8
      const float2 high = load_float2(statistics_load + 8 * sizeof(shared.statistics[0]));
      float sum[2] = {low.x + high.x, low.y + high.y};
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) sum[i] = add_lane_xor(sum[i], offset);
        rho[i] = reciprocal_sqrt(fmaf(sum[i], inverse_size, eps));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float z = fast_sigmoid(fmaf(r_z[i], rho[i], wx_z[i]));
      const float candidate = fast_activate(activation, fmaf(r_a[i], rho[i], wx_a[i])) * mask[i];
      h[i] = next_hidden(h[i], z, candidate);
    }

    const SplitPair words = split(h[0], h[1]);
    const uint32_t high = transpose(words.high), low = transpose(words.low);
    const uint32_t next = (t + 1) % kBuffers;
    asm volatile("" : "+r"(rank));  // or the addresses below would be kept in registers, 32 of them
#pragma unroll
    for (uint32_t o = 0; o < kWideCluster; o++)
      send(remote_address(hidden_send + next * kHiddenBytes + o * kSlotBytes, rank ^ o),
           remote_address(hidden_barrier + 8 * (next * kGroups + o / kGroupSlots), rank ^ o), high,
           low);
#pragma unroll
    for (int i = 0; i < 2; i++)
      store_float(state_store + t % 2 * sizeof(shared.states[0]) + i * sizeof(shared.states[0][0]),
                  h[i]);
    if (stores_rho) {
      *rho_output = (g & 1) ? rho[1] : rho[0];
      rho_output += rho_step;
    }
  }
  for (int n = 0; n < kGroups; n++)
    mbarrier::wait(hidden_barrier + 8 * (steps % kBuffers * kGroups + n), steps / kBuffers & 1);
  __syncthreads();  // states
  store_h(steps - 1);
  copy_async_wait<0>();
  cluster_barrier();
#endif
}

// Fragment pair 4o + m of a warp: slot o, tile quarter ^ m of its group, so that the warp's own
// tile is m = 0. Lane c multiplies units 4c..4c+3 of the quarter.
__global__ void __launch_bounds__(kWideThreads)
    pack_forward_kernel(const float* __restrict__ u, char* __restrict__ packed, int hidden_size) {
  const int warp = static_cast<int>(blockIdx.x) % kWideWarps;
  const int rank = static_cast<int>(blockIdx.x) / kWideWarps;
  const int group = warp / kTiles, quarter = warp % kTiles;
  pack_fragments(packed, [=](int f, int lane, float (&x)[8]) {
    const int g = lane / 4, c = lane % 4;
    const int column = (rank ^ (f / kTiles)) * kWideUnits + 16 * quarter + 4 * c;
    const int row = rank * kWideUnits + (group * kTiles + (quarter ^ (f % kTiles))) * 8 + g;
    float4 candidate = make_float4(0.f, 0.f, 0.f, 0.f), gate = candidate;
    if (row < hidden_size && column < hidden_size) {
      const float* from = u + int64_t{row} * hidden_size + column;
      candidate = *reinterpret_cast<const float4*>(from);
      gate = *reinterpret_cast<const float4*>(from + int64_t{hidden_size} * hidden_size);
    }
    x[0] = candidate.x, x[1] = candidate.y, x[2] = gate.x, x[3] = gate.y;
    x[4] = candidate.z, x[5] = candidate.w, x[6] = gate.z, x[7] = gate.w;
  });
}

using Norm = Placement<60, 32, 10, 5>;
using Plain = Placement<72, 22, 9, 4>;  // two buffers of h and of partial sums

template <class Place, bool kLayerNorm>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  static_assert(sizeof(Shared<Place, kLayerNorm>) <= kWideSharedBytes);
  constexpr ClusterKernel<PersistentForward> kKernel = {
      forward_wide_float_kernel<Place, kLayerNorm>, kWideCluster, kWideThreads,
      sizeof(Shared<Place, kLayerNorm>)};
  return kKernel.run(p.choice.clusters(p.layer.rows()), p, stream);
}

}  // namespace

int64_t packed_bytes(Kernel kernel) {
  return kernel == Kernel::kWideFloat ? kScalesOffset + kWideCluster * kWideWarps * sizeof(float)
                                      : 0;
}

cudaError_t pack_forward(const float* u, void* packed, int64_t hidden, cudaStream_t stream) {
  pack_forward_kernel<<<kWideCluster * kWideWarps, kWideThreads, 0, stream>>>(
      u, static_cast<char*>(packed), static_cast<int>(hidden));
  return cudaGetLastError();
}

cudaError_t run_forward_wide_float(const PersistentForward& p, cudaStream_t stream) {
  return p.layer.layer_norm ? launch<Norm, true>(p, stream) : launch<Plain, false>(p, stream);
}

}  // namespace sb_fast_sligru
