// The forward recurrence of forward_narrow.cu for 512 < H <= 1024: same equations, same two
// hops.
//
// The warps of a block form two groups of 4. Warp (m, q) of group m multiplies the group's four
// 16-row tiles of Uc (tile: 8 units, row g candidate, row g + 8 gate) by the q-th 16 units of every
// sender's slot, so that it reads a quarter of h and has work in every arrival group. The partial
// sums meet in shared memory, where warp (m, q) collects tile 4m + q, its own 8 units; in its lanes
// d[0], d[1] are the candidate of unit g for rows 2c, 2c + 1 and d[2], d[3] the gate.
#include "light_gru/persistent/forward_stages.cuh"
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/wide.cuh"

namespace sb_fast_sligru {
namespace {

constexpr int kSharedFragments = 22;
constexpr int kTiles = 4;                               // tiles of a warp, warps of a group
constexpr int kBatchSlots = 2;                          // slots multiplied at a time
constexpr int kEarlyTargets = 13;                       // blocks that get h before the next product
constexpr int kSectionBytes = kWideRows * 8 * 2;        // 8 units of one warp: [row][8 units]
constexpr int kSlotBytes = kWideWarps * kSectionBytes;  // what one block sends
constexpr int kHiddenBytes = kWideCluster * kSlotBytes;
constexpr int kPartialBytes = 32 * 16;                      // a tile's partial sums of one warp
constexpr int kRingBytes = kWideRows * 2 * kWideUnits * 4;  // wx of a block and step, at most
constexpr int kLineBytes = kWideUnits * 2;                  // a row of U, units of one block

constexpr int kStateStride = kWideUnits + 4;  // float; against bank conflicts

template <bool kLayerNorm_>
struct Geometry {
  static constexpr bool kLayerNorm = kLayerNorm_;
  static constexpr int kBuffers = kLayerNorm ? 1 : 2;
  static constexpr int kGroups = 4;  // mbarriers under which h arrives
  static constexpr int kGroupSlots = kWideCluster / kGroups;
  static constexpr uint32_t kGroupTraffic = kGroupSlots * kSlotBytes;
  static constexpr uint32_t kStatisticsTraffic = kWideCluster * kWideRows * sizeof(float);
  static constexpr int kStages = kLayerNorm ? 5 : 3;  // of U on its way; as many as find room
};

template <class G>
struct Shared {
  // Slot o of `hidden` belongs to block rank ^ o.
  alignas(1024) uint8_t hidden[G::kBuffers][kHiddenBytes];
  uint8_t fragments[kSharedFragments][kWideWarps][kFragmentBytes];
  uint8_t partial[G::kBuffers][kWideWarps][kTiles][kPartialBytes];  // [tile][sender in its group]
  float states[2][kWideRows][kStateStride];
  uint8_t ring[kRingSteps][kRingBytes];
  float statistics[kWideCluster][kWideRows];
  float warp_sums[2][kWideRows][kWideWarps];  // two in turn: one barrier a step
  alignas(128) uint8_t stages[G::kStages][2 * kWideUnits * kLineBytes];  // [candidate, gate][row]
  uint64_t barriers[Arrivals<G>::kCount];
};

// In a slot. The rows of odd sections are turned by 4 against bank conflicts.
__device__ __forceinline__ int section_row(int row, int section) {
  return section * kSectionBytes + ((row + 4 * section) & 7) * 16;
}

// h0 as the product's operand.
template <class T, class G>
__device__ __forceinline__ void write_initial_hidden(Shared<G>& shared, const Recurrence& layer,
                                                     const Position& at) {
  for (int i = threadIdx.x; i < kHiddenBytes / 4; i += kWideThreads) {
    const int row = i / (kWideHidden / 2), k = i % (kWideHidden / 2) * 2;
    const int slot = k / kWideUnits, section = k % kWideUnits / 8;
    const int column = (at.rank ^ slot) * kWideUnits + k % kWideUnits;
    const float2 value = load_initial_pair(layer, locate_row(layer, at.row0 + row), column);
    *reinterpret_cast<uint32_t*>(
        &shared.hidden[0][slot * kSlotBytes + section_row(row, section) + k % 8 * 2]) =
        OperandTraits<T>::pack(value.x, value.y);
  }
}

// U comes slot by slot, in whole lines, through Shared::stages.
template <class T, class G>
struct WeightStream {
  const T* u;
  uint32_t stages;

  // The 16-byte pieces of a line are permuted by row against bank conflicts.
  __device__ __forceinline__ uint32_t piece_address(int o, int line, int piece) const {
    return stages + o % G::kStages * sizeof(Shared<G>::stages[0]) + line * kLineBytes +
           (piece ^ (line % 4 * 2)) * 16;
  }

  __device__ __forceinline__ void fetch(int o, const Position& at) const {
    constexpr int kPieces = kLineBytes / 16;  // of a line
    if (o < kWideCluster) {
#pragma unroll
      for (int i = 0; i < 2 * kWideUnits * kPieces / kWideThreads; i++) {
        const int index = i * kWideThreads + threadIdx.x, piece = index % kPieces;
        const int line = index / kPieces, row = at.block_unit0 + line % kWideUnits;
        const int column = (at.rank ^ o) * kWideUnits + piece * 8;
        const bool valid = row < at.hidden_size && column < at.hidden_size;
        const int output = line / kWideUnits * at.hidden_size + row;
        copy_async_16_or_zeros(piece_address(o, line, piece),
                               u + (valid ? int64_t{output} * at.hidden_size + column : 0), valid);
      }
    }
    copy_async_commit();
  }
};

// h to all blocks, hop 2. No warp multiplies while its messages queue for the network, so the last
// of them follow after the products of the first group. Still a block has all of h only when every
// warp has sent to it: buffers are re-used as safely.
template <class T, class G>
struct HiddenSender {
  uint32_t hidden, barrier;  // this block's own
  uint32_t rank;
  uint32_t words = 0;

  // After transpose() lane (g, c) holds units 2c, 2c + 1 of row g.
  __device__ __forceinline__ HiddenSender(Shared<G>& shared, const Arrivals<G>& arrivals,
                                          const Position& at)
      : hidden(shared_address(&shared.hidden[0][section_row(at.g, at.warp) + at.c * 4])),
        barrier(arrivals.hidden),
        rank(at.rank) {}

  __device__ __forceinline__ void set(float row0, float row1) {
    words = transpose(OperandTraits<T>::pack(row0, row1));
  }
  __device__ __forceinline__ void send_early(int t) { send_to(0, kEarlyTargets, t); }
  __device__ __forceinline__ void send_late(int t) { send_to(kEarlyTargets, kWideCluster, t); }

  // h_t to the blocks rank ^ from, ..., rank ^ (to - 1).
  __device__ __forceinline__ void send_to(uint32_t from, uint32_t to, int t) {
    const uint32_t buffer = t % G::kBuffers;
    asm volatile("" : "+r"(rank));  // or the addresses below would be kept in registers, 32 of them
#pragma unroll
    for (uint32_t o = 0; o < kWideCluster; o++)
      if (from <= o && o < to)
        send(remote_address(hidden + buffer * kHiddenBytes + o * kSlotBytes, rank ^ o),
             remote_address(barrier + 8 * (buffer * G::kGroups + o / G::kGroupSlots), rank ^ o),
             words);
  }
};

// r = Uc h. Fragment 4o + m: slot o, tile quarter ^ m of the group, so that a warp's own tile is
// m = 0. Lane c multiplies units 4c..4c+3 of the quarter.
template <class T, class G>
struct Product {
  using Split = FragmentSplit<kSharedFragments>;

  uint32_t weights[Split::kInRegisters][4];
  uint32_t fragment_address, hidden_load, partial_store, partial_load;
  int warp, group, quarter;

  __device__ __forceinline__ Product(Shared<G>& shared, const Position& at)
      : warp(at.warp), group(at.warp / kTiles), quarter(at.warp % kTiles) {
    fragment_address = shared_address(&shared.fragments[0][warp][at.lane * 16]);
    hidden_load = shared_address(
        &shared.hidden[0][section_row(at.g, 2 * quarter + (at.c >> 1)) + (at.c & 1) * 8]);
    partial_store = shared_address(&shared.partial[0][0][quarter][at.lane * 16]);
    partial_load = shared_address(&shared.partial[0][warp][0][at.lane * 16]);
  }

  __device__ __forceinline__ void load_weights(Shared<G>& shared, const void* u,
                                               const Position& at) {
    const WeightStream<T, G> stream = {static_cast<const T*>(u),
                                       shared_address(&shared.stages[0][0])};
#pragma unroll 1
    for (int o = 0; o < G::kStages - 1; o++) stream.fetch(o, at);
#pragma unroll
    for (int o = 0; o < kWideCluster; o++) {
      copy_async_wait<G::kStages - 2>();
      __syncthreads();
      stream.fetch(o + G::kStages - 1, at);
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        const int f = o * kTiles + m, line = (group * kTiles + (quarter ^ m)) * 8 + at.g;
        const uint32_t from =
            stream.piece_address(o, line, 2 * quarter + (at.c >> 1)) + (at.c & 1) * 8;
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
  }

  // The quarter's part of the sums of all tiles. Waits for h group by group; the messages left from
  // the step before are sent after the first.
  __device__ __forceinline__ void multiply_quarter(float (&sums)[kTiles][4],
                                                   const Arrivals<G>& arrivals,
                                                   HiddenSender<T, G>& sender, int t) const {
    const uint32_t buffer = t % G::kBuffers;
#pragma unroll
    for (int n = 0; n < kWideCluster / kBatchSlots; n++) {
      constexpr int kBatch = kBatchSlots * kTiles;  // fragments
      uint4 staged[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i++)
        if (Split::is_shared(n * kBatch + i))
          staged[i] = load_uint4(fragment_address + Split::shared_before(n * kBatch + i) *
                                                        sizeof(Shared<G>::fragments[0]));
      if (n * kBatchSlots == G::kGroupSlots && t > 0) sender.send_late(t);
      if (n * kBatchSlots % G::kGroupSlots == 0)
        arrivals.wait_for_hidden(t, n * kBatchSlots / G::kGroupSlots);
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
  }

  // Adds the other warps' parts to sums[0], the warp's own tile.
  __device__ __forceinline__ void add_quarters(float (&sums)[kTiles][4], int t) const {
    const uint32_t buffer = t % G::kBuffers * sizeof(Shared<G>::partial[0]);
#pragma unroll
    for (int m = 1; m < kTiles; m++)
      store_uint4(partial_store + buffer + (warp ^ m) * sizeof(Shared<G>::partial[0][0]),
                  make_uint4(__float_as_uint(sums[m][0]), __float_as_uint(sums[m][1]),
                             __float_as_uint(sums[m][2]), __float_as_uint(sums[m][3])));
    if (G::kLayerNorm)
      named_barrier(1 + group, kTiles * 32);
    else
      __syncthreads();  // for the ring: with the norm, that of the statistics serves
#pragma unroll
    for (int m = 1; m < kTiles; m++) {
      const float4 x = load_float4(partial_load + buffer + (quarter ^ m) * kPartialBytes);
      sums[0][0] += x.x, sums[0][1] += x.y, sums[0][2] += x.z, sums[0][3] += x.w;
    }
  }
};

// wx in whole 128-byte lines: 8 neighbouring threads a line. In the ring: [row][a, z][8 units of a
// warp], warps permuted by row against bank conflicts.
template <class T, bool kPlain>
struct Input {
  InputStream<kRingSteps, kRingBytes> stream;
  uint32_t load_address, gate_bytes;
  bool is_float;

  static __device__ __forceinline__ int section_of(int row, int gate, int section) {
    return (row * 2 + gate) * kWideWarps + (section ^ (row >> 1 & 3));
  }

  __device__ __forceinline__ Input(uint32_t ring, const Recurrence& layer, const Position& at) {
    const Sequence wx = wx_sequence(layer);
    is_float = !kPlain && wx.is_float();
    const int wx_bytes = is_float ? 4 : 2, pieces = wx_bytes / 2;  // pieces of 8 units
    const int section = threadIdx.x / pieces % kWideWarps;
    const int gate = threadIdx.x / pieces / kWideWarps % 2;
    const int local_row = threadIdx.x / pieces / kWideWarps / 2;
    const Row row = locate_row(layer, at.row0 + local_row % kWideRows);
    stream.steps = row.length;
    stream.copies = local_row < kWideRows && at.block_unit0 + section * 8 < at.hidden_size;
    stream.source = wx.at(layer, row, 0, gate * at.hidden_size + at.block_unit0 + section * 8) +
                    threadIdx.x % pieces * 16;
    stream.source_step = wx.step_bytes(row);
    stream.target =
        ring +
        (section_of(local_row % kWideRows, gate, section) * pieces + threadIdx.x % pieces) * 16;
    load_address = ring + (section_of(2 * at.c, 0, at.warp) * 8 + at.g) * wx_bytes;
    gate_bytes = kWideUnits * wx_bytes;
  }

  // Of rows 2c and 2c + 1.
  __device__ __forceinline__ void load(GatePair (&wx)[2], int t) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t now = load_address + t % kRingSteps * kRingBytes + i * 2 * gate_bytes;
      wx[i].a = is_float ? load_float(now) : load_operand<T>(now);
      wx[i].z = is_float ? load_float(now + gate_bytes) : load_operand<T>(now + gate_bytes);
    }
  }
};

// update() for two rows. One branch for both: between two, the second would wait for the first.
__device__ __forceinline__ void update_rows(UnitState (&state)[2], Activation activation,
                                            const GatePair (&wx)[2], const GatePair (&r)[2],
                                            const float (&rho)[2]) {
  float z[2], candidate[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    z[i] = fast_sigmoid(fmaf(r[i].z, rho[i], wx[i].z));
    candidate[i] = fmaf(r[i].a, rho[i], wx[i].a);
  }
  if (activation == Activation::kRelu) {
    for (float& x : candidate) x = Relu::fast_value(x);
  } else {
    for (float& x : candidate) x = fast_activate(activation, x);
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
    state[i].h = next_hidden(state[i].h, z[i], candidate[i] * state[i].drop_mask);
}

// h is stored one step late, since global traffic between the sends of h would delay them: warp w
// stores row w, lane i units 2i and 2i + 1, in whole lines. 16-bit h is read from the block's own
// slot, float h from `states`, two buffers in turn.
template <class G>
struct LateOutput {
  HiddenOutput output;
  int length;  // steps of its row's sequence
  uint32_t own_slot, state_store, state_load;

  __device__ __forceinline__ LateOutput(Shared<G>& shared, const PersistentForward& p,
                                        const Position& at, const Row& row)
      : output(p, row, at.block_unit0 + 2 * at.lane, at.block_unit0 + 2 * at.lane < at.hidden_size),
        length(row.length) {
    own_slot =
        shared_address(&shared.hidden[0][section_row(at.warp, at.lane >> 2) + (at.lane & 3) * 4]);
    state_store = shared_address(&shared.states[0][2 * at.c][at.warp * 8 + at.g]);
    state_load = shared_address(&shared.states[0][at.warp][2 * at.lane]);
  }

  // 16-bit h_t, before its slot is written again.
  __device__ __forceinline__ uint32_t load_own(int t) const {
    return load_uint(own_slot + t % G::kBuffers * kHiddenBytes);
  }
  __device__ __forceinline__ void keep(const UnitState (&state)[2], int t) const {
    if (output.is_float) {
#pragma unroll
      for (int i = 0; i < 2; i++)
        store_float(state_store + t % 2 * sizeof(Shared<G>::states[0]) +
                        i * sizeof(Shared<G>::states[0][0]),
                    state[i].h);
    }
  }
  __device__ __forceinline__ void store(int t, uint32_t words) {
    if (output.stored && t < length) {
      if (output.is_float)
        *reinterpret_cast<float2*>(output.target) =
            load_float2(state_load + t % 2 * sizeof(Shared<G>::states[0]));
      else
        *reinterpret_cast<uint32_t*>(output.target) = words;
    }
    output.target += output.target_step;
  }
};

// kPlain: ReLU, wx of the operand type; the choice at run time takes 0.03 us a step.
template <class T, bool kLayerNorm, bool kPlain>
__global__ void __launch_bounds__(kWideThreads, 1)
    forward_wide_kernel(const __grid_constant__ PersistentForward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  using G = Geometry<kLayerNorm>;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<G>*>(shared_bytes);
  const Recurrence& layer = p.layer;
  const Position at = locate_thread<kWideCluster, kWideUnits>(layer, kWideRows);
  if (at.steps == 0) return;       // no sequence of the cluster has any
  const int local_row = 2 * at.c;  // and 2c + 1
  const int unit = at.block_unit0 + at.warp * 8 + at.g;
  const bool in_range = at.block_unit0 + at.warp * 8 < at.hidden_size;

  const Arrivals<G> arrivals(shared.barriers);
  write_initial_hidden<T>(shared, layer, at);
  fill_with_zeros<kWideThreads>(shared.ring);  // stays so where units are padding
  Product<T, G> product(shared, at);
  product.load_weights(shared, p.u, at);
  UnitState state[2];
  UnitParameters parameters;
  if (in_range) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      state[i].load(layer, locate_row(layer, at.row0 + local_row + i), unit);
    if (kLayerNorm) parameters.load(layer, unit);
  }
  HiddenSender<T, G> sender(shared, arrivals, at);
  WideStatistics statistics(shared.statistics, shared.warp_sums, arrivals.statistics, at);
  Input<T, kPlain> wx(shared_address(&shared.ring[0][0]), layer, at);
  __syncthreads();  // the ring is zero before copies land in it
#pragma unroll
  for (int n = 0; n < kRingSteps - 1; n++) wx.stream.fetch_group(n);
  copy_async_wait<kRingSteps - 2>();
  LateOutput<G> late(shared, p, at, locate_row(layer, at.row0 + at.warp));
  // The first block's first 8 lanes store rho of row 2c + g.
  const Row rho_row = locate_row(layer, at.row0 + local_row + (at.g & 1));
  RhoOutput rho_output(p, rho_row, kLayerNorm && at.rank == 0 && at.warp == 0 && at.g < 2);
  RootMeanSquare norm(layer);
  const Activation activation = kPlain ? Activation::kRelu : layer.activation;
  pin(wx.stream.source_step), pin(late.output.target_step);
  pin(norm.inverse_size), pin(norm.eps);
  pin(product.hidden_load), pin(sender.hidden);
  pin(statistics.sum_store), pin(statistics.sum_load), pin(statistics.statistics_load);
  pin(product.partial_store), pin(product.partial_load), pin(late.own_slot);
  pin(wx.load_address), pin(product.fragment_address);
  __syncthreads();
  cluster_barrier();

#pragma unroll 1
  for (int t = 0; t < at.steps; t++) {
    float sums[kTiles][4] = {};
    product.multiply_quarter(sums, arrivals, sender, t);
    const uint32_t own_words = late.load_own(t);  // h_{t-1}
    product.add_quarters(sums, t);
    GatePair r[2] = {{sums[0][0], sums[0][2]}, {sums[0][1], sums[0][3]}};
    if constexpr (kLayerNorm) statistics.send_squares(r, at, t);

    // In the shadow of hop 1: this step's wx, and the store of the step before.
    GatePair wx_t[2];
    wx.load(wx_t, t);
    if (t > 0) late.store(t - 1, own_words);
    float rho[2] = {1.f, 1.f};
    if constexpr (kLayerNorm) {
      for (int i = 0; i < 2; i++) scale_and_shift(parameters, wx_t[i], r[i]);
      arrivals.wait_for_statistics(t);
      statistics.add_blocks(rho, norm);
    }
    update_rows(state, activation, wx_t, r, rho);

    sender.set(state[0].h, state[1].h);
    sender.send_early(t + 1);
    late.keep(state, t);
    rho_output.store(t < rho_row.length, (at.g & 1) ? rho[1] : rho[0]);
    copy_async_wait<kRingSteps - 3>();
    wx.stream.fetch_group(t + kRingSteps - 1);
  }
  sender.send_late(at.steps);
  arrivals.wait_for_last_hidden(at.steps);
  __syncthreads();  // states
  late.store(at.steps - 1, late.load_own(at.steps));
  cluster_barrier();
#endif
}

template <class T, bool kLayerNorm, bool kPlain>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  static_assert(sizeof(Shared<Geometry<kLayerNorm>>) <= kWideSharedBytes);
  constexpr ClusterKernel<PersistentForward> kKernel = {forward_wide_kernel<T, kLayerNorm, kPlain>,
                                                        kWideCluster, kWideThreads,
                                                        sizeof(Shared<Geometry<kLayerNorm>>)};
  return kKernel.run(p.choice.groups(p.layer.rows()), p, stream);
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
