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
#include "light_gru/persistent/forward_stages.cuh"
#include "light_gru/persistent/launch.h"

namespace sb_fast_sligru {
namespace {

template <int kCluster_, int kUnits_, bool kLayerNorm_>
struct Geometry {
  static constexpr int kCluster = kCluster_, kUnits = kUnits_;
  static constexpr bool kLayerNorm = kLayerNorm_;
  static constexpr int kBuffers = kLayerNorm ? 1 : 2;
  // h arrives under so many mbarriers, so that the product starts on the first.
  static constexpr int kGroups = kUnits == kBlockUnits ? 2 : 4;
  static constexpr int kBlockWarps = kUnits / 8, kBlockParts = kUnits / kBlockUnits;
  static constexpr int kGroupSlots = kCluster / kGroups;
  static constexpr int kSectionBytes = kRows * 8 * 2;  // 8 units of one warp: [row][8 units]
  static constexpr int kSlotBytes = kBlockWarps * kSectionBytes;
  static constexpr int kHiddenBytes = kCluster * kSlotBytes;
  static constexpr uint32_t kGroupTraffic = kGroupSlots * kSlotBytes;
  static constexpr uint32_t kStatisticsTraffic = kCluster * kRows * sizeof(float);
  static constexpr int kWarpTargets = kCluster / kBlockWarps;  // to which a warp sends statistics
  // A part of a block: as many units as the four lanes of a column multiply, 16 bytes each.
  static constexpr int kPartBytes = kSlotBytes / kBlockParts, kParts = kCluster * kBlockParts;
  static constexpr int kRingBytes = kRows * 2 * 8 * 4;  // wx of one warp and step: [row][a, z][8]

  // Within a 16-byte row of a section lie 8 units; rows are permuted so that the four sections of
  // a part are read without bank conflicts.
  static __device__ __forceinline__ int section_row(int row, int section) {
    return section * kSectionBytes + (row ^ (section >> 1)) * 16;
  }
};

template <class G>
struct Shared {
  // Slot o of `hidden` belongs to block rank ^ o: senders and receivers use the same slot, and
  // every block starts with its own.
  alignas(128) uint8_t hidden[G::kBuffers][G::kHiddenBytes];
  alignas(16) float statistics[G::kCluster][kRows];
  alignas(16) float warp_sums[2][G::kBlockWarps][kRows];  // two in turn: one barrier a step
  alignas(16) uint8_t ring[kRingSteps][G::kBlockWarps][G::kRingBytes];
  alignas(8) uint64_t barriers[Arrivals<G>::kCount];
};

// h0 as the product's operand.
template <class T, class G>
__device__ __forceinline__ void write_initial_hidden(Shared<G>& shared, const Recurrence& layer,
                                                     const Position& at) {
  constexpr int kPairs = G::kHiddenBytes / 4 / kRows;  // of units
  for (int i = threadIdx.x; i < kRows * kPairs; i += kThreads<G::kUnits>) {
    const int row = i / kPairs, k = i % kPairs * 2;
    const int part = k / kBlockUnits, section = k % kBlockUnits / 8;
    const int column = (at.rank ^ (k / G::kUnits)) * G::kUnits + k % G::kUnits;
    const float2 value = load_initial_pair(layer, locate_row(layer, at.row0 + row), column);
    *reinterpret_cast<uint32_t*>(
        &shared.hidden[0][part * G::kPartBytes + G::section_row(row, section) + k % 8 * 2]) =
        OperandTraits<T>::pack(value.x, value.y);
  }
}

// r = Uc h. Lane c multiplies units 8c..8c+7 of every part: the order of k is free as long as both
// operands agree.
template <class T, class G>
struct Product {
  uint32_t weights[G::kParts][2][4];
  uint32_t hidden_address;
  bool reads_hidden;  // columns 2n + 1 of the product are never used

  __device__ __forceinline__ Product(Shared<G>& shared, const Position& at)
      : hidden_address(shared_address(&shared.hidden[0][0]) + G::section_row(at.g >> 1, at.c)),
        reads_hidden((at.g & 1) == 0) {}

  __device__ __forceinline__ void load_weights(const PersistentForward& p, const Position& at,
                                               int unit, bool in_range) {
#pragma unroll
    for (int o = 0; o < G::kParts; o++) {
      const int column = (at.rank ^ (o / G::kBlockParts)) * G::kUnits +
                         o % G::kBlockParts * kBlockUnits + 8 * at.c;
      uint4 candidate = make_uint4(0, 0, 0, 0), gate = candidate;
      if (in_range && column < at.hidden_size) {
        const T* u = static_cast<const T*>(p.u) + int64_t{unit} * at.hidden_size + column;
        candidate = *reinterpret_cast<const uint4*>(u);
        gate = *reinterpret_cast<const uint4*>(u + int64_t{at.hidden_size} * at.hidden_size);
      }
      weights[o][0][0] = candidate.x, weights[o][0][1] = gate.x;
      weights[o][0][2] = candidate.y, weights[o][0][3] = gate.y;
      weights[o][1][0] = candidate.z, weights[o][1][1] = gate.z;
      weights[o][1][2] = candidate.w, weights[o][1][3] = gate.w;
    }
  }

  // Waits for h group by group.
  __device__ __forceinline__ GatePair compute(const Arrivals<G>& arrivals, int t) const {
    const uint32_t buffer = t % G::kBuffers;
    float sums[4][4] = {};
#pragma unroll
    for (int n = 0; n < G::kGroups; n++) {
      arrivals.wait_for_hidden(t, n);
      constexpr int kGroupParts = G::kParts / G::kGroups;
      uint4 operand[kGroupParts];
#pragma unroll
      for (int i = 0; i < kGroupParts; i++)
        load_uint4_if(
            operand[i],
            hidden_address + buffer * G::kHiddenBytes + (n * kGroupParts + i) * G::kPartBytes,
            reads_hidden);
#pragma unroll
      for (int i = 0; i < kGroupParts; i++) {
        const int o = n * kGroupParts + i;
        multiply<T>(sums[2 * o % 4], weights[o][0], operand[i].x, operand[i].y);
        multiply<T>(sums[(2 * o + 1) % 4], weights[o][1], operand[i].z, operand[i].w);
      }
    }
    return {(sums[0][0] + sums[1][0]) + (sums[2][0] + sums[3][0]),
            (sums[0][2] + sums[1][2]) + (sums[2][2] + sums[3][2])};
  }
};

// The sum of r^2 over all units: over the lanes and warps of the block, then, after hop 1, over the
// blocks.
template <class G>
struct Statistics {
  uint32_t sum_store, sum_load;      // in warp_sums
  uint32_t sum_target, sum_barrier;  // in the block to which the lane sends
  uint32_t statistics_load;

  __device__ __forceinline__ Statistics(Shared<G>& shared, const Arrivals<G>& arrivals,
                                        const Position& at) {
    const uint32_t receiver = at.warp * G::kWarpTargets + (at.lane / kRows) % G::kWarpTargets;
    sum_target =
        remote_address(shared_address(&shared.statistics[at.rank][at.lane % kRows]), receiver);
    sum_barrier = remote_address(arrivals.statistics, receiver);
    sum_store = shared_address(&shared.warp_sums[0][at.warp][at.c]);
    sum_load = shared_address(&shared.warp_sums[0][0][at.lane % kRows]);
    statistics_load = shared_address(&shared.statistics[at.g & 1][at.c]);
  }

  __device__ __forceinline__ void send_squares(const GatePair& r, const Position& at, int t) const {
    float square = fmaf(r.a, r.a, r.z * r.z);
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) square = add_lane_xor(square, offset);
    const uint32_t turn = t % 2 * sizeof(Shared<G>::warp_sums[0]);
    if (at.g == 0) store_float(sum_store + turn, square);
    __syncthreads();
    if (at.lane < G::kWarpTargets * kRows) {
      constexpr int kStride = sizeof(Shared<G>::warp_sums[0][0]);
      const uint32_t from = sum_load + turn;
      const auto sum_of_4 = [&](uint32_t from) {
        return (load_float(from) + load_float(from + kStride)) +
               (load_float(from + 2 * kStride) + load_float(from + 3 * kStride));
      };
      float sum = sum_of_4(from);
      if constexpr (G::kBlockWarps == 8) sum += sum_of_4(from + 4 * kStride);
      send(sum_target, sum_barrier, __float_as_uint(sum));
    }
  }

  __device__ __forceinline__ float receive_sum(const Arrivals<G>& arrivals, int t) const {
    arrivals.wait_for_statistics(t);
    float even = 0.f, odd = 0.f;  // two lanes, g and g ^ 1, share the sum over the blocks
#pragma unroll
    for (int i = 0; i < G::kCluster / 2; i++)
      (i % 2 ? odd : even) +=
          load_float(statistics_load + i * 2 * sizeof(Shared<G>::statistics[0]));
    return add_lane_xor(even + odd, 4);
  }
};

// wx: each of a warp's first lanes copies one 16-byte piece a step, for its own warp.
template <class T, class G>
struct Input {
  InputStream<kRingSteps, sizeof(Shared<G>::ring[0])> stream;
  uint32_t load_address;
  bool is_float;

  __device__ __forceinline__ Input(Shared<G>& shared, const Recurrence& layer, const Position& at,
                                   int unit0, bool in_range) {
    const Sequence wx = wx_sequence(layer);
    const int lane = at.lane;
    const int wx_bytes = wx.bytes(), pieces = wx_bytes / 2;  // pieces of 8 units
    const Row row = locate_row(layer, at.row0 + (lane / (2 * pieces)) % kRows);
    stream.steps = row.length;
    stream.copies = in_range && lane < 2 * kRows * pieces;
    stream.source =
        wx.at(layer, row, 0, lane / pieces % 2 * at.hidden_size + unit0) + lane % pieces * 16;
    stream.source_step = wx.step_bytes(row);
    stream.target = shared_address(&shared.ring[0][at.warp][lane * 16 % G::kRingBytes]);
    load_address = shared_address(&shared.ring[0][at.warp][0]) + (at.c * 16 + at.g) * wx_bytes;
    is_float = wx.is_float();
  }

  __device__ __forceinline__ GatePair load(int t) const {
    const uint32_t now = load_address + t % kRingSteps * sizeof(Shared<G>::ring[0]);
    if (is_float) {
      const float a = load_float(now);
      return {a, load_float(now + 32)};
    } else {
      const float a = load_operand<T>(now);
      return {a, load_operand<T>(now + 16)};
    }
  }
};

// h in the operand type to all blocks, hop 2. After transpose() lane (g, c) holds units 2c, 2c + 1
// of column g, row g / 2; its twin lane (g ^ 1, c) holds the same and serves the other half of the
// blocks.
template <class T, class G>
struct HiddenSender {
  uint32_t target[G::kCluster / 2], target_barrier[G::kCluster / 2];

  __device__ __forceinline__ HiddenSender(Shared<G>& shared, const Arrivals<G>& arrivals,
                                          const Position& at) {
    const int part = G::kBlockParts == 1 ? 0 : at.warp / kWarps;  // of the own slot
#pragma unroll
    for (int i = 0; i < G::kCluster / 2; i++) {
      const uint32_t slot = 2 * i + (at.g & 1);
      target[i] = remote_address(
          shared_address(
              &shared.hidden[0][slot * G::kSlotBytes + part * G::kPartBytes +
                                G::section_row(at.g >> 1, at.warp - kWarps * part) + at.c * 4]),
          at.rank ^ slot);
      target_barrier[i] =
          remote_address(arrivals.hidden + 8 * (slot / G::kGroupSlots), at.rank ^ slot);
    }
  }

  // h_t
  __device__ __forceinline__ void send_hidden(float h, int t) const {
    const uint32_t words = transpose(OperandTraits<T>::pack(h, h));
    const uint32_t buffer = t % G::kBuffers;
#pragma unroll
    for (int i = 0; i < G::kCluster / 2; i++)
      send(target[i] + buffer * G::kHiddenBytes, target_barrier[i] + buffer * G::kGroups * 8,
           words);
  }
};

template <class T, int kCluster, int kUnits, bool kLayerNorm>
__global__ void __launch_bounds__(kThreads<kUnits>, kBlockUnits * 2 / kUnits)
    forward_narrow_kernel(const __grid_constant__ PersistentForward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  using G = Geometry<kCluster, kUnits, kLayerNorm>;
  __shared__ Shared<G> shared;
  const Recurrence& layer = p.layer;
  const Position at = locate_thread<kCluster, kUnits>(layer, kRows);
  const int unit0 = at.block_unit0 + at.warp * 8;  // first unit of the warp
  const int unit = unit0 + at.g;                   // this lane's unit, for row c
  const bool in_range = unit0 < at.hidden_size;

  const Arrivals<G> arrivals(shared.barriers);
  write_initial_hidden<T>(shared, layer, at);
  fill_with_zeros<kThreads<kUnits>>(shared.ring);  // stays so where units are padding
  Product<T, G> product(shared, at);
  product.load_weights(p, at, unit, in_range);
  const Row row = locate_row(layer, at.row0 + at.c);
  UnitState state;
  UnitParameters parameters;
  if (in_range) {
    state.load(layer, row, unit);
    if (kLayerNorm) parameters.load(layer, unit);
  }
  const HiddenSender<T, G> sender(shared, arrivals, at);
  Statistics<G> statistics(shared, arrivals, at);
  Input<T, G> wx(shared, layer, at, unit0, in_range);
  __syncthreads();  // the ring is zero before copies land in it
#pragma unroll
  for (int n = 0; n < kRingSteps - 1; n++) wx.stream.fetch_group(n);
  HiddenOutput output(p, row, unit, in_range);
  RhoOutput rho_output(p, row, kLayerNorm && at.rank == 0 && at.warp == 0 && at.g == 0);
  RootMeanSquare mean(layer);
  const Activation activation = layer.activation;
  pin(product.hidden_address);
  pin(wx.stream.target), pin(wx.load_address);
  pin(statistics.sum_store), pin(statistics.sum_load), pin(statistics.statistics_load);
  pin(wx.stream.source_step), pin(output.target_step), pin(mean.inverse_size), pin(mean.eps);
  cluster_barrier();

#pragma unroll 1
  for (int t = 0; t < at.steps; t++) {
    GatePair r = product.compute(arrivals, t);
    if constexpr (kLayerNorm) statistics.send_squares(r, at, t);

    // In the shadow of hop 1: this step's wx, and the copy for a later one, whose place in the ring
    // the warp has read in the step before.
    copy_async_wait<kRingSteps - 2>();
    __syncwarp();
    wx.stream.fetch_group(t + kRingSteps - 1);
    GatePair wx_t = wx.load(t);
    float rho = 1.f;
    if constexpr (kLayerNorm) {
      scale_and_shift(parameters, wx_t, r);
      rho = mean.rho(statistics.receive_sum(arrivals, t));
    }
    update(state, activation, wx_t, r, rho);

    sender.send_hidden(state.h, t + 1);
    const bool goes_on = t < row.length;
    output.store<T>(goes_on, state.h);
    rho_output.store(goes_on, rho);
  }
  arrivals.wait_for_last_hidden(at.steps);
  cluster_barrier();
#endif
}

template <class T, int kCluster, int kUnits>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  const auto kernel = p.layer.layer_norm ? forward_narrow_kernel<T, kCluster, kUnits, true>
                                         : forward_narrow_kernel<T, kCluster, kUnits, false>;
  const ClusterKernel<PersistentForward> in_clusters = {kernel, kCluster, kThreads<kUnits>};
  return in_clusters.run(p.choice.groups(p.layer.rows()), p, stream);
}

template <class T>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  if (p.choice.units == 2 * kBlockUnits) return launch<T, 8, 2 * kBlockUnits>(p, stream);
  switch (p.choice.group) {
    case 4:
      return launch<T, 4, kBlockUnits>(p, stream);
    case 8:
      return launch<T, 8, kBlockUnits>(p, stream);
    case 16:
      return launch<T, 16, kBlockUnits>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t run_forward_narrow(const PersistentForward& p, cudaStream_t stream) {
  return p.layer.operand_type == DType::kBFloat16 ? launch<__nv_bfloat16>(p, stream)
                                                  : launch<__half>(p, stream);
}

}  // namespace sb_fast_sligru
