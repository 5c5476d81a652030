// The forward recurrence of forward_narrow.cu with float32 operands, for H <= 512. Its two hops
// are the same; the products are those of split_float.cuh.
//
// Block k of a cluster owns units 32k..32k+31. Its warps form two teams: each holds the rows of Uc
// of two octets of units in registers for the whole sequence, as tiles of one gate of one octet,
// and its four warps split K: warp i multiplies what the blocks of the slots i modulo 4 sent, slot
// by slot as it comes. So a warp reads a quarter of h from shared memory; with all of h in every
// warp these reads were a third of a step. When the partial sums have met in shared memory, the
// last two warps add up the squares of all rows and send them, and warps 2r and 2r + 1 both compute
// row r, lane i unit i of the block; each sends the new state, 128 bytes a message, to half of the
// blocks. (Warps whose row the cluster does not have only multiply, and sum.)
//
// The warps of a block meet once a step, when the partial sums are written: "meeting" t. Before it
// the block needs h_t of all blocks; after it, it sends the statistics of step t, and when it has
// those of all blocks, h_{t+1}. What this means for the re-use of buffers:
// - h has one: h_{t+1} is sent after all statistics of step t, hence after the meetings t, which
//   end the reads of h_t. Without the norm it has two: h_{t+2} is sent after all h_{t+1}, hence
//   after the meetings t.
// - Statistics have two. Those of step t + 2 are sent after all h_{t+2}, hence after all statistics
//   of step t + 1, the receiver's own among them, sent after its meeting t + 1, when its warps have
//   read those of step t. (With one buffer, those of step t + 1 would be sent after h_{t+1} of all
//   blocks, which came from only half of the warps that read those of step t.)
// - Partial sums have two: written in step t + 2, after meeting t + 1, read before it. The place of
//   wx of step t - 1 is filled again after meeting t.
#include "light_gru/persistent/forward_stages.cuh"
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/narrow_float.cuh"

namespace sb_fast_sligru {
namespace {

constexpr int kTeamWarps = 4, kTeamOctets = 2;
constexpr int kHalf = kBlockUnits / 2;
constexpr int kRowBytes = 4 * kBlockUnits;  // high and low parts
constexpr int kSlotBytes = kRows * kRowBytes;
// (a, z) of 32 units, and 32 bytes for the four rows of a store to use different banks.
constexpr int kPartialRowBytes = 8 * kBlockUnits + 32;
constexpr int kPartialBytes = kRows * kPartialRowBytes;  // of one part of K

template <int kCluster_, bool kLayerNorm_>
struct Geometry {
  static constexpr int kCluster = kCluster_;
  static constexpr bool kLayerNorm = kLayerNorm_;
  static constexpr int kBuffers = kLayerNorm ? 1 : 2;
  static constexpr int kSlots = kCluster / kTeamWarps;  // that one warp multiplies
  static constexpr int kHiddenBytes = kCluster * kSlotBytes;
  static constexpr int kSumWarps = 2, kSumTargets = kCluster / kSumWarps;
};

template <class G>
struct Shared {
  // Slot o of `hidden` belongs to block rank ^ o: senders and receivers use the same slot, and
  // every block starts with its own. [slot][row][high parts or low parts][word]: word q is units q
  // and q + 16.
  alignas(128) uint8_t hidden[G::kBuffers][G::kHiddenBytes];
  alignas(16) float statistics[2][G::kCluster][kRows];
  alignas(16) uint8_t partial[2][kTeamWarps][kPartialBytes];  // of r
  alignas(16) float ring[kRingSteps][kRows][2][kBlockUnits];  // wx: [.][.][a, z][unit]
  // mbarriers; h has one a slot.
  alignas(8) uint64_t hidden_arrived[G::kBuffers][G::kCluster], statistics_arrived;
};

// What a thread does: in the product, of which team and for which part of K; after it, for which
// row and for which half of the blocks.
struct Role {
  int team, part;
  int row, half;

  __device__ __forceinline__ explicit Role(int warp)
      : team(warp / kTeamWarps), part(warp % kTeamWarps), row(warp / 2), half(warp % 2) {}
};

// Bytes of one round of messages under an mbarrier.
struct Traffic {
  uint32_t hidden, statistics;
};

// By all threads of the block. A cluster_barrier() has to follow.
template <class G>
__device__ __forceinline__ void init_barriers(Shared<G>& shared, const Traffic& traffic) {
  if (threadIdx.x < G::kBuffers * G::kCluster)
    mbarrier::init(shared_address(&shared.hidden_arrived[0][threadIdx.x]));
  if (threadIdx.x == 0) mbarrier::init(shared_address(&shared.statistics_arrived));
  mbarrier::fence_init();
  __syncthreads();
  if (threadIdx.x < G::kCluster) {
    mbarrier::arrive(shared_address(&shared.hidden_arrived[0][threadIdx.x]));  // h0: no message
    if constexpr (G::kBuffers == 2)
      mbarrier::expect(shared_address(&shared.hidden_arrived[1][threadIdx.x]), traffic.hidden);
  }
  if (G::kLayerNorm && threadIdx.x == 0)
    mbarrier::expect(shared_address(&shared.statistics_arrived), traffic.statistics);
}

// h0 as the product's operand.
template <class G>
__device__ __forceinline__ void write_initial_hidden(Shared<G>& shared, const Recurrence& layer,
                                                     const Position& at) {
  const auto* h0 = static_cast<const float*>(layer.h0);
  for (int i = threadIdx.x; i < G::kCluster * kRows * 4; i += kFloatThreads) {
    const int quarter = i % 4, row = i / 4 % kRows, slot = i / 4 / kRows;  // four words
    const int column = static_cast<int>(at.rank ^ slot) * kBlockUnits + quarter * 4;
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f), y = x;
    if (h0 != nullptr) {
      const float* from =
          h0 + int64_t{locate_row(layer, at.row0 + row).index} * at.hidden_size + column;
      if (column < at.hidden_size) x = *reinterpret_cast<const float4*>(from);
      if (column + kHalf < at.hidden_size) y = *reinterpret_cast<const float4*>(from + kHalf);
    }
    const SplitPair words[4] = {split(x.x, y.x), split(x.y, y.y), split(x.z, y.z), split(x.w, y.w)};
    auto* to = reinterpret_cast<uint4*>(
        &shared.hidden[0][slot * kSlotBytes + row * kRowBytes + quarter * 16]);
    to[0] = make_uint4(words[0].high, words[1].high, words[2].high, words[3].high);
    to[4] = make_uint4(words[0].low, words[1].low, words[2].low, words[3].low);
  }
}

// r = Uc h, the sums over one part of K. Lane c multiplies units 4c..4c+3 and 4c+16..4c+19 of every
// slot, half of them in each of two products: the order of k is free as long as both operands
// agree.
template <class G>
struct Product {
  uint32_t weights[G::kSlots][2][kTeamOctets][2][4];
  float factor[kTeamOctets][2];  // of the products
  uint32_t hidden_barrier, hidden_address, partial_store;
  bool declares;  // the next messages

  __device__ __forceinline__ void load_weights(const float* u, const Position& at,
                                               const Role& role) {
#pragma unroll
    for (int e = 0; e < kTeamOctets; e++) {
      const int unit = at.block_unit0 + (role.team * kTeamOctets + e) * 8 + at.g;
#pragma unroll
      for (int gate = 0; gate < 2; gate++) {
        // First the floats, then, in their place, their parts.
        float largest = 0.f;
#pragma unroll
        for (int i = 0; i < G::kSlots; i++) {
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const int column =
                static_cast<int>(at.rank ^ (kTeamWarps * i + role.part)) * kBlockUnits + 4 * at.c +
                kHalf * k;
            float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
            if (unit < at.hidden_size && column < at.hidden_size)
              x = *reinterpret_cast<const float4*>(
                  u + (int64_t{gate} * at.hidden_size + unit) * at.hidden_size + column);
            uint32_t (&first)[4] = weights[i][0][e][gate], (&second)[4] = weights[i][1][e][gate];
            first[k] = __float_as_uint(x.x), first[2 + k] = __float_as_uint(x.y);
            second[k] = __float_as_uint(x.z), second[2 + k] = __float_as_uint(x.w);
            largest =
                fmaxf(fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y))), fmaxf(fabsf(x.z), fabsf(x.w)));
          }
        }
        const float scale = scale_for(max_lane_xor(max_lane_xor(largest, 1), 2));  // of the row
        factor[e][gate] = inverse_of(scale);
#pragma unroll
        for (int i = 0; i < G::kSlots; i++)
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
  }

  __device__ __forceinline__ void set_addresses(Shared<G>& shared, const Position& at,
                                                const Role& role) {
    hidden_barrier = shared_address(&shared.hidden_arrived[0][role.part]);
    hidden_address = shared_address(&shared.hidden[0][role.part * kSlotBytes + at.lane * 16]);
    partial_store =
        shared_address(&shared.partial[0][role.part][at.c * kPartialRowBytes +
                                                     (role.team * kTeamOctets * 8 + at.g) * 8]);
    declares = at.warp < kTeamWarps && at.lane == 0;
  }

  // Waits for h slot by slot.
  __device__ __forceinline__ void multiply_part(float (&sums)[kTeamOctets][2][4],
                                                const Traffic& traffic, int t) const {
    const uint32_t buffer = t % G::kBuffers;
#pragma unroll
    for (int n = 0; n < G::kSlots; n++) {
      const uint32_t barrier = hidden_barrier + 8 * (buffer * G::kCluster + n * kTeamWarps);
      mbarrier::wait(barrier, t / G::kBuffers & 1);
      if (declares) mbarrier::expect(barrier, traffic.hidden);
      const float4 operand =
          load_float4(hidden_address + buffer * G::kHiddenBytes + n * kTeamWarps * kSlotBytes);
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
  }

  // For add_parts().
  __device__ __forceinline__ void store_part(const float (&sums)[kTeamOctets][2][4], int t) const {
    const uint32_t to = partial_store + t % 2 * sizeof(Shared<G>::partial[0]);
#pragma unroll
    for (int e = 0; e < kTeamOctets; e++) {
      float r[2];
#pragma unroll
      for (int gate = 0; gate < 2; gate++) {
        const float (&sum)[4] = sums[e][gate];
        r[gate] = fmaf(sum[1] + sum[2], 1.f / kLowScale, sum[0]) * factor[e][gate];
      }
      store_float2(to + e * 64, r[0], r[1]);
    }
  }
};

// The parts of r of a row and unit, summed. `partial_load`: of the first part.
template <class G>
__device__ __forceinline__ GatePair add_parts(uint32_t partial_load, int t) {
  float2 parts[kTeamWarps];
#pragma unroll
  for (int i = 0; i < kTeamWarps; i++)
    parts[i] =
        load_float2(partial_load + t % 2 * sizeof(Shared<G>::partial[0]) + i * kPartialBytes);
  return {(parts[0].x + parts[1].x) + (parts[2].x + parts[3].x),
          (parts[0].y + parts[1].y) + (parts[2].y + parts[3].y)};
}

// The sum of r^2 over all units: over those of the block, by the last warps, then, after hop 1,
// over the blocks. Each of the last warps sends to a part of the blocks, lane 4g + c the sum of row
// c to block g of them.
template <class G>
struct Statistics {
  bool sums, sends;  // this warp, this lane
  uint32_t square_load;
  uint32_t barrier, statistics_load;
  uint32_t sum_target, sum_barrier;

  __device__ __forceinline__ Statistics(Shared<G>& shared, const Position& at, const Role& role,
                                        int rows) {
    const int sum_warp = at.warp - (kFloatWarps - G::kSumWarps);
    const uint32_t receiver = (sum_warp * G::kSumTargets + at.g) % G::kCluster;
    sums = G::kLayerNorm && sum_warp >= 0;
    sends = at.c < rows && at.g < G::kSumTargets;
    barrier = shared_address(&shared.statistics_arrived);
    sum_target = remote_address(shared_address(&shared.statistics[0][at.rank][at.c]), receiver);
    sum_barrier = remote_address(barrier, receiver);
    square_load = shared_address(&shared.partial[0][0][at.c * kPartialRowBytes + at.g * 16]);
    statistics_load = shared_address(&shared.statistics[0][at.lane % 2][role.row]);
  }

  // Lane 4g + c sums units 2g, 2g + 1 and 16 further, of row c.
  __device__ __forceinline__ void send_squares(int t) const {
    if (!sums) return;
    float square = 0.f;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      float4 parts[kTeamWarps];
#pragma unroll
      for (int i = 0; i < kTeamWarps; i++)
        parts[i] = load_float4(square_load + t % 2 * sizeof(Shared<G>::partial[0]) +
                               i * kPartialBytes + k * 8 * kHalf);
      const float4 r = sum_of(parts);
      square += fmaf(r.x, r.x, r.y * r.y) + fmaf(r.z, r.z, r.w * r.w);
    }
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) square = add_lane_xor(square, offset);
    if (sends)
      send(sum_target + t % 2 * sizeof(Shared<G>::statistics[0]), sum_barrier,
           __float_as_uint(square));
  }

  __device__ __forceinline__ float receive_sum(const Traffic& traffic, int t) const {
    receive(barrier, t & 1, traffic.statistics);
    float even = 0.f, odd = 0.f;  // two lanes share the sum over the blocks
#pragma unroll
    for (int i = 0; i < G::kCluster / 2; i++)
      (i % 2 ? odd : even) +=
          load_float(statistics_load + t % 2 * sizeof(Shared<G>::statistics[0]) +
                     i * 2 * sizeof(Shared<G>::statistics[0][0]));
    return add_lane_xor(even + odd, 1);
  }
};

// wx of a row: the first lanes of warp 2r each copy one 16-byte piece a step. The warps meet
// between the wait for a copy and its use.
template <class G>
struct Input {
  InputStream<kRingSteps, sizeof(Shared<G>::ring[0])> stream;
  uint32_t load_address;

  __device__ __forceinline__ Input(Shared<G>& shared, const Recurrence& layer, const Position& at,
                                   const Role& role, const Row& row) {
    const Sequence wx = wx_sequence(layer);
    const int unit = at.lane % 8 * 4, gate = at.lane / 8 % 2;
    stream.steps = row.length;
    stream.copies = role.half == 0 && at.lane < 16 && at.block_unit0 + unit < at.hidden_size;
    stream.source = wx.at(layer, row, 0, gate * at.hidden_size + at.block_unit0 + unit);
    stream.source_step = wx.step_bytes(row);
    stream.target = shared_address(&shared.ring[0][role.row][gate][unit]);
    load_address = shared_address(&shared.ring[0][role.row][0][at.lane]);
  }

  __device__ __forceinline__ GatePair load(int t) const {
    const uint32_t now = load_address + t % kRingSteps * sizeof(Shared<G>::ring[0]);
    const float a = load_float(now);
    return {a, load_float(now + sizeof(Shared<G>::ring[0][0][0]))};
  }
};

// h, split, to all blocks, hop 2. Warp 2r sends row r's h to the even slots, warp 2r + 1 to the odd
// ones, lane i word i.
template <class G>
struct HiddenSender {
  uint32_t target[G::kCluster / 2], target_barrier[G::kCluster / 2];
  uint32_t both_halves;  // for __byte_perm

  __device__ __forceinline__ HiddenSender(Shared<G>& shared, const Position& at, const Role& role) {
#pragma unroll
    for (int i = 0; i < G::kCluster / 2; i++) {
      const uint32_t slot = 2 * i + role.half, receiver = at.rank ^ slot;
      target[i] = remote_address(
          shared_address(&shared.hidden[0][slot * kSlotBytes + role.row * kRowBytes + at.lane * 4]),
          receiver);
      target_barrier[i] = remote_address(shared_address(&shared.hidden_arrived[0][slot]), receiver);
      pin(target[i]), pin(target_barrier[i]);
    }
    both_halves = at.lane < kHalf ? 0x5410 : 0x3276;
  }

  // h_t. A lane's pair of high and low part becomes, with that of the lane 16 further, a word of
  // two high parts in the one and a word of two low parts in the other.
  __device__ __forceinline__ void send_hidden(float h, int t) const {
    const float high = __half2float(__float2half_rn(h));
    const uint32_t pair = OperandTraits<__half>::pack(h, (h - high) * kLowScale);
    const uint32_t word = __byte_perm(pair, __shfl_xor_sync(0xffffffffu, pair, kHalf), both_halves);
    const uint32_t buffer = t % G::kBuffers;
#pragma unroll
    for (int i = 0; i < G::kCluster / 2; i++)
      send(target[i] + buffer * G::kHiddenBytes, target_barrier[i] + buffer * 8 * G::kCluster,
           word);
  }
};

template <int kCluster, bool kLayerNorm>
__global__ void __launch_bounds__(kFloatThreads, 1)
    forward_narrow_float_kernel(const __grid_constant__ PersistentForward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  using G = Geometry<kCluster, kLayerNorm>;
  __shared__ Shared<G> shared;
  const Recurrence& layer = p.layer;
  const int rows = cluster_rows(p.layer, kCluster);
  Position at = locate_thread<kCluster, kBlockUnits>(layer, rows);
  // The shuffle lets the compiler know that all lanes of a warp take the same branch.
  at.warp = __shfl_sync(0xffffffffu, at.warp, 0);
  const Role role(at.warp);
  const bool owns_row = role.row < rows;
  const int unit = at.block_unit0 + at.lane;
  const bool in_range = unit < at.hidden_size;
  const Traffic traffic = {kRowBytes * static_cast<uint32_t>(rows),
                           static_cast<uint32_t>(kCluster * sizeof(float) * rows)};

  init_barriers(shared, traffic);
  write_initial_hidden(shared, layer, at);
  fill_with_zeros<kFloatThreads>(shared.ring);  // stays so where units are padding
  Product<G> product;
  product.load_weights(static_cast<const float*>(p.u), at, role);
  const Row row = locate_row(layer, at.row0 + role.row);
  UnitState state;
  UnitParameters parameters;
  if (in_range) {
    state.load(layer, row, unit);
    if (kLayerNorm) parameters.load(layer, unit);
  }
  HiddenSender<G> sender(shared, at, role);
  Statistics<G> statistics(shared, at, role, rows);
  Input<G> wx(shared, layer, at, role, row);
  __syncthreads();  // the ring is zero before copies land in it
  if (owns_row) {
#pragma unroll
    for (int n = 0; n < kRingSteps - 1; n++) wx.stream.fetch_group(n);
    copy_async_wait<kRingSteps - 2>();
  }
  HiddenOutput output(p, row, unit, in_range && role.half == 0);
  RhoOutput rho_output(p, row, kLayerNorm && at.rank == 0 && role.half == 0 && at.lane == 0);
  product.set_addresses(shared, at, role);
  uint32_t partial_load =
      shared_address(&shared.partial[0][0][role.row * kPartialRowBytes + at.lane * 8]);
  RootMeanSquare norm(layer);
  const Activation activation = layer.activation;
  pin(product.hidden_barrier), pin(product.hidden_address), pin(product.partial_store);
  pin(partial_load);
  pin(statistics.barrier), pin(statistics.square_load), pin(statistics.statistics_load);
  pin(statistics.sum_target), pin(statistics.sum_barrier);
  pin(wx.stream.target), pin(wx.load_address), pin(sender.both_halves);
  pin(wx.stream.source_step), pin(output.target_step), pin(norm.inverse_size), pin(norm.eps);
  cluster_barrier();

#pragma unroll 1
  for (int t = 0; t < at.steps; t++) {
    float sums[kTeamOctets][2][4] = {};
    product.multiply_part(sums, traffic, t);
    product.store_part(sums, t);
    __syncthreads();  // the meeting
    statistics.send_squares(t);
    if (!owns_row) continue;

    GatePair r = add_parts<G>(partial_load, t);
    GatePair wx_t = wx.load(t);
    float rho = 1.f;
    if constexpr (kLayerNorm) {
      scale_and_shift(parameters, wx_t, r);
      rho = norm.rho(statistics.receive_sum(traffic, t));
    }
    update(state, activation, wx_t, r, rho);

    sender.send_hidden(state.h, t + 1);
    // In the shadow of hop 2: the copy for a later step.
    wx.stream.fetch_group(t + kRingSteps - 1);
    copy_async_wait<kRingSteps - 2>();
    const bool goes_on = t < row.length;
    output.store_float(goes_on, state.h);
    rho_output.store(goes_on, rho);
  }
  for (int n = 0; n < kCluster; n++)
    mbarrier::wait(shared_address(&shared.hidden_arrived[at.steps % G::kBuffers][n]),
                   at.steps / G::kBuffers & 1);
  cluster_barrier();
#endif
}

template <int kCluster>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  const auto kernel = p.layer.layer_norm ? forward_narrow_float_kernel<kCluster, true>
                                         : forward_narrow_float_kernel<kCluster, false>;
  const ClusterKernel<PersistentForward> in_clusters = {kernel, kCluster, kFloatThreads};
  return in_clusters.run(p.choice.groups(p.layer.rows()), p, stream);
}

}  // namespace

cudaError_t run_forward_narrow_float(const PersistentForward& p, cudaStream_t stream) {
  switch (p.choice.group) {
    case 4:
      return launch<4>(p, stream);
    case 8:
      return launch<8>(p, stream);
    case 16:
      return launch<16>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace sb_fast_sligru
