// The backward recurrence of backward_narrow.cu with float32 operands, for H <= 512: the same
// reduce-scatter, buffers and order of messages; the products are those of split_float.cuh.
//
// Block k of a cluster owns the 64 rows 32k..32k+31 (candidate and gate) of Uc and of dwx. Each of
// its first 4 warps computes dwx of 8 units, one (unit, row) a lane; all 8 multiply, each for the
// units of its own target blocks. Gradients have any range, so each of the first warps scales its
// 16 rows of dwx, every row of the batch by its own power of two: the partial products of different
// warps' dwx are therefore added up outside the tensor core, each with its own factor.
//
// One step:
//   d = grad_h + carry -> dwx, scaled and split, to the block's warps; terms of m2
//   -> products, of dwx and the block's rows of Uc, added up while the next ones run -> send a
//   block its partial carries while the next block's are multiplied; meanwhile: sum of m2's terms
//   over the block -> send to all blocks
//   -> store dwx, fetch the inputs of a later step, load the next one's
//   -> wait for m2, sum over blocks -> wait for the partial carries, sum over blocks -> carry
#include "light_gru/persistent/backward_stages.cuh"
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/narrow_float.cuh"

namespace sb_fast_sligru {
namespace {

#if SB_FAST_SLIGRU_HAS_CLUSTERS
// 32 units of a row, and 32 bytes that keep the four rows in different banks.
constexpr int kRowBytes = kBlockUnits * 4 + 32;

constexpr int kM2Steps = 4;  // of a block's sum of m2's terms

// Who this thread is, and the unit and row of which its lane computes d and dwx, if its warp does.
struct Lane {
  int warp, lane, g, c;
  uint32_t rank;                // of the block in the cluster
  int rows, row0;               // of the cluster
  int block_unit0;              // first unit of the block
  int row, block_unit, unit;    // of the lane: in the cluster; in the block; of all
  bool owns, in_range, in_use;  // its warp has units; they exist; the cluster has the row

  __device__ __forceinline__ Lane(const PersistentBackward& p, int cluster) {
    // The shuffle shows the compiler that a warp's number is the same in all its lanes.
    warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    rank = cluster_rank();
    rows = cluster_rows(p.layer, cluster);
    row0 = static_cast<int>(blockIdx.x / cluster) * rows;
    block_unit0 = static_cast<int>(rank) * kBlockUnits;
    row = g / 2, block_unit = warp % kWarps * 8 + 2 * c + g % 2;
    unit = block_unit0 + block_unit;
    owns = warp < kWarps;
    in_range = unit < static_cast<int>(p.layer.hidden);  // the same for the whole warp
    in_use = row < rows;
  }
};

// The coefficients, grad_h and rho of every step, through a ring in shared memory. Every thread of
// the block copies at most one piece. Threads in order: coefficients (16 bytes each, 8 threads a
// row), grad_h (the same), rho (4 bytes).
template <int kCluster, bool kLayerNorm>
struct Streams {
  static constexpr int kHidden = kCluster * kBlockUnits;
  static constexpr int kStreams = kCoefficientStreams<kLayerNorm>;
  static constexpr int kStreamBytes = kRows * kRowBytes;
  static constexpr int kGradOffset = kStreams * kStreamBytes;
  static constexpr int kRhoOffset = kGradOffset + kStreamBytes;
  static constexpr int kRingBytes = kRhoOffset + kRows * 4;  // one step
  static_assert(kRingBytes % 16 == 0);
  static constexpr int kRowPieces = kBlockUnits / 4, kStreamPieces = kRows * kRowPieces;
  static constexpr int kRhoPiece = (kStreams + 1) * kStreamPieces;
  static_assert(kRhoPiece + kRows <= kFloatThreads);
  using Memory = uint8_t[kRingSteps][kRingBytes];
  using Input = StepInput<float, kLayerNorm>;

  int count;
  PieceCopy<kLayerNorm> copy;
  uint32_t stream_address, rho_address;

  __device__ __forceinline__ Streams(const PersistentBackward& p, const Lane& at, int begin,
                                     const Memory& ring)
      : count(static_cast<int>(p.count)) {
    const int piece = threadIdx.x;
    copy.target = shared_address(&ring[0][0]);
    if (piece < kRhoPiece) {
      const int stream = piece / kStreamPieces, piece_row = piece / kRowPieces % kRows;
      const int piece_unit = at.block_unit0 + piece % kRowPieces * 4;
      const Row row = locate_row(p.layer, at.row0 + piece_row);
      copy.target += stream * kStreamBytes + piece_row * kRowBytes + piece % kRowPieces * 16;
      copy.entry = entry_step(p, row);
      if (stream < kStreams) {
        copy.stream =
            coefficient_stream<float, kStreams, kHidden>(p, row, begin, stream, piece_unit);
      } else {
        copy.stream = grad_h_stream(p, grad_h_sequence(p), row, begin, piece_unit);
        if (piece_unit >= static_cast<int>(p.layer.hidden)) copy.entry = kNever;
      }
    } else if (kLayerNorm && piece < kRhoPiece + kRows) {
      const Row row = locate_row(p.layer, at.row0 + piece - kRhoPiece);
      copy.stream = rho_stream(p, row, begin);
      copy.entry = entry_step(p, row);
      copy.target += kRhoOffset + (piece - kRhoPiece) * 4;
    }
    stream_address = shared_address(&ring[0][at.row * kRowBytes + at.block_unit * 4]);
    rho_address = shared_address(&ring[0][kRhoOffset + at.row * 4]);
  }

  __device__ __forceinline__ void fetch(int k) { copy.fetch(k, count, kRingBytes); }

  // Before the __syncthreads of step k every thread has seen its own copies for step k + 1 land.
  __device__ __forceinline__ void wait() const { copy_async_wait<kRingSteps - 3>(); }
  __device__ __forceinline__ Input load(int k) const {
    const uint32_t offset = k % kRingSteps * kRingBytes;
    Input x;
#pragma unroll
    for (int i = 0; i < kStreams; i++)
      x.coefficients[i] = load_float(stream_address + offset + i * kStreamBytes);
    x.grad_h = load_float(stream_address + offset + kGradOffset);
    if (kLayerNorm) x.rho = load_float(rho_address + offset);
    return x;
  }
};

// dwx of the block, which its warps exchange: each k-tile's part of the product's operand, scaled
// and split, and what undoes the scale. Two buffers in turn.
struct BlockDwx {
  struct Buffer {
    uint16_t of_warp[kWarps][2 * kRows][4][4];  // [..][row, high or low][c][a a z z]
  };
  using Memory = Buffer[2];
  using ScaleMemory = float[2][kRows][kWarps];
  static constexpr uint32_t kLowBytes = sizeof(Buffer::of_warp[0][0]);
  static constexpr uint32_t kScaleBytes = sizeof(ScaleMemory) / 2;

  uint32_t store_address, load_address, scale_store, scale_load;
  bool in_use, stores_scale;
  float scale = 0.f;  // of this warp's dwx of the lane's row

  __device__ __forceinline__ BlockDwx(const Lane& at, const Memory& memory,
                                      const ScaleMemory& inverse_scale)
      : in_use(at.in_use), stores_scale(at.c == 0 && at.g % 2 == 0) {
    store_address =
        shared_address(&memory[0].of_warp[at.warp % kWarps][2 * at.row][at.c][at.g % 2]);
    load_address = shared_address(&memory[0].of_warp[0][at.g][at.c][0]);
    scale_store = shared_address(&inverse_scale[0][at.row][at.warp % kWarps]);
    scale_load = shared_address(&inverse_scale[0][at.c][0]);
  }

  // The scale of the step before will mostly do: nothing too large for float16, and in every row
  // something large enough for the low part to have all its bits.
  __device__ __forceinline__ void adjust_scale(float dwx_a, float dwx_z) {
    float magnitude = fmaxf(fabsf(dwx_a), fabsf(dwx_z));
    const float scaled = magnitude * scale;
    const bool large = __any_sync(0xffffffffu, !(scaled < 32768.f));
    const uint32_t fair = __ballot_sync(0xffffffffu, !in_use || scaled >= 1.f / 256.f);
    if (large || has_zero_byte(fair)) {
#pragma unroll
      for (int offset = 1; offset < 8; offset *= 2) magnitude = max_lane_xor(magnitude, offset);
      scale = scale_for(magnitude * 256.f);
    }
  }
  __device__ __forceinline__ void store(const Turn& turn, float dwx_a, float dwx_z) const {
    const SplitPair parts = split(dwx_a * scale, dwx_z * scale);
    const uint32_t to = store_address + turn.buffer * sizeof(Buffer);
    store_bits(to, static_cast<uint16_t>(parts.high));
    store_bits(to + 4, static_cast<uint16_t>(parts.high >> 16));
    store_bits(to + kLowBytes, static_cast<uint16_t>(parts.low));
    store_bits(to + kLowBytes + 4, static_cast<uint16_t>(parts.low >> 16));
    if (stores_scale) store_float(scale_store + turn.buffer * kScaleBytes, inverse_of(scale));
  }
  __device__ __forceinline__ void load(const Turn& turn, uint2 (&dwx)[kWarps]) const {
#pragma unroll
    for (int i = 0; i < kWarps; i++)
      dwx[i] =
          load_uint2(load_address + turn.buffer * sizeof(Buffer) + i * sizeof(Buffer::of_warp[0]));
  }
  // Of the row of the lane's sums, each warp's.
  __device__ __forceinline__ float4 load_inverse_scales(const Turn& turn) const {
    return load_float4(scale_load + turn.buffer * kScaleBytes);
  }
};

// The partial carries: what this block's dwx contribute to the carries of all blocks. A warp's
// products come in kRounds rounds of kInFlight each: while those of a round are computed, those of
// the round before are added up.
template <int kCluster, bool kLayerNorm>
struct PartialCarries {
  // Blocks that one warp serves; for the smallest cluster half of the warps do.
  static constexpr int kTargets = kCluster < kFloatWarps ? 1 : kCluster / kFloatWarps;
  static constexpr int kTiles =
      4;  // of 8 units of a target: the lane's outputs are its units 4g..4g+3
  static constexpr int kInFlight = 2;
  static constexpr int kGroups = kTiles / kInFlight;
  static constexpr int kTargetRounds = kWarps * kGroups, kRounds = kTargets * kTargetRounds;
  static constexpr int kPieceBytes = kTiles * sizeof(float);
  static constexpr int kSenderRowBytes = kBlockUnits * sizeof(float);
  static constexpr int kSenderBytes = kRows * kSenderRowBytes;  // [row][8 pieces of 4 units]
  static constexpr uint32_t kBufferBytes = kCluster * kSenderBytes;
  using Memory = uint8_t[2][kCluster][kSenderBytes];
  using Products = float[2][kInFlight][4];  // of a round, of the next
  using Sums = float[kTargets][kTiles];

  static __device__ __forceinline__ uint32_t traffic(int rows) {
    return kBufferBytes / kRows * rows;
  }

  Arrival arrival;
  uint32_t weights[kTargets][kTiles][kWarps][4];
  uint32_t target[kTargets];
  uint32_t to_barrier;
  uint32_t load_address;
  float weight_factor;
  bool serves, sends;

  // Piece g of a row lies where the four rows of a reading warp do not meet in a bank.
  static __device__ __forceinline__ int piece_offset(int row, int piece) {
    return row * kSenderRowBytes + (piece ^ (2 * row)) * kPieceBytes;
  }

  // Uc^T with gamma folded in: first the floats, then, in their place, their high and low parts.
  // For target block i the lane's row of tile m is unit 4g + m; k-tile k holds the 8 candidate and
  // 8 gate rows of warp k.
  __device__ __forceinline__ PartialCarries(const PersistentBackward& p, const Lane& at,
                                            const Memory& memory, const Arrival& arrival)
      : arrival(arrival), serves(at.warp * kTargets < kCluster), sends(at.c < at.rows) {
    const uint32_t own_piece = shared_address(&memory[0][at.rank][piece_offset(at.c, at.g)]);
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kTargets; i++) {
      const uint32_t to = (at.warp * kTargets + ((i + at.rank) & (kTargets - 1))) % kCluster;
      load_weights(p, at, i, static_cast<int>(to) * kBlockUnits + 4 * at.g, largest);
      target[i] = remote_address(own_piece, to);
    }
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) largest = max_lane_xor(largest, offset);
    const float weight_scale = scale_for(largest);
    weight_factor = inverse_of(weight_scale);
    split_weights(weight_scale);
    // From a target to the mbarrier of its block: distances within a block's shared memory are the
    // same.
    to_barrier = arrival.barrier - own_piece;
    load_address = shared_address(
        &memory[0][0][piece_offset(at.row, at.block_unit / 4) + at.block_unit % 4 * sizeof(float)]);
  }
  __device__ __forceinline__ void load_weights(const PersistentBackward& p, const Lane& at, int i,
                                               int column, float& largest) {
    const int hidden_size = static_cast<int>(p.layer.hidden);
    const auto* ln_weight = static_cast<const float*>(p.layer.ln_weight);
#pragma unroll
    for (int k = 0; k < kWarps; k++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {  // candidate rows 2c and 2c + 1, gate rows 2c and 2c + 1
        const int row = at.block_unit0 + 8 * k + 2 * at.c + j % 2;
        const int output = j / 2 * hidden_size + row;
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
        float gamma = 1.f;
        if (row < hidden_size && column < hidden_size) {
          x = *reinterpret_cast<const float4*>(static_cast<const float*>(p.u) +
                                               int64_t{output} * hidden_size + column);
          if (kLayerNorm && ln_weight != nullptr) gamma = ln_weight[output];
        }
        const float values[kTiles] = {x.x * gamma, x.y * gamma, x.z * gamma, x.w * gamma};
#pragma unroll
        for (int m = 0; m < kTiles; m++) {
          weights[i][m][k][j] = __float_as_uint(values[m]);
          largest = fmaxf(largest, fabsf(values[m]));
        }
      }
    }
  }
  __device__ __forceinline__ void split_weights(float scale) {
#pragma unroll
    for (int i = 0; i < kTargets; i++)
#pragma unroll
      for (int m = 0; m < kTiles; m++)
#pragma unroll
        for (int k = 0; k < kWarps; k++) {
          uint32_t (&w)[4] = weights[i][m][k];
          const SplitPair candidate =
              split(__uint_as_float(w[0]) * scale, __uint_as_float(w[1]) * scale);
          const SplitPair gate =
              split(__uint_as_float(w[2]) * scale, __uint_as_float(w[3]) * scale);
          w[0] = candidate.high, w[1] = candidate.low, w[2] = gate.high, w[3] = gate.low;
        }
  }

  // The products of round n.
  __device__ __forceinline__ void multiply(Products& products, int n,
                                           const uint2 (&dwx)[kWarps]) const {
    const int i = n / kTargetRounds, tile = n / kGroups % kWarps;
#pragma unroll
    for (int m = 0; m < kInFlight; m++)
      multiply_new(products[n % 2][m], weights[i][n % kGroups * kInFlight + m][tile], dwx[tile].x,
                   dwx[tile].y);
  }
  static __device__ __forceinline__ void add(Sums& sums, const Products& products, int n,
                                             const float (&factor)[kWarps]) {
    const int i = n / kTargetRounds, tile = n / kGroups % kWarps;
#pragma unroll
    for (int m = 0; m < kInFlight; m++) {
      const float (&product)[4] = products[n % 2][m];
      const float value = fmaf(product[1] + product[2], 1.f / kLowScale, product[0]);
      float& sum = sums[i][n % kGroups * kInFlight + m];
      sum = tile == 0 ? value * factor[0] : fmaf(value, factor[tile], sum);
    }
  }
  __device__ __forceinline__ void send(const Turn& turn, int i, const float (&sums)[kTiles]) const {
    if (sends)
      sb_fast_sligru::send(target[i] + turn.buffer * kBufferBytes,
                           target[i] + to_barrier + turn.buffer * 8, __float_as_uint(sums[0]),
                           __float_as_uint(sums[1]), __float_as_uint(sums[2]),
                           __float_as_uint(sums[3]));
  }

  // Uc^T (gamma dwx) of the lane's row and unit.
  __device__ __forceinline__ float receive(const Turn& turn) const {
    arrival.receive(turn.buffer, turn.parity);
    return add_partial_carries<kCluster>([&](int i) {
      return load_float(load_address + turn.buffer * kBufferBytes + i * kSenderBytes);
    });
  }
};

// m2: terms of the lanes -> sums of the blocks -> sums over the cluster. The block's sum takes
// kM2Steps rounds of products, a step a round, and is then sent.
template <int kCluster, bool kLayerNorm>
struct M2Sum {
  static constexpr int kTargets = PartialCarries<kCluster, kLayerNorm>::kTargets;
  static constexpr uint32_t kBufferBytes = kCluster * kRows * sizeof(float);
  using SumsMemory = float[2][kCluster][kRows];
  using TermsMemory = uint8_t[2][kRows][kRowBytes];

  static __device__ __forceinline__ uint32_t traffic(int rows) {
    return kBufferBytes / kRows * rows;
  }

  Arrival arrival;
  int lane;
  bool sends;
  uint32_t target, target_barrier;
  uint32_t term_store, term_load, sum_load;
  float inverse_size;

  __device__ __forceinline__ M2Sum(int hidden_size, const Lane& at, const SumsMemory& sums,
                                   const TermsMemory& terms, const Arrival& arrival)
      : arrival(arrival), lane(at.lane) {
    const uint32_t target_rank = (at.warp * kTargets + (lane / kRows) % kTargets) % kCluster;
    sends = lane < kTargets * kRows && lane % kRows < at.rows;
    target = remote_address(shared_address(&sums[0][at.rank][lane % kRows]), target_rank);
    target_barrier = remote_address(arrival.barrier, target_rank);
    term_store = shared_address(&terms[0][at.row][at.block_unit * 4]);
    term_load = shared_address(&terms[0][lane / 8][lane % 8 * 16]);
    sum_load = shared_address(&sums[0][at.c][at.row]);
    inverse_size = 1.f / static_cast<float>(2 * hidden_size);
  }

  __device__ __forceinline__ void store_term(const Turn& turn, float term) const {
    store_float(term_store + turn.buffer * sizeof(TermsMemory) / 2, term);
  }
  // Step 0..kM2Steps of the block's sum and its sending; other steps: nothing.
  __device__ __forceinline__ void send_in_steps(const Turn& turn, int step, float& sum) const {
    if (step == 0) {
      const float4 terms = load_float4(term_load + turn.buffer * sizeof(TermsMemory) / 2);
      sum = (terms.x + terms.y) + (terms.z + terms.w);
    } else if (0 < step && step < kM2Steps) {
      sum = add_lane_xor(sum, 1 << (step - 1));
    } else if (step == kM2Steps) {
      sum = __shfl_sync(0xffffffffu, sum, lane % kRows * 8);
      if (sends)
        send(target + turn.buffer * kBufferBytes, target_barrier + turn.buffer * 8,
             __float_as_uint(sum));
    }
  }
  // m2 of the lane's row.
  __device__ __forceinline__ float receive(const Turn& turn) const {
    arrival.receive(turn.buffer, turn.parity);
    return add_m2<kCluster>(sum_load + turn.buffer * kBufferBytes, kRows * sizeof(float),
                            inverse_size);
  }
};

#endif  // SB_FAST_SLIGRU_HAS_CLUSTERS

template <int kCluster, bool kLayerNorm>
__global__ void __launch_bounds__(kFloatThreads, 1)
    backward_narrow_float_kernel(const __grid_constant__ PersistentBackward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  using Inputs = Streams<kCluster, kLayerNorm>;
  using Carries = PartialCarries<kCluster, kLayerNorm>;
  using M2 = M2Sum<kCluster, kLayerNorm>;
  constexpr int kHidden = kCluster * kBlockUnits;  // padded

  __shared__ alignas(128) typename Carries::Memory partial;
  __shared__ alignas(16) typename BlockDwx::Memory operand;
  __shared__ alignas(16) typename BlockDwx::ScaleMemory inverse_scale;
  __shared__ alignas(16) typename M2::SumsMemory m2_sums;
  __shared__ alignas(16) typename M2::TermsMemory m2_terms;
  __shared__ alignas(16) typename Inputs::Memory ring;
  __shared__ alignas(8) uint64_t barriers[4];

  const int hidden_size = static_cast<int>(p.layer.hidden), count = static_cast<int>(p.count);
  const Lane at(p, kCluster);
  const int begin = begin_step(p, at.row0);
  if (begin == count) return;
  const Arrival carry_arrival = {shared_address(&barriers[0]), Carries::traffic(at.rows)};
  const Arrival m2_arrival = {shared_address(&barriers[2]), M2::traffic(at.rows)};
  begin_arrivals<kFloatThreads, kLayerNorm>(carry_arrival, m2_arrival, ring);

  Carries partial_carries(p, at, partial, carry_arrival);
  const M2 m2_sum(hidden_size, at, m2_sums, m2_terms, m2_arrival);
  Inputs streams(p, at, begin, ring);
#pragma unroll
  for (int k = 0; k < kRingSteps - 1; k++) streams.fetch(begin + k);
  streams.wait();
  __syncthreads();
  auto next = streams.load(begin);

  const Row row = locate_row(p.layer, at.row0 + at.row);
  DwxOutput<float, kHidden> output(p, row, begin, at.unit, at.owns && at.in_use && at.in_range);

  float carry = at.in_range ? p.carry[int64_t{row.index} * hidden_size + at.unit] : 0.f;
  const int row_last = row_step_at(p, row, 0);
  const bool stores_m2 = kLayerNorm && at.rank == 0 && at.warp == 0 && at.c == 0 && at.g % 2 == 0 &&
                         row.valid && at.in_use;
  BlockDwx block_dwx(at, operand, inverse_scale);
  pin(partial_carries.weight_factor);
  cluster_barrier();

#pragma unroll 1
  for (int k = begin; k < count; k++) {
    const Turn turn(k);
    const auto now = next;
    float d = 0.f, dwx_a = 0.f, dwx_z = 0.f;
    if (at.owns) {
      d = at.in_use ? now.grad_h + carry : 0.f;
      dwx_a = d * now.k_a(), dwx_z = d * now.k_z();
      block_dwx.adjust_scale(dwx_a, dwx_z);
      block_dwx.store(turn, dwx_a, dwx_z);
      if constexpr (kLayerNorm) m2_sum.store_term(turn, d * now.q());
    }
    __syncthreads();

    if (partial_carries.serves) {
      constexpr int kRounds = Carries::kRounds, kTargetRounds = Carries::kTargetRounds;
      uint2 all_dwx[kWarps];
      block_dwx.load(turn, all_dwx);
      const float4 inverse = block_dwx.load_inverse_scales(turn);
      const float weight_factor = partial_carries.weight_factor;
      const float factor[kWarps] = {inverse.x * weight_factor, inverse.y * weight_factor,
                                    inverse.z * weight_factor, inverse.w * weight_factor};
      typename Carries::Sums sums;
      typename Carries::Products products;
      float m2_of_block = 0.f;
#pragma unroll
      for (int n = 0; n <= kRounds; n++) {
        if (n < kRounds) partial_carries.multiply(products, n, all_dwx);
        if constexpr (kLayerNorm) {
          static_assert(kRounds / 2 + kM2Steps <= kRounds);
          m2_sum.send_in_steps(turn, n - kRounds / 2, m2_of_block);
        }
        if (n > 0) Carries::add(sums, products, n - 1, factor);
        // A block is served when the first products for the next one are under way.
        if (n == kRounds || (n > kTargetRounds && n % kTargetRounds == 1)) {
          const int i = (n - 1) / kTargetRounds - (n == kRounds ? 0 : 1);
          partial_carries.send(turn, i, sums[i]);
        }
      }
    }
    output.store(dwx_a, dwx_z);
    streams.fetch(k + kRingSteps - 1);
    streams.wait();
    if (at.owns) {
      next = streams.load(k + 1);
      float own = times_z(d, now.complement());
      if constexpr (kLayerNorm) {
        const float m2 = m2_sum.receive(turn);
        own = add_scaled(own, -now.rho * m2, now.v());
        if (stores_m2) p.m2[row_last - k] = m2;
      }
      carry = add_scaled(own, now.rho, partial_carries.receive(turn));
    }
  }
  if (output.stored) p.carry[int64_t{row.index} * hidden_size + at.unit] = carry;
  cluster_barrier();
#endif
}

template <int kCluster>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  const auto kernel = p.layer.layer_norm ? backward_narrow_float_kernel<kCluster, true>
                                         : backward_narrow_float_kernel<kCluster, false>;
  const ClusterKernel<PersistentBackward> in_clusters = {kernel, kCluster, kFloatThreads};
  return in_clusters.run(p.choice.groups(p.layer.rows()), p, stream);
}

}  // namespace

cudaError_t run_backward_narrow_float(const PersistentBackward& p, cudaStream_t stream) {
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
