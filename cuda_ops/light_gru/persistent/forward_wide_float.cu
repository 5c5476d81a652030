// The forward recurrence of forward_wide.cu in float32: same equations, same two hops,
// same division of the work. What differs is in wide_float.cuh.
#include "light_gru/persistent/forward_stages.cuh"
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/wide_float.cuh"

namespace sb_fast_sligru {
namespace {

constexpr int kTiles = 4;                               // tiles of a warp, warps of a group
constexpr int kRowBytes = 8 * 4;                        // 8 units: 4 times high, high, low, low
constexpr int kSectionBytes = kWideRows * kRowBytes;    // 8 units of one warp
constexpr int kSlotBytes = kWideWarps * kSectionBytes;  // what one block sends
constexpr int kHiddenBytes = kWideCluster * kSlotBytes;
constexpr int kPartialBytes = 32 * 16;                      // a tile's partial sums of one warp
constexpr int kRingBytes = kWideRows * 2 * kWideUnits * 4;  // wx of a block and step
constexpr int kStateStride = kWideUnits + 4;                // float; against bank conflicts

static_assert(kBatchFragments == kTiles);  // a batch: two tiles (high, low) of one slot of h

template <class Place_, bool kLayerNorm_>
struct Geometry {
  using Place = Place_;
  static constexpr bool kLayerNorm = kLayerNorm_;
  static constexpr int kBuffers = kLayerNorm ? 1 : 2;
  static constexpr int kGroups = 4;  // mbarriers under which h arrives
  static constexpr int kGroupSlots = kWideCluster / kGroups;
  static constexpr uint32_t kGroupTraffic = kGroupSlots * kSlotBytes;
  static constexpr uint32_t kStatisticsTraffic = kWideCluster * kWideRows * sizeof(float);
};

template <class G>
struct Shared {
  // Slot o of `hidden` belongs to block rank ^ o.
  alignas(1024) uint8_t hidden[G::kBuffers][kHiddenBytes];
  uint8_t fragments[G::Place::kShared][kWideWarps][kFragmentBytes];
  uint8_t streamed[G::Place::kRing][kWideWarps][kFragmentBytes];
  uint8_t partial[G::kBuffers][kWideWarps][kTiles - 1][kPartialBytes];  // [tile][sender ^ own]
  float states[2][kWideRows][kStateStride];
  uint8_t ring[2][kRingBytes];
  float statistics[kWideCluster][kWideRows];
  float warp_sums[2][kWideRows][kWideWarps];  // two in turn: one barrier a step
  uint64_t barriers[Arrivals<G>::kCount];
};

// In a slot. The rows of a section are turned by twice its number against bank conflicts.
__device__ __forceinline__ int section_row(int row, int section) {
  return section * kSectionBytes + ((row + 2 * section) & 7) * kRowBytes;
}

// h0 as the product's operand.
template <class G>
__device__ __forceinline__ void write_initial_hidden(Shared<G>& shared, const Recurrence& layer,
                                                     const Position& at) {
  for (int i = threadIdx.x; i < kWideRows * kWideHidden / 2; i += kWideThreads) {
    const int row = i / (kWideHidden / 2), k = i % (kWideHidden / 2) * 2;
    const int slot = k / kWideUnits, section = k % kWideUnits / 8;
    const int column = (at.rank ^ slot) * kWideUnits + k % kWideUnits;
    const float2 value = load_initial_pair(layer, locate_row(layer, at.row0 + row), column);
    const SplitPair words = split(value.x, value.y);
    *reinterpret_cast<uint2*>(
        &shared.hidden[0][slot * kSlotBytes + section_row(row, section) + k % 8 * 4]) =
        make_uint2(words.high, words.low);
  }
}

// r = Uc h. The order of the fragments is pack_forward_kernel()'s.
template <class G>
struct Product {
  Fragments<typename G::Place> weights;
  float inverse_scale;
  uint32_t hidden_load, partial_store, partial_load;
  int warp, group;

  __device__ __forceinline__ Product(Shared<G>& shared, const void* u, const Position& at)
      : warp(at.warp), group(at.warp / kTiles) {
    const auto* packed = static_cast<const char*>(u);
    const uint32_t part = at.rank * kWideWarps + warp;
    weights.shared_address = shared_address(&shared.fragments[0][warp][at.lane * 16]);
    weights.ring_address = shared_address(&shared.streamed[0][warp][at.lane * 16]);
    weights.packed = packed + part * kWarpBytes + at.lane * 16;
    inverse_scale = reinterpret_cast<const float*>(packed + kScalesOffset)[part];
    const int quarter = warp % kTiles;
    hidden_load = shared_address(
        &shared.hidden[0][section_row(at.g, 2 * quarter + (at.c >> 1)) + (at.c & 1) * 16]);
    partial_store = shared_address(&shared.partial[0][0][0][at.lane * 16]);
    partial_load = shared_address(&shared.partial[0][warp][0][at.lane * 16]);
  }

  // The quarter's part of the sums of all tiles. Waits for h group by group.
  __device__ __forceinline__ void multiply_quarter(float (&sums)[kTiles][4],
                                                   const Arrivals<G>& arrivals, int t) {
    float low_sums[kTiles][4] = {};
    uint4 operand[2];  // of a slot, of the next
    const auto stage = [&](int batch) {
      weights.stage(batch);
      const int slot = batch / 2;
      if (batch % (2 * G::kGroupSlots) == 0) arrivals.wait_for_hidden(t, slot / G::kGroupSlots);
      if (batch % 2 == 0)
        operand[slot % 2] =
            load_uint4(hidden_load + t % G::kBuffers * kHiddenBytes + slot * kSlotBytes);
    };
    stage(0);
#pragma unroll
    for (int batch = 0; batch < kBatches; batch++) {
      if (batch + 1 < kBatches) stage(batch + 1);
      const int m = batch % 2 * 2;
      const uint4& b = operand[batch / 2 % 2];
      weights.multiply_batch(sums[m], sums[m + 1], low_sums[m], low_sums[m + 1], batch,
                             make_uint2(b.x, b.z), make_uint2(b.y, b.w));
      weights.request(batch + G::Place::kAhead);
    }
#pragma unroll
    for (int m = 0; m < kTiles; m++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[m][i] = fmaf(low_sums[m][i], 1.f / kLowScale, sums[m][i]) * inverse_scale;
  }

  // Adds the other warps' parts to sums[0], the warp's own tile.
  __device__ __forceinline__ void add_quarters(float (&sums)[kTiles][4], int t) const {
    const uint32_t buffer = t % G::kBuffers * sizeof(Shared<G>::partial[0]);
#pragma unroll
    for (int m = 1; m < kTiles; m++)
      store_uint4(partial_store + buffer + (warp ^ m) * sizeof(Shared<G>::partial[0][0]) +
                      (m - 1) * kPartialBytes,
                  make_uint4(__float_as_uint(sums[m][0]), __float_as_uint(sums[m][1]),
                             __float_as_uint(sums[m][2]), __float_as_uint(sums[m][3])));
    if (G::kLayerNorm)
      named_barrier(1 + group, kTiles * 32);
    else
      __syncthreads();  // for the ring: with the norm, that of the statistics serves
#pragma unroll
    for (int m = 1; m < kTiles; m++) {
      const float4 x = load_float4(partial_load + buffer + (m - 1) * kPartialBytes);
      sums[0][0] += x.x, sums[0][1] += x.y, sums[0][2] += x.z, sums[0][3] += x.w;
    }
  }
};

// wx in whole 128-byte lines: 8 neighbouring threads a line. In the ring: [row][a, z][8 units of a
// warp], warps permuted by row against bank conflicts.
struct Input {
  InputStream<2, kRingBytes> stream;  // of the row that LateOutput stores, too
  uint32_t load_address;

  static __device__ __forceinline__ int section_of(int row, int gate, int section) {
    return ((row * 2 + gate) * kWideWarps + (section ^ (row >> 1 & 3))) * kRowBytes;
  }

  __device__ __forceinline__ Input(uint32_t ring, const Recurrence& layer, const Position& at) {
    const Sequence wx = wx_sequence(layer);
    const int section = threadIdx.x / 2 % kWideWarps, gate = threadIdx.x / 16 % 2;
    const int local_row = threadIdx.x / 32;
    const Row row = locate_row(layer, at.row0 + local_row);
    stream.steps = row.length;
    stream.copies = at.block_unit0 + section * 8 < at.hidden_size;
    stream.source = wx.at(layer, row, 0, gate * at.hidden_size + at.block_unit0 + section * 8) +
                    threadIdx.x % 2 * 16;
    stream.source_step = wx.step_bytes(row);
    stream.target = ring + section_of(local_row, gate, section) + threadIdx.x % 2 * 16;
    load_address = ring + section_of(2 * at.c, 0, at.warp) + at.g * 4;
  }

  // Of rows 2c and 2c + 1.
  __device__ __forceinline__ void load(GatePair (&wx)[2], int t) const {
    constexpr uint32_t kGateBytes = kWideUnits * 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t now = load_address + t % 2 * kRingBytes + i * 2 * kGateBytes;
      wx[i].a = load_float(now);
      wx[i].z = load_float(now + kGateBytes);
    }
  }
};

// h to all blocks, hop 2.
template <class G>
struct HiddenSender {
  uint32_t hidden, barrier;  // this block's own
  uint32_t rank;

  // After transpose() lane (g, c) holds units 2c, 2c + 1 of row g.
  __device__ __forceinline__ HiddenSender(Shared<G>& shared, const Arrivals<G>& arrivals,
                                          const Position& at)
      : hidden(shared_address(&shared.hidden[0][section_row(at.g, at.warp) + at.c * 8])),
        barrier(arrivals.hidden),
        rank(at.rank) {}

  // h_t
  __device__ __forceinline__ void send_hidden(const UnitState (&state)[2], int t) {
    const SplitPair words = split(state[0].h, state[1].h);
    const uint32_t high = transpose(words.high), low = transpose(words.low);
    const uint32_t buffer = t % G::kBuffers;
    asm volatile("" : "+r"(rank));  // or the addresses below would be kept in registers, 32 of them
#pragma unroll
    for (uint32_t o = 0; o < kWideCluster; o++)
      send(remote_address(hidden + buffer * kHiddenBytes + o * kSlotBytes, rank ^ o),
           remote_address(barrier + 8 * (buffer * G::kGroups + o / G::kGroupSlots), rank ^ o), high,
           low);
  }
};

// h is stored one step late, since global traffic between the sends of h would delay them: warp w
// stores row w, lane i units 2i and 2i + 1, in whole lines.
template <class G>
struct LateOutput {
  HiddenOutput output;
  uint32_t state_store, state_load;

  __device__ __forceinline__ LateOutput(Shared<G>& shared, const PersistentForward& p,
                                        const Position& at, const Row& row)
      : output(p, row, at.block_unit0 + 2 * at.lane,
               at.block_unit0 + 2 * at.lane < at.hidden_size) {
    state_store = shared_address(&shared.states[0][2 * at.c][at.warp * 8 + at.g]);
    state_load = shared_address(&shared.states[0][at.warp][2 * at.lane]);
  }

  __device__ __forceinline__ void keep(const UnitState (&state)[2], int t) const {
#pragma unroll
    for (int i = 0; i < 2; i++)
      store_float(
          state_store + t % 2 * sizeof(Shared<G>::states[0]) + i * sizeof(Shared<G>::states[0][0]),
          state[i].h);
  }
  __device__ __forceinline__ void store(int t, bool goes_on) {
    if (output.stored && goes_on)
      *reinterpret_cast<float2*>(output.target) =
          load_float2(state_load + t % 2 * sizeof(Shared<G>::states[0]));
    output.target += output.target_step;
  }
};

template <class Place, bool kLayerNorm>
__global__ void __launch_bounds__(kWideThreads, 1)
    forward_wide_float_kernel(const __grid_constant__ PersistentForward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  using G = Geometry<Place, kLayerNorm>;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<G>*>(shared_bytes);
  const Recurrence& layer = p.layer;
  const Position at = locate_thread<kWideCluster, kWideUnits>(layer, kWideRows);
  if (at.steps == 0) return;       // no sequence of the cluster has any
  const int local_row = 2 * at.c;  // and 2c + 1
  const int unit = at.block_unit0 + at.warp * 8 + at.g;
  const bool in_range = at.block_unit0 + at.warp * 8 < at.hidden_size;

  const Arrivals<G> arrivals(shared.barriers);
  write_initial_hidden(shared, layer, at);
  fill_with_zeros<kWideThreads>(shared.ring);  // stays so where units are padding
  Product<G> product(shared, p.u, at);
  product.weights.load_kept();
  UnitState state[2];
  UnitParameters parameters;
  if (in_range) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      state[i].load(layer, locate_row(layer, at.row0 + local_row + i), unit);
    if (kLayerNorm) parameters.load(layer, unit);
  }
  HiddenSender<G> sender(shared, arrivals, at);
  WideStatistics statistics(shared.statistics, shared.warp_sums, arrivals.statistics, at);
  Input wx(shared_address(&shared.ring[0][0]), layer, at);
  __syncthreads();  // the ring is zero before copies land in it
  wx.stream.fetch(0);
  product.weights.request_first();
  LateOutput<G> late(shared, p, at, locate_row(layer, at.row0 + at.warp));
  // The first block's first 8 lanes store rho of row 2c + g.
  const Row rho_row = locate_row(layer, at.row0 + local_row + (at.g & 1));
  RhoOutput rho_output(p, rho_row, kLayerNorm && at.rank == 0 && at.warp == 0 && at.g < 2);
  RootMeanSquare norm(layer);
  const Activation activation = layer.activation;
  pin(wx.stream.source_step), pin(late.output.target_step);
  pin(norm.inverse_size), pin(product.inverse_scale), pin(norm.eps);
  pin(product.hidden_load), pin(sender.hidden);
  pin(statistics.sum_store), pin(statistics.sum_load), pin(statistics.statistics_load);
  pin(product.partial_store), pin(product.partial_load), pin(wx.load_address);
  pin(product.weights.shared_address), pin(product.weights.ring_address);
  __syncthreads();
  cluster_barrier();

#pragma unroll 1
  for (int t = 0; t < at.steps; t++) {
    float sums[kTiles][4] = {};
    product.multiply_quarter(sums, arrivals, t);
    product.add_quarters(sums, t);
    GatePair r[2] = {{sums[0][0], sums[0][2]}, {sums[0][1], sums[0][3]}};
    if constexpr (kLayerNorm) statistics.send_squares(r, at, t);

    // In the shadow of hop 1: the copy of the next step's wx, which belongs to the first request of
    // that step and so is there before its product ends; this step's; the store of the step before.
    wx.stream.fetch(t + 1);
    GatePair wx_t[2];
    wx.load(wx_t, t);
    if (t > 0) late.store(t - 1, t - 1 < wx.stream.steps);
    float rho[2] = {1.f, 1.f};
    if constexpr (kLayerNorm) {
      for (int i = 0; i < 2; i++) scale_and_shift(parameters, wx_t[i], r[i]);
      arrivals.wait_for_statistics(t);
      statistics.add_blocks(rho, norm);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) update(state[i], activation, wx_t[i], r[i], rho[i]);

    sender.send_hidden(state, t + 1);
    late.keep(state, t);
    rho_output.store(t < rho_row.length, (at.g & 1) ? rho[1] : rho[0]);
  }
  arrivals.wait_for_last_hidden(at.steps);
  __syncthreads();  // states
  late.store(at.steps - 1, at.steps <= wx.stream.steps);
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
  static_assert(sizeof(Shared<Geometry<Place, kLayerNorm>>) <= kWideSharedBytes);
  constexpr ClusterKernel<PersistentForward> kKernel = {
      forward_wide_float_kernel<Place, kLayerNorm>, kWideCluster, kWideThreads,
      sizeof(Shared<Geometry<Place, kLayerNorm>>)};
  return kKernel.run(p.choice.groups(p.layer.rows()), p, stream);
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
