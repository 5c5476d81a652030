// The forward recurrence of forward_narrow.cu for 512 < H <= 1024: same equations, same two
// hops.
//
// The warps of a block form two groups of 4. Warp (m, q) of group m multiplies the group's four
// 16-row tiles of Uc (tile: 8 units, row g candidate, row g + 8 gate) by the q-th 16 units of every
// sender's slot, so that it reads a quarter of h and has work in every arrival group. The partial
// sums meet in shared memory, where warp (m, q) collects tile 4m + q, its own 8 units; in its lanes
// d[0], d[1] are the candidate of unit g for rows 2c, 2c + 1 and d[2], d[3] the gate.
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/wide.cuh"

namespace sb_fast_sligru {
namespace {

constexpr int kSharedFragments = 22;
constexpr int kTiles = 4;   // tiles of a warp, warps of a group
constexpr int kGroups = 4;  // mbarriers under which h arrives
constexpr int kGroupSlots = kWideCluster / kGroups;
constexpr int kBatchSlots = 2;                          // slots multiplied at a time
constexpr int kEarlyTargets = 13;                       // blocks that get h before the next product
constexpr int kSectionBytes = kWideRows * 8 * 2;        // 8 units of one warp: [row][8 units]
constexpr int kSlotBytes = kWideWarps * kSectionBytes;  // what one block sends
constexpr int kHiddenBytes = kWideCluster * kSlotBytes;
constexpr uint32_t kGroupTraffic = kGroupSlots * kSlotBytes;
constexpr uint32_t kStatisticsTraffic = kWideCluster * kWideRows * sizeof(float);
constexpr int kPartialBytes = 32 * 16;                      // a tile's partial sums of one warp
constexpr int kRingBytes = kWideRows * 2 * kWideUnits * 4;  // wx of a block and step, at most
constexpr int kLineBytes = kWideUnits * 2;                  // a row of U, units of one block

constexpr int kStateStride = kWideUnits + 4;  // float; against bank conflicts

template <bool kLayerNorm>
struct Shared {
  static constexpr int kBuffers = kLayerNorm ? 1 : 2;
  static constexpr int kStages = kLayerNorm ? 5 : 3;  // of U on its way; as many as find room
  alignas(1024) uint8_t hidden[kBuffers][kHiddenBytes];
  uint8_t fragments[kSharedFragments][kWideWarps][kFragmentBytes];
  uint8_t partial[kBuffers][kWideWarps][kTiles][kPartialBytes];  // [tile][sender in its group]
  float states[2][kWideRows][kStateStride];
  uint8_t ring[kRingSteps][kRingBytes];
  float statistics[kWideCluster][kWideRows];
  float warp_sums[2][kWideRows][kWideWarps];  // two in turn: one barrier a step
  alignas(128) uint8_t stages[kStages][2 * kWideUnits * kLineBytes];  // [candidate, gate][row]
  uint64_t barriers[kBuffers * kGroups + 1];
};

// kPlain: ReLU, wx of the operand type; the choice at run time takes 0.03 us a step.
template <class T, bool kLayerNorm, bool kPlain>
__global__ void __launch_bounds__(kWideThreads, 1)
    forward_wide_kernel(const __grid_constant__ PersistentForward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  using Split = FragmentSplit<kSharedFragments>;
  constexpr int kBuffers = Shared<kLayerNorm>::kBuffers, kStages = Shared<kLayerNorm>::kStages;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kLayerNorm>*>(shared_bytes);

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

  // Slot o of `hidden` belongs to block rank ^ o. The rows of odd sections are turned by 4 against
  // bank conflicts.
  const auto section_row = [](int row, int section) {
    return section * kSectionBytes + ((row + 4 * section) & 7) * 16;
  };
  for (int i = threadIdx.x; i < kHiddenBytes / 4; i += kWideThreads) {
    const int row = i / (kWideHidden / 2), k = i % (kWideHidden / 2) * 2;
    const int slot = k / kWideUnits, section = k % kWideUnits / 8;
    const int column = (rank ^ slot) * kWideUnits + k % kWideUnits;
    float2 value = make_float2(0.f, 0.f);
    if (h0 != nullptr && column < hidden_size)
      value = *reinterpret_cast<const float2*>(
          h0 + int64_t{locate_row(layer, row0 + row).index} * hidden_size + column);
    *reinterpret_cast<uint32_t*>(
        &shared.hidden[0][slot * kSlotBytes + section_row(row, section) + k % 8 * 2]) =
        OperandTraits<T>::pack(value.x, value.y);
  }
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(shared.ring)) / 4; i += kWideThreads)
    reinterpret_cast<uint32_t*>(shared.ring)[i] = 0;  // stays so where units are padding

  // Fragment 4o + m: slot o, tile quarter ^ m of the group, so that a warp's own tile is m = 0.
  // Lane c multiplies units 4c..4c+3 of the quarter. U comes slot by slot, in whole lines, through
  // `stages`, where the 16-byte pieces of a line are permuted by row against bank conflicts.
  uint32_t weights[Split::kInRegisters][4];
  uint32_t fragment_address = shared_address(&shared.fragments[0][warp][lane * 16]);
  const auto stage_piece = [&](int o, int line, int piece) {
    return shared_address(&shared.stages[o % kStages][line * kLineBytes]) +
           (piece ^ (line % 4 * 2)) * 16;
  };
  const auto fetch_u = [&](int o) {
    constexpr int kPieces = kLineBytes / 16;  // of a line
    if (o < kWideCluster) {
#pragma unroll
      for (int i = 0; i < 2 * kWideUnits * kPieces / kWideThreads; i++) {
        const int index = i * kWideThreads + threadIdx.x, piece = index % kPieces;
        const int line = index / kPieces, row = block_unit0 + line % kWideUnits;
        const int column = (rank ^ o) * kWideUnits + piece * 8;
        const bool valid = row < hidden_size && column < hidden_size;
        const int output = line / kWideUnits * hidden_size + row;
        copy_async_16_or_zeros(
            stage_piece(o, line, piece),
            static_cast<const T*>(p.u) + (valid ? int64_t{output} * hidden_size + column : 0),
            valid);
      }
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int o = 0; o < kStages - 1; o++) fetch_u(o);
#pragma unroll
  for (int o = 0; o < kWideCluster; o++) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    fetch_u(o + kStages - 1);
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      const int f = o * kTiles + m, line = (group * kTiles + (quarter ^ m)) * 8 + g;
      const uint32_t from = stage_piece(o, line, 2 * quarter + (c >> 1)) + (c & 1) * 8;
      const uint2 candidate = load_uint2(from), gate = load_uint2(from + kWideUnits * kLineBytes);
      if (Split::is_shared(f)) {
        store_uint4(fragment_address + Split::shared_before(f) * sizeof(shared.fragments[0]),
                    make_uint4(candidate.x, gate.x, candidate.y, gate.y));
      } else {
        uint32_t (&a)[4] = weights[Split::register_index(f)];
        a[0] = candidate.x, a[1] = gate.x, a[2] = candidate.y, a[3] = gate.y;
      }
    }
  }

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
      shared_address(&shared.hidden[0][section_row(g, 2 * quarter + (c >> 1)) + (c & 1) * 8]);
  // After transpose() lane (g, c) holds units 2c, 2c + 1 of row g.
  uint32_t hidden_send = shared_address(&shared.hidden[0][section_row(g, warp) + c * 4]);
  const uint32_t sum_rank = 2 * warp + ((lane >> 3) & 1);
  const uint32_t sum_target =
      remote_address(shared_address(&shared.statistics[rank][lane & 7]), sum_rank);
  const uint32_t sum_barrier = remote_address(statistics_barrier, sum_rank);
  uint32_t sum_store = shared_address(&shared.warp_sums[0][local_row + (g & 1)][warp]);
  uint32_t sum_load = shared_address(&shared.warp_sums[0][lane & 7][0]);
  uint32_t statistics_load = shared_address(&shared.statistics[g][local_row]);
  uint32_t partial_store = shared_address(&shared.partial[0][0][quarter][lane * 16]);
  uint32_t partial_load = shared_address(&shared.partial[0][warp][0][lane * 16]);

  // wx in whole 128-byte lines: 8 neighbouring threads a line. In the ring: [row][a, z][8 units of
  // a warp], warps permuted by row against bank conflicts.
  const Sequence wx = wx_sequence(layer);
  const bool wx_float = !kPlain && wx.is_float();
  const int wx_bytes = wx_float ? 4 : 2, pieces = wx_bytes / 2;  // pieces of 8 units
  const int copy_section = threadIdx.x / pieces % kWideWarps;
  const int copy_half = threadIdx.x / pieces / kWideWarps % 2;
  const int copy_local_row = threadIdx.x / pieces / kWideWarps / 2;
  const bool copies = copy_local_row < kWideRows && block_unit0 + copy_section * 8 < hidden_size;
  const Row copy_row = locate_row(layer, row0 + copy_local_row % kWideRows);
  const char* source =
      wx.at(layer, copy_row, 0, copy_half * hidden_size + block_unit0 + copy_section * 8) +
      threadIdx.x % pieces * 16;
  int64_t source_step = wx.step_bytes(copy_row);
  const auto ring_section = [](int row, int half, int section) {
    return (row * 2 + half) * kWideWarps + (section ^ (row >> 1 & 3));
  };
  const uint32_t copy_target =
      shared_address(&shared.ring[0][0]) +
      (ring_section(copy_local_row % kWideRows, copy_half, copy_section) * pieces +
       threadIdx.x % pieces) *
          16;
  uint32_t wx_address =
      shared_address(&shared.ring[0][0]) + (ring_section(local_row, 0, warp) * 8 + g) * wx_bytes;
  const uint32_t wx_half_bytes = kWideUnits * wx_bytes;
  const auto fetch = [&](int n) {
    if (n < steps && copies) copy_async_16(copy_target + n % kRingSteps * kRingBytes, source);
    source += source_step;
    copy_async_commit();
  };
  __syncthreads();  // the ring is zero before copies land in it
#pragma unroll
  for (int n = 0; n < kRingSteps - 1; n++) fetch(n);
  copy_async_wait<kRingSteps - 2>();

  // h is stored one step late, since global traffic between the sends of h would delay them: warp w
  // stores row w, lane i units 2i and 2i + 1, in whole lines. 16-bit h is read from the block's own
  // slot, float h from `states`, two buffers in turn.
  const Sequence outputs = h_sequence(layer, p.h);
  const bool h_float = outputs.is_float();
  const Row output_row = locate_row(layer, row0 + warp);
  const bool stored = output_row.valid && block_unit0 + 2 * lane < hidden_size;
  char* output = const_cast<char*>(outputs.at(
      layer, output_row, 0, output_row.direction * hidden_size + block_unit0 + 2 * lane));
  int64_t output_step = outputs.step_bytes(output_row);
  uint32_t own_slot =
      shared_address(&shared.hidden[0][section_row(warp, lane >> 2) + (lane & 3) * 4]);
  const uint32_t state_store = shared_address(&shared.states[0][local_row][warp * 8 + g]);
  const uint32_t state_load = shared_address(&shared.states[0][warp][2 * lane]);
  const auto store_h = [&](int n, uint32_t words) {
    if (stored) {
      if (h_float)
        *reinterpret_cast<float2*>(output) =
            load_float2(state_load + n % 2 * sizeof(shared.states[0]));
      else
        *reinterpret_cast<uint32_t*>(output) = words;
    }
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
  const Activation activation = kPlain ? Activation::kRelu : layer.activation;
  pin(source_step), pin(output_step), pin(inverse_size), pin(eps);
  pin(hidden_load), pin(hidden_send), pin(sum_store), pin(sum_load), pin(statistics_load);
  pin(partial_store), pin(partial_load), pin(own_slot), pin(wx_address), pin(fragment_address);
  __syncthreads();
  cluster_barrier();

  // Sends h to the blocks rank ^ from, ..., rank ^ (to - 1). No warp multiplies while its messages
  // queue for the network, so the last of them follow after the products of the first group. Still
  // a block has all of h only when every warp has sent to it: buffers are re-used as safely.
  uint32_t words = 0;
  const auto send_h = [&](uint32_t from, uint32_t to, uint32_t buffer) {
    asm volatile("" : "+r"(rank));  // or the addresses below would be kept in registers, 32 of them
#pragma unroll
    for (uint32_t o = 0; o < kWideCluster; o++)
      if (from <= o && o < to)
        send(remote_address(hidden_send + buffer * kHiddenBytes + o * kSlotBytes, rank ^ o),
             remote_address(hidden_barrier + 8 * (buffer * kGroups + o / kGroupSlots), rank ^ o),
             words);
  };

#pragma unroll 1
  for (int t = 0; t < steps; t++) {
    const uint32_t buffer = t % kBuffers, parity = t / kBuffers & 1;
    float sums[kTiles][4] = {};
#pragma unroll
    for (int n = 0; n < kWideCluster / kBatchSlots; n++) {
      constexpr int kBatch = kBatchSlots * kTiles;  // fragments
      uint4 staged[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i++)
        if (Split::is_shared(n * kBatch + i))
          staged[i] = load_uint4(fragment_address + Split::shared_before(n * kBatch + i) *
                                                        sizeof(shared.fragments[0]));
      if (n * kBatchSlots == kGroupSlots && t > 0) send_h(kEarlyTargets, kWideCluster, buffer);
      if (n * kBatchSlots % kGroupSlots == 0) {
        const uint32_t barrier =
            hidden_barrier + 8 * (buffer * kGroups + n * kBatchSlots / kGroupSlots);
        mbarrier::wait(barrier, parity);
        if (threadIdx.x == 0) mbarrier::expect(barrier, kGroupTraffic);
      }
      uint2 operand[kBatchSlots];
#pragma unroll
      for (int i = 0; i < kBatchSlots; i++)
        operand[i] =
            load_uint2(hidden_load + buffer * kHiddenBytes + (n * kBatchSlots + i) * kSlotBytes);
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const int f = n * kBatch + i;
        const uint2 b = operand[i / kTiles];
        if (Split::is_shared(f)) {
          const uint32_t a[4] = {staged[i].x, staged[i].y, staged[i].z, staged[i].w};
          multiply<T>(sums[i % kTiles], a, b.x, b.y);
        } else {
          multiply<T>(sums[i % kTiles], weights[Split::register_index(f)], b.x, b.y);
        }
      }
    }
    const uint32_t own_words = load_uint(own_slot + buffer * kHiddenBytes);  // h_{t-1}
#pragma unroll
    for (int m = 1; m < kTiles; m++)
      store_uint4(partial_store + buffer * sizeof(shared.partial[0]) +
                      (warp ^ m) * sizeof(shared.partial[0][0]),
                  make_uint4(__float_as_uint(sums[m][0]), __float_as_uint(sums[m][1]),
                             __float_as_uint(sums[m][2]), __float_as_uint(sums[m][3])));
    if (kLayerNorm)
      named_barrier(1 + group, kTiles * 32);
    else
      __syncthreads();  // for the ring: with the norm, the one below serves
#pragma unroll
    for (int m = 1; m < kTiles; m++) {
      const float4 x = load_float4(partial_load + buffer * sizeof(shared.partial[0]) +
                                   (quarter ^ m) * kPartialBytes);
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

    // In the shadow of hop 1: this step's wx, and the store of the step before.
    float wx_a[2], wx_z[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t now = wx_address + t % kRingSteps * kRingBytes + i * 2 * wx_half_bytes;
      wx_a[i] = wx_float ? load_float(now) : load_operand<T>(now);
      wx_z[i] = wx_float ? load_float(now + wx_half_bytes) : load_operand<T>(now + wx_half_bytes);
    }
    if (t > 0) store_h(t - 1, own_words);
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
    float z[2], candidate[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      z[i] = fast_sigmoid(fmaf(r_z[i], rho[i], wx_z[i]));
      candidate[i] = fmaf(r_a[i], rho[i], wx_a[i]);
    }
    // One branch for both rows: between two, the second would wait for the first.
    if (activation == Activation::kRelu) {
      for (float& x : candidate) x = Relu::fast_value(x);
    } else {
      for (float& x : candidate) x = fast_activate(activation, x);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) h[i] = next_hidden(h[i], z[i], candidate[i] * mask[i]);

    words = transpose(OperandTraits<T>::pack(h[0], h[1]));
    send_h(0, kEarlyTargets, (t + 1) % kBuffers);
    if (h_float) {
#pragma unroll
      for (int i = 0; i < 2; i++)
        store_float(
            state_store + t % 2 * sizeof(shared.states[0]) + i * sizeof(shared.states[0][0]), h[i]);
    }
    if (stores_rho) {
      *rho_output = (g & 1) ? rho[1] : rho[0];
      rho_output += rho_step;
    }
    copy_async_wait<kRingSteps - 3>();
    fetch(t + kRingSteps - 1);
  }
  send_h(kEarlyTargets, kWideCluster, steps % kBuffers);
  for (int n = 0; n < kGroups; n++)
    mbarrier::wait(hidden_barrier + 8 * (steps % kBuffers * kGroups + n), steps / kBuffers & 1);
  __syncthreads();  // states
  store_h(steps - 1, load_uint(own_slot + steps % kBuffers * kHiddenBytes));
  cluster_barrier();
#endif
}

template <class T, bool kLayerNorm, bool kPlain>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  static_assert(sizeof(Shared<kLayerNorm>) <= kWideSharedBytes);
  constexpr ClusterKernel<PersistentForward> kKernel = {forward_wide_kernel<T, kLayerNorm, kPlain>,
                                                        kWideCluster, kWideThreads,
                                                        sizeof(Shared<kLayerNorm>)};
  return kKernel.run(p.choice.clusters(p.layer.rows()), p, stream);
}

template <class T>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  const bool plain = p.layer.activation == Activation::kRelu && p.layer.wx_type != DType::kFloat32;
  if (p.layer.layer_norm)
    return plain ? launch<T, true, true>(p, stream) : launch<T, true, false>(p, stream);
  return plain ? launch<T, false, true>(p, stream) : launch<T, false, false>(p, stream);
}

}  // namespace

cudaError_t run_forward_wide(const PersistentForward& p, cudaStream_t stream) {
  return p.layer.operand_type == DType::kBFloat16 ? launch<__nv_bfloat16>(p, stream)
                                                  : launch<__half>(p, stream);
}

}  // namespace sb_fast_sligru
