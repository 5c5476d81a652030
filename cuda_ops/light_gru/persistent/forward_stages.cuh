// The stages of the recurrence that the forward kernels share: what a lane keeps of its unit, what
// comes in, the gates, and what goes out. Each kernel adds its own product, statistics and exchange
// of h. The equations are at the head of forward_narrow.cu.
//
// A stage is a struct: its constructor is the work before the time loop, its fields are what the
// loop keeps in registers, which the kernels pin() one by one.
#pragma once

#include "light_gru/cell.h"
#include "light_gru/persistent/geometry.cuh"
#include "light_gru/persistent/wide.cuh"

namespace sb_fast_sligru {

// ---- where a thread stands
struct Position {
  int hidden_size;
  int steps;  // of the cluster's longest sequence; the shorter ones compute on, unread and unstored
  int warp, lane;
  int g, c;         // lane = 4g + c, as in product.cuh
  uint32_t rank;    // of the block in its cluster
  int row0;         // first row of the cluster
  int block_unit0;  // first unit of the block
};

// Clusters of kCluster blocks of kUnits units, which serve `rows` rows each.
template <int kCluster, int kUnits>
__device__ __forceinline__ Position locate_thread(const Recurrence& layer, int rows) {
  Position at;
  at.hidden_size = static_cast<int>(layer.hidden);
  at.warp = threadIdx.x / 32, at.lane = threadIdx.x % 32;
  at.g = at.lane / 4, at.c = at.lane % 4;
  at.rank = cluster_rank();
  at.row0 = static_cast<int>(blockIdx.x / kCluster) * rows;
  at.steps = longest_from(layer, at.row0);
  at.block_unit0 = static_cast<int>(at.rank) * kUnits;
  return at;
}

// ---- before the time loop

// A value of the candidate's row (a) and one of the update gate's row (z) of a unit.
struct GatePair {
  float a, z;
};

// LayerNorm's weight and bias of a unit.
struct UnitParameters {
  GatePair gamma = {1.f, 1.f}, beta = {0.f, 0.f};

  __device__ __forceinline__ void load(const Recurrence& layer, int unit) {
    const int hidden_size = static_cast<int>(layer.hidden);
    const auto* ln_weight = static_cast<const float*>(layer.ln_weight);
    const auto* ln_bias = static_cast<const float*>(layer.ln_bias);
    if (ln_weight != nullptr) gamma = {ln_weight[unit], ln_weight[hidden_size + unit]};
    if (ln_bias != nullptr) beta = {ln_bias[unit], ln_bias[hidden_size + unit]};
  }
};

// The running hidden state of a unit and row, in float32, and its recurrent dropout mask.
struct UnitState {
  float h = 0.f, drop_mask = 1.f;

  __device__ __forceinline__ void load(const Recurrence& layer, const Row& row, int unit) {
    const auto* h0 = static_cast<const float*>(layer.h0);
    const auto* mask = static_cast<const float*>(layer.drop_mask);
    const int64_t state = int64_t{row.index} * static_cast<int>(layer.hidden) + unit;
    if (h0 != nullptr) h = h0[state];
    if (mask != nullptr) drop_mask = mask[state];
  }
};

// h0 of units `unit` and `unit` + 1; 0 if there is none or beyond H.
__device__ __forceinline__ float2 load_initial_pair(const Recurrence& layer, const Row& row,
                                                    int unit) {
  const auto* h0 = static_cast<const float*>(layer.h0);
  const int hidden_size = static_cast<int>(layer.hidden);
  float2 pair = make_float2(0.f, 0.f);
  if (h0 != nullptr && unit < hidden_size)
    pair = *reinterpret_cast<const float2*>(h0 + int64_t{row.index} * hidden_size + unit);
  return pair;
}

// By all threads of the block.
template <int kBlockThreads, class Array>
__device__ __forceinline__ void fill_with_zeros(Array& array) {
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(array)) / 4; i += kBlockThreads)
    reinterpret_cast<uint32_t*>(array)[i] = 0;
}

// ---- arrival of messages (see exchange.cuh)

// Waits for a round of messages and declares the next one, of `bytes`.
__device__ __forceinline__ void receive(uint32_t barrier, uint32_t parity, uint32_t bytes) {
  mbarrier::wait(barrier, parity);
  if (threadIdx.x == 0) mbarrier::expect(barrier, bytes);
}

// The mbarriers of a block: h arrives in kBuffers buffers in turn, each under kGroups of them, the
// statistics under one more. G is a geometry with the constants named here.
template <class G>
struct Arrivals {
  static constexpr int kCount = G::kBuffers * G::kGroups + 1;
  uint32_t hidden, statistics;

  // By all threads of the block. A cluster_barrier() has to follow.
  __device__ __forceinline__ explicit Arrivals(uint64_t (&barriers)[kCount])
      : hidden(shared_address(&barriers[0])), statistics(shared_address(&barriers[kCount - 1])) {
    if (threadIdx.x < kCount) mbarrier::init(hidden + 8 * threadIdx.x);
    mbarrier::fence_init();
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 0; i < G::kGroups; i++) mbarrier::arrive(hidden + 8 * i);  // h0: no message
      for (int i = G::kGroups; i < G::kBuffers * G::kGroups; i++)
        mbarrier::expect(hidden + 8 * i, G::kGroupTraffic);
      if (G::kBuffers == 1) mbarrier::expect(statistics, G::kStatisticsTraffic);
    }
  }

  // h_t lies in buffer t % kBuffers.
  __device__ __forceinline__ void wait_for_hidden(int t, int group) const {
    receive(hidden + 8 * (t % G::kBuffers * G::kGroups + group), t / G::kBuffers & 1,
            G::kGroupTraffic);
  }
  __device__ __forceinline__ void wait_for_statistics(int t) const {
    receive(statistics, t & 1, G::kStatisticsTraffic);
  }
  __device__ __forceinline__ void wait_for_last_hidden(int steps) const {
    for (int n = 0; n < G::kGroups; n++)
      mbarrier::wait(hidden + 8 * (steps % G::kBuffers * G::kGroups + n), steps / G::kBuffers & 1);
  }
};

// ---- stream of wx

// A thread's share of wx, one 16-byte piece a step, from memory into a ring of kSteps steps in
// shared memory.
template <int kSteps, int kStepBytes>
struct InputStream {
  const char* source;  // of the next step to fetch
  int64_t source_step;
  uint32_t target;  // in the ring's first step
  int steps;        // of the row's sequence
  bool copies;      // or the thread has no share

  // Steps are fetched in order.
  __device__ __forceinline__ void fetch(int n) {
    if (n < steps && copies) copy_async_16(target + n % kSteps * kStepBytes, source);
    source += source_step;
  }
  // As one group of copies.
  __device__ __forceinline__ void fetch_group(int n) {
    fetch(n);
    copy_async_commit();
  }
};

// ---- gates

// What of wx + gamma r rho + beta needs no rho, in the shadow of hop 1.
__device__ __forceinline__ void scale_and_shift(const UnitParameters& parameters, GatePair& wx,
                                                GatePair& r) {
  wx.a += parameters.beta.a, wx.z += parameters.beta.z;
  r.a *= parameters.gamma.a, r.z *= parameters.gamma.z;
}

// z, candidate and h_t from wx + beta and gamma r.
__device__ __forceinline__ void update(UnitState& state, Activation activation, const GatePair& wx,
                                       const GatePair& r, float rho) {
  const float z = fast_sigmoid(fmaf(r.z, rho, wx.z));
  const float candidate = fast_activate(activation, fmaf(r.a, rho, wx.a)) * state.drop_mask;
  state.h = next_hidden(state.h, z, candidate);
}

// rho = rsqrt(mean(r^2) + eps)
struct RootMeanSquare {
  float inverse_size, eps;

  __device__ __forceinline__ explicit RootMeanSquare(const Recurrence& layer)
      : inverse_size(1.f / static_cast<float>(2 * static_cast<int>(layer.hidden))),
        eps(static_cast<float>(layer.eps)) {}
  __device__ __forceinline__ float rho(float sum_of_squares) const {
    return reciprocal_sqrt(fmaf(sum_of_squares, inverse_size, eps));
  }
};

// ---- statistics of two rows a lane, in the clusters of wide.cuh

// The sum over the warp's units of r^2: of row 2c + (g & 1) in lane (g, c), from those of unit g and
// rows 2c (even) and 2c + 1 (odd).
__device__ __forceinline__ float sum_over_units(float even, float odd, int g) {
  float sum = (g & 1) ? odd : even;
  sum += __shfl_xor_sync(0xffffffffu, (g & 1) ? even : odd, 4);
  return add_lane_xor(add_lane_xor(sum, 8), 16);
}

// r^2 summed over the units of the block, then, after hop 1, over the blocks.
struct WideStatistics {
  uint32_t sum_store, sum_load;      // in warp_sums
  uint32_t sum_target, sum_barrier;  // in the block to which the lane sends
  uint32_t statistics_load;

  static constexpr int kTurnBytes = kWideRows * kWideWarps * sizeof(float);

  __device__ __forceinline__ WideStatistics(float (&statistics)[kWideCluster][kWideRows],
                                            float (&warp_sums)[2][kWideRows][kWideWarps],
                                            uint32_t barrier, const Position& at) {
    const uint32_t receiver = 2 * at.warp + ((at.lane >> 3) & 1);
    sum_target = remote_address(shared_address(&statistics[at.rank][at.lane & 7]), receiver);
    sum_barrier = remote_address(barrier, receiver);
    sum_store = shared_address(&warp_sums[0][2 * at.c + (at.g & 1)][at.warp]);
    sum_load = shared_address(&warp_sums[0][at.lane & 7][0]);
    statistics_load = shared_address(&statistics[at.g][2 * at.c]);
  }

  // r of rows 2c and 2c + 1
  __device__ __forceinline__ void send_squares(const GatePair (&r)[2], const Position& at,
                                               int t) const {
    const float square[2] = {fmaf(r[0].a, r[0].a, r[0].z * r[0].z),
                             fmaf(r[1].a, r[1].a, r[1].z * r[1].z)};
    const float sum = sum_over_units(square[0], square[1], at.g);
    const uint32_t turn = t % 2 * kTurnBytes;
    if (at.g < 2) store_float(sum_store + turn, sum);
    __syncthreads();
    if (at.lane < 2 * kWideRows) {
      const float4 x = load_float4(sum_load + turn), y = load_float4(sum_load + turn + 16);
      send(sum_target, sum_barrier,
           __float_as_uint(((x.x + x.y) + (x.z + x.w)) + ((y.x + y.y) + (y.z + y.w))));
    }
  }

  // After they have arrived: rho of rows 2c and 2c + 1.
  __device__ __forceinline__ void add_blocks(float (&rho)[2], const RootMeanSquare& norm) const {
    const float2 low = load_float2(statistics_load);  // of blocks g and g + 8
    const float2 high = load_float2(statistics_load + 8 * kWideRows * sizeof(float));
    float sum[2] = {low.x + high.x, low.y + high.y};
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum[i] = add_lane_xor(sum[i], offset);
      rho[i] = norm.rho(sum[i]);
    }
  }
};

// ---- outputs, step by step

struct HiddenOutput {
  char* target;  // of the next step, from `unit` on
  int64_t target_step;
  bool is_float;
  bool stored;

  __device__ __forceinline__ HiddenOutput(const PersistentForward& p, const Row& row, int unit,
                                          bool in_range)
      : stored(row.valid && in_range) {
    const Sequence h = h_sequence(p.layer, p.h);
    target = const_cast<char*>(
        h.at(p.layer, row, 0, row.direction * static_cast<int>(p.layer.hidden) + unit));
    target_step = h.step_bytes(row);
    is_float = h.is_float();
  }

  // By the lane of the unit. Nothing is stored of a row that does not go on.
  __device__ __forceinline__ void store_float(bool goes_on, float h) {
    if (goes_on && stored) *reinterpret_cast<float*>(target) = h;
    target += target_step;
  }
  // T: the 16-bit type, if it is one.
  template <class T>
  __device__ __forceinline__ void store(bool goes_on, float h) {
    if (goes_on && stored) {
      if (is_float)
        *reinterpret_cast<float*>(target) = h;
      else
        *reinterpret_cast<uint16_t*>(target) = to_bits<T>(h);
    }
    target += target_step;
  }
};

struct RhoOutput {
  float* target;  // of the next step
  int target_step;
  bool stored;

  __device__ __forceinline__ RhoOutput(const PersistentForward& p, const Row& row, bool chosen)
      : target_step(row.direction ? -1 : 1), stored(chosen && row.valid) {
    target = nullptr;
    if (stored) target = p.rho + row.index * p.layer.time + row.time_of(0);
  }
  __device__ __forceinline__ void store(bool goes_on, float rho) {
    if (goes_on && stored) {
      *target = rho;
      target += target_step;
    }
  }
};

}  // namespace sb_fast_sligru
