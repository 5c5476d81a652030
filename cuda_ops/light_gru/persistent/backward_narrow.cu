// The backward recurrence of one chunk of time steps.
//
// For every row and step, with xh = rho Uc h_{n-1} and everything but d known beforehand
// (passes.cu):
//   Ka = (1 - z) mask act'(a);  Kz = (h_{n-1} - c) z (1 - z)
//   q = Ka gamma_a xh_a + Kz gamma_z xh_z;  V = rho Uc^T Uc h_{n-1}
// the recurrence is linear in d, the gradient with respect to h_n:
//   d = grad_h_n + carry;  dwx = [d Ka, d Kz];  m2 = sum(d q) / 2H
//   carry = d z + rho (Uc^T (gamma dwx) - m2 V)
// Li-GRU: carry = d z + U^T dwx. (Derived from the cell in forward_narrow.cu: the gradient of an
// RMS norm is rho (dx - xh mean(dx xh)), and mean(dx xh) = m2.)
//
// The sequential kernel is a reduce-scatter. Block k of a cluster owns the candidate and gate rows
// of its 32 or 64 units (as in the forward kernel) of Uc and of dwx. Its dwx never leaves it: it
// multiplies them by its rows of Uc for the units of all blocks and sends each block its partial
// carries, float32, which that block sums. m2 travels beside them, under its own mbarrier. Both use
// two buffers in turn (see exchange.cuh): a block writes step k + 1's only after it has all of step
// k's, which every block sends after a __syncthreads that follows its last read of step k - 1's.
//
// One step:
//   d = grad_h + carry -> dwx, to the block's warps -> product, of dwx and the block's rows of Uc
//   -> send the partial carries; meanwhile: terms of m2 -> sum over the block -> send to all blocks
//   -> store dwx, load the next step's inputs, fetch later ones
//   -> wait for m2, sum over blocks -> wait for the partial carries, sum over blocks -> carry
#include "light_gru/persistent/backward_stages.cuh"
#include "light_gru/persistent/launch.h"

namespace sb_fast_sligru {
namespace {

// A kernel of this file, and how its work is divided.
template <class T_, int kCluster_, int kUnits_, bool kLayerNorm_>
struct Shape {
  using T = T_;
  static constexpr int kCluster = kCluster_, kUnits = kUnits_;
  static constexpr bool kLayerNorm = kLayerNorm_;
  static constexpr int kHidden = kCluster * kUnits;  // padded
  // A part of a block: as many units as the outputs that a product's lanes send, one piece each.
  static constexpr int kBlockWarps = kUnits / 8, kBlockParts = kUnits / kBlockUnits;
  static constexpr int kStreams = kCoefficientStreams<kLayerNorm>;
};

// Who this thread is, and the unit and row of which its lane computes d and dwx.
template <class Shape>
struct Lane {
  int warp, lane, g, c;
  uint32_t rank;       // of the block in the cluster
  int row0;            // first row of the cluster
  int unit0, unit;     // of the warp, of the lane
  int row, warp_unit;  // of the lane, in the cluster and in the warp
  bool in_range;

  __device__ __forceinline__ explicit Lane(int hidden_size)
      : warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), c(lane % 4) {
    rank = cluster_rank();
    row0 = static_cast<int>(blockIdx.x / Shape::kCluster) * kRows;
    unit0 = static_cast<int>(rank) * Shape::kUnits + warp * 8;
    row = g / 2, warp_unit = 2 * c + g % 2;
    unit = unit0 + warp_unit;
    in_range = unit0 < hidden_size;
  }
};

// The coefficients, grad_h and rho of every step, through a ring in shared memory. Every warp
// copies what its lanes read, every lane at most one piece. Lanes in order: coefficients (16 bytes
// each), grad_h (16), and the last kRows lanes rho (4).
template <class Shape>
struct Streams {
  using T = typename Shape::T;
  static constexpr bool kLayerNorm = Shape::kLayerNorm;
  static constexpr int kStreams = Shape::kStreams;
  static constexpr int kStreamBytes = kRows * 16;              // [row][8 units]
  static constexpr int kGradOffset = kStreams * kStreamBytes;  // [row][8 units], 2 or 4 bytes
  static constexpr int kRhoOffset = kGradOffset + kRows * 32;  // [row]
  static constexpr int kRingBytes = kRhoOffset + kRows * 4;    // one warp and step
  static_assert(kRingBytes % 16 == 0);
  struct Step {
    uint8_t of_warp[Shape::kBlockWarps][kRingBytes];
  };
  using Memory = Step[kRingSteps];
  using Input = StepInput<float, kLayerNorm>;

  int count;
  PieceCopy<kLayerNorm> copy;
  uint32_t coefficient_address, grad_address, rho_address;
  bool grad_float;

  __device__ __forceinline__ Streams(const PersistentBackward& p, const Lane<Shape>& at, int begin,
                                     const Memory& ring)
      : count(static_cast<int>(p.count)) {
    const Sequence grad_h = grad_h_sequence(p);
    const int grad_bytes = grad_h.bytes(), grad_pieces = grad_bytes / 2, lane = at.lane;
    const auto& ring0 = ring[0].of_warp[at.warp];
    copy.target = shared_address(&ring0[0]);
    if (lane < kStreams * kRows) {
      const Row row = locate_row(p.layer, at.row0 + lane % kRows);
      copy.stream =
          coefficient_stream<T, kStreams, Shape::kHidden>(p, row, begin, lane / kRows, at.unit0);
      copy.entry = entry_step(p, row);
      copy.target += lane * 16;
    } else if (lane < kStreams * kRows + kRows * grad_pieces) {
      const int piece = lane - kStreams * kRows;
      const Row row = locate_row(p.layer, at.row0 + piece / grad_pieces);
      copy.stream = grad_h_stream(p, grad_h, row, begin, at.unit0);
      copy.stream.source += piece % grad_pieces * 16;
      copy.entry = at.in_range ? entry_step(p, row) : kNever;
      copy.target += kGradOffset + piece * 16;
    } else if (kLayerNorm && lane >= 32 - kRows) {
      const Row row = locate_row(p.layer, at.row0 + lane % kRows);
      copy.stream = rho_stream(p, row, begin);
      copy.entry = entry_step(p, row);
      copy.target += kRhoOffset + lane % kRows * 4;
    }
    coefficient_address = shared_address(&ring0[at.row * 16 + at.warp_unit * sizeof(T)]);
    grad_address = shared_address(&ring0[kGradOffset]) + (at.row * 8 + at.warp_unit) * grad_bytes;
    rho_address = shared_address(&ring0[kRhoOffset + at.row * 4]);
    grad_float = grad_h.is_float();
  }

  __device__ __forceinline__ void fetch(int k) { copy.fetch(k, count, sizeof(Step)); }

  // Step k, when all but the last kRingSteps - 2 fetches have landed.
  __device__ __forceinline__ Input load(int k) const {
    copy_async_wait<kRingSteps - 2>();
    __syncwarp();
    const uint32_t offset = k % kRingSteps * sizeof(Step);
    Input x;
#pragma unroll
    for (int i = 0; i < kStreams; i++)
      x.coefficients[i] = load_operand<T>(coefficient_address + offset + i * kStreamBytes);
    x.grad_h = load_either<T>(grad_address + offset, grad_float);
    if (kLayerNorm) x.rho = load_float(rho_address + offset);
    return x;
  }
};

// dwx of the block, which its warps exchange: each k-tile's part of the product's operand. Two
// buffers in turn.
template <class Shape>
struct BlockDwx {
  static constexpr int kBlockWarps = Shape::kBlockWarps;
  struct Buffer {
    uint16_t of_warp[kBlockWarps][kRows][4][4];  // [..][c][a a z z]
  };
  using Memory = Buffer[2];

  uint32_t store_address, load_address;

  __device__ __forceinline__ BlockDwx(const Lane<Shape>& at, const Memory& memory)
      : store_address(shared_address(&memory[0].of_warp[at.warp][at.row][at.c][at.g % 2])),
        load_address(shared_address(&memory[0].of_warp[0][at.row][at.c][0])) {}

  __device__ __forceinline__ void store(const Turn& turn, uint16_t a, uint16_t z) const {
    store_bits(store_address + turn.buffer * sizeof(Buffer), a);
    store_bits(store_address + turn.buffer * sizeof(Buffer) + 4, z);
  }
  __device__ __forceinline__ void load(const Turn& turn, uint2 (&dwx)[kBlockWarps]) const {
#pragma unroll
    for (int i = 0; i < kBlockWarps; i++)
      dwx[i] =
          load_uint2(load_address + turn.buffer * sizeof(Buffer) + i * sizeof(Buffer::of_warp[0]));
  }
};

// The partial carries: what this block's dwx contribute to the carries of all blocks.
template <class Shape>
struct PartialCarries {
  using T = typename Shape::T;
  static constexpr int kCluster = Shape::kCluster, kUnits = Shape::kUnits;
  static constexpr int kBlockWarps = Shape::kBlockWarps, kBlockParts = Shape::kBlockParts;
  static constexpr int kTargetBlocks = kCluster / kBlockWarps;  // blocks that one warp serves
  static constexpr int kTargets = kTargetBlocks * kBlockParts;  // and their parts
  static constexpr int kPieceBytes = 4 * sizeof(float);
  static constexpr int kPartBytes = 32 * kPieceBytes;  // [lane][4 units of one row]
  static constexpr int kSenderBytes = kBlockParts * kPartBytes;
  static constexpr uint32_t kTraffic = kCluster * kSenderBytes;
  using Memory = uint8_t[2][kCluster][kSenderBytes];
  using Sums = float[kTargets][2][4];

  Arrival arrival;
  uint32_t weights[kTargets][2][kBlockWarps][4];
  uint32_t target[kTargetBlocks];
  uint32_t to_barrier;
  uint32_t load_address;

  // Uc^T with gamma folded in. For target i, a part of a block, the lane's outputs are its units
  // 4g..4g+3 (two 16-row tiles, rows g and g + 8 of each); k-tile k holds the 8 candidate and 8
  // gate rows of warp k.
  __device__ __forceinline__ PartialCarries(const PersistentBackward& p, const Lane<Shape>& at,
                                            const Memory& memory, const Arrival& arrival)
      : arrival(arrival) {
    const int hidden_size = static_cast<int>(p.layer.hidden);
    const auto* ln_weight = static_cast<const float*>(p.layer.ln_weight);
    const auto load_row = [&](int output, int column, float (&u)[4]) {  // 4 columns of it
      const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const T*>(p.u) +
                                                         int64_t{output} * hidden_size + column);
      const float gamma = Shape::kLayerNorm && ln_weight != nullptr ? ln_weight[output] : 1.f;
      u[0] = OperandTraits<T>::to_float(static_cast<uint16_t>(bits.x)) * gamma;
      u[1] = OperandTraits<T>::to_float(static_cast<uint16_t>(bits.x >> 16)) * gamma;
      u[2] = OperandTraits<T>::to_float(static_cast<uint16_t>(bits.y)) * gamma;
      u[3] = OperandTraits<T>::to_float(static_cast<uint16_t>(bits.y >> 16)) * gamma;
    };
    const uint32_t own = shared_address(&memory[0][at.rank][at.lane * kPieceBytes]);
#pragma unroll
    for (int i = 0; i < kTargets; i++) {
      uint32_t to = at.warp * kTargetBlocks + ((i / kBlockParts + at.rank) & (kTargetBlocks - 1));
      // Or the addresses of all rows are kept for the next part: more than there are registers.
      if constexpr (kBlockParts > 1) pin(to);
      const int column = static_cast<int>(to) * kUnits + i % kBlockParts * kBlockUnits + 4 * at.g;
#pragma unroll
      for (int k = 0; k < kBlockWarps; k++) {
        const int row = static_cast<int>(at.rank) * kUnits + 8 * k + 2 * at.c;
#pragma unroll
        for (int gate = 0; gate < 2; gate++) {
          float even[4] = {}, odd[4] = {};
          if (row < hidden_size && column < hidden_size) {
            load_row(gate * hidden_size + row, column, even);
            load_row(gate * hidden_size + row + 1, column, odd);
          }
#pragma unroll
          for (int j = 0; j < 4; j++)
            weights[i][j / 2][k][2 * gate + j % 2] = OperandTraits<T>::pack(even[j], odd[j]);
        }
      }
      target[i / kBlockParts] = remote_address(own, to);
    }
    // From a target to the mbarrier of its block: distances within a block's shared memory are the
    // same.
    to_barrier = arrival.barrier - own;
    // Partial carry of this lane's row and unit: piece (unit / 4) * 4 + row of every sender.
    const int unit = at.warp * 8 + at.warp_unit;
    load_address = shared_address(
        &memory[0][0][(unit / 4 * 4 + at.row) * kPieceBytes + unit % 4 * sizeof(float)]);
  }

  // The products for targets from..to-1, over k-tiles k_from..k_to-1.
  __device__ __forceinline__ void multiply(Sums& sums, const uint2 (&dwx)[kBlockWarps], int from,
                                           int to, int k_from, int k_to) const {
#pragma unroll
    for (int i = 0; i < kBlockWarps; i++)
#pragma unroll
      for (int j = 0; j < kTargets; j++)
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
          if (k_from <= i && i < k_to && from <= j && j < to)
            sb_fast_sligru::multiply<T>(sums[j][tile], weights[j][tile][i], dwx[i].x, dwx[i].y);
  }
  __device__ __forceinline__ void send(const Turn& turn, const Sums& sums, int from, int to) const {
#pragma unroll
    for (int i = 0; i < kTargets; i++)
      if (from <= i && i < to)
        sb_fast_sligru::send(
            target[i / kBlockParts] + turn.buffer * kTraffic + i % kBlockParts * kPartBytes,
            target[i / kBlockParts] + to_barrier + turn.buffer * 8, __float_as_uint(sums[i][0][0]),
            __float_as_uint(sums[i][0][2]), __float_as_uint(sums[i][1][0]),
            __float_as_uint(sums[i][1][2]));
  }

  // Uc^T (gamma dwx) of the lane's row and unit.
  __device__ __forceinline__ float receive(const Turn& turn) const {
    arrival.receive(turn.buffer, turn.parity);
    return add_partial_carries<kCluster>([&](int i) {
      return load_float(load_address + turn.buffer * kTraffic + i * kSenderBytes);
    });
  }
};

// m2: terms of the lanes -> sums of the blocks -> sums over the cluster.
template <class Shape>
struct M2Sum {
  static constexpr int kCluster = Shape::kCluster, kBlockParts = Shape::kBlockParts;
  static constexpr int kTargets = kCluster / kWarps;  // blocks to which a warp sends m2
  static constexpr uint32_t kTraffic = kCluster * kRows * sizeof(float);
  using SumsMemory = float[2][kCluster][kRows];
  using TermsMemory = float[2][kBlockParts][kRows][kBlockUnits];
  static constexpr uint32_t kTermsBytes = sizeof(TermsMemory) / 2;

  Arrival arrival;
  int lane, part;
  uint32_t target, target_barrier;
  uint32_t term_store, term_load, sum_load;
  float inverse_size;

  __device__ __forceinline__ M2Sum(int hidden_size, const Lane<Shape>& at, const SumsMemory& sums,
                                   const TermsMemory& terms, const Arrival& arrival)
      : arrival(arrival), lane(at.lane) {
    part = kBlockParts == 1 ? 0 : at.warp / kWarps;
    const int part_warp = at.warp - kWarps * part;
    const uint32_t target_rank = part_warp * kTargets + (lane / kRows) % kTargets;
    target = remote_address(shared_address(&sums[0][at.rank][lane % kRows]), target_rank);
    target_barrier = remote_address(arrival.barrier, target_rank);
    term_store = shared_address(&terms[0][part][at.row][part_warp * 8 + at.warp_unit]);
    term_load = shared_address(&terms[0][0][0][0]) + lane * 16;
    sum_load = shared_address(&sums[0][at.c][at.row]);
    inverse_size = 1.f / static_cast<float>(2 * hidden_size);
  }

  __device__ __forceinline__ void store_term(const Turn& turn, float term) const {
    store_float(term_store + turn.buffer * kTermsBytes, term);
  }
  // The sum of the block's terms of row lane % kRows.
  __device__ __forceinline__ float block_sum(const Turn& turn) const {
    const auto part_sum = [&](int i) {
      const float4 terms =
          load_float4(term_load + turn.buffer * kTermsBytes + i * 32 * sizeof(float4));
      return (terms.x + terms.y) + (terms.z + terms.w);
    };
    float sum = part_sum(0);
    if constexpr (kBlockParts == 2) sum += part_sum(1);
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) sum = add_lane_xor(sum, offset);
    return __shfl_sync(0xffffffffu, sum, lane % kRows * 8);
  }
  __device__ __forceinline__ void send(const Turn& turn) const {
    const float sum = block_sum(turn);
    if (lane < kTargets * kRows)
      sb_fast_sligru::send(target + turn.buffer * kTraffic, target_barrier + turn.buffer * 8,
                           __float_as_uint(sum));
  }
  // m2 of the lane's row.
  __device__ __forceinline__ float receive(const Turn& turn) const {
    arrival.receive(turn.buffer, turn.parity);
    return add_m2<kCluster>(sum_load + turn.buffer * kTraffic, kRows * sizeof(float), inverse_size);
  }
};

template <class T, int kCluster, int kUnits, bool kLayerNorm>
__global__ void __launch_bounds__(kThreads<kUnits>, kBlockUnits * 2 / kUnits)
    backward_narrow_kernel(const __grid_constant__ PersistentBackward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  using Shape = Shape<T, kCluster, kUnits, kLayerNorm>;
  using Carries = PartialCarries<Shape>;
  constexpr int kBlockWarps = Shape::kBlockWarps, kBlockParts = Shape::kBlockParts;
  constexpr int kTargets = Carries::kTargets;

  __shared__ alignas(128) typename Carries::Memory partial;
  __shared__ alignas(16) typename BlockDwx<Shape>::Memory operand;
  __shared__ alignas(16) typename M2Sum<Shape>::SumsMemory m2_sums;
  __shared__ alignas(16) typename M2Sum<Shape>::TermsMemory m2_terms;
  __shared__ alignas(16) typename Streams<Shape>::Memory ring;
  __shared__ alignas(8) uint64_t barriers[4];

  const int hidden_size = static_cast<int>(p.layer.hidden), count = static_cast<int>(p.count);
  const Lane<Shape> at(hidden_size);
  const int begin = begin_step(p, at.row0);
  if (begin == count) return;

  const Arrival carry_arrival = {shared_address(&barriers[0]), Carries::kTraffic};
  const Arrival m2_arrival = {shared_address(&barriers[2]), M2Sum<Shape>::kTraffic};
  begin_arrivals<kThreads<kUnits>, kLayerNorm>(carry_arrival, m2_arrival, ring);

  const Carries partial_carries(p, at, partial, carry_arrival);
  const BlockDwx<Shape> block_dwx(at, operand);
  const M2Sum<Shape> m2_sum(hidden_size, at, m2_sums, m2_terms, m2_arrival);
  Streams<Shape> streams(p, at, begin, ring);
#pragma unroll
  for (int k = 0; k < kRingSteps - 1; k++) streams.fetch(begin + k);
  typename Streams<Shape>::Input next = streams.load(begin);

  const Row row = locate_row(p.layer, at.row0 + at.row);
  float* const state = p.carry + int64_t{row.index} * hidden_size + at.unit;
  float carry = at.in_range ? *state : 0.f;
  int row_step = row_step_at(p, row, begin);
  DwxOutput<uint16_t, Shape::kHidden> output(p, row, begin, at.unit, at.in_range);
  const bool stores_m2 =
      kLayerNorm && at.rank == 0 && at.warp == 0 && at.c == 0 && at.g % 2 == 0 && row.valid;
  cluster_barrier();

#pragma unroll 1
  for (int k = begin; k < count; k++) {
    const Turn turn(k);
    const auto now = next;
    const float d = now.grad_h + carry;
    const uint32_t dwx = OperandTraits<T>::pack(d * now.k_a(), d * now.k_z());
    const uint16_t dwx_a = static_cast<uint16_t>(dwx), dwx_z = static_cast<uint16_t>(dwx >> 16);
    block_dwx.store(turn, dwx_a, dwx_z);
    if constexpr (kLayerNorm) m2_sum.store_term(turn, d * now.q());
    __syncthreads();

    typename Carries::Sums sums = {};
    uint2 all_dwx[kBlockWarps];
    block_dwx.load(turn, all_dwx);
    // m2 is summed in the shadow of the product: when all of it is on its way or, where two warps
    // share a tensor core, by one of them while the other multiplies.
    if (kLayerNorm && kBlockParts > 1 && m2_sum.part > 0) m2_sum.send(turn);
    // The first half of the targets is served while the second half is multiplied.
    partial_carries.multiply(sums, all_dwx, 0, kTargets / 2, 0, kBlockWarps);
    partial_carries.multiply(sums, all_dwx, kTargets / 2, kTargets, 0, kBlockWarps / 2);
    partial_carries.send(turn, sums, 0, kTargets / 2);
    partial_carries.multiply(sums, all_dwx, kTargets / 2, kTargets, kBlockWarps / 2, kBlockWarps);
    if constexpr (kLayerNorm && kBlockParts == 1) m2_sum.send(turn);
    partial_carries.send(turn, sums, kTargets / 2, kTargets);

    output.store(dwx_a, dwx_z);
    streams.fetch(k + kRingSteps - 1);
    next = streams.load(k + 1);

    float own = times_z(d, now.complement());
    if constexpr (kLayerNorm) {
      const float m2 = m2_sum.receive(turn);
      own = add_scaled(own, -now.rho * m2, now.v());
      if (stores_m2) p.m2[row_step] = m2;
    }
    row_step--;
    carry = add_scaled(own, now.rho, partial_carries.receive(turn));
  }
  if (output.stored) *state = carry;
  cluster_barrier();
#endif
}

template <class T, int kCluster, int kUnits>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  const auto kernel = p.layer.layer_norm ? backward_narrow_kernel<T, kCluster, kUnits, true>
                                         : backward_narrow_kernel<T, kCluster, kUnits, false>;
  const ClusterKernel<PersistentBackward> in_clusters = {kernel, kCluster, kThreads<kUnits>};
  return in_clusters.run(p.choice.groups(p.layer.rows()), p, stream);
}

template <class T>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
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

cudaError_t run_backward_narrow(const PersistentBackward& p, cudaStream_t stream) {
  return p.layer.operand_type == DType::kBFloat16 ? launch<__nv_bfloat16>(p, stream)
                                                  : launch<__half>(p, stream);
}

}  // namespace sb_fast_sligru
