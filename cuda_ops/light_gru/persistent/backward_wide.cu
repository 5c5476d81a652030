// The backward recurrence of backward_narrow.cu for 512 < H <= 1024: same equations, same exchange.
//
// A block owns 128 rows of Uc and dwx. Warp w serves blocks 2w and 2w + 1, in four items of 32
// units each; an item is sent while the next one is multiplied. The partial carries travel in the
// operand type: as float their 32 KB into every block would be most of a step (measured 1.89 us
// against 1.26 at 48 rows, H200, November 2026); summed, they are float as everywhere.
//
// One step:
//   d = grad_h + carry -> dwx, to the block's warps; terms of m2
//   -> product, of dwx and the block's rows of Uc, item by item -> send each item's partial carries
//   -> sum of m2's terms over the block -> send to all blocks
//   -> store dwx, fetch the inputs of a later step, load the next one's
//   -> wait for m2, sum over blocks -> wait for the partial carries, sum over blocks -> carry
#include "light_gru/persistent/backward_stages.cuh"
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/wide.cuh"

namespace sb_fast_sligru {
namespace {

constexpr int kSharedFragments = 28;
constexpr int kEarlyFragments = 6;  // read before the wait for the carries
constexpr int kItems = 4;
constexpr int kItemFragments = kWideFragments / kItems;  // [k-tile][tile]
constexpr int kPieceBytes = 8;                           // 4 units of one row
constexpr int kSenderBytes = 4 * 32 * kPieceBytes;       // [half][row parity][lane]
constexpr uint32_t kCarryTraffic = kWideCluster * kSenderBytes;
constexpr uint32_t kM2Traffic = kWideCluster * kWideRows * sizeof(float);
constexpr int kOperandStride =
    kWideRows * 32 + 32;                    // bytes of a warp's dwx, against bank conflicts
constexpr int kLineBytes = kWideUnits * 2;  // one row of one 16-bit stream
constexpr int kHalfItem = kItemFragments / 2;
constexpr int kScratchBytes = kHalfItem * kFragmentBytes;  // half an item of U

using Split = FragmentSplit<kSharedFragments>;

template <bool kLayerNorm>
struct Shared {
  static constexpr int kGradOffset = kCoefficientStreams<kLayerNorm> * kWideRows * kLineBytes;
  static constexpr int kRhoOffset = kGradOffset + kWideRows * kWideUnits * 4;
  alignas(1024) uint8_t partial[2][kWideCluster][kSenderBytes];
  uint8_t fragments[kSharedFragments][kWideWarps][kFragmentBytes];
  uint8_t operand[2][kWideWarps][kOperandStride];        // dwx: [warp][row][c][a a z z]
  uint8_t ring[kRingSteps][kRhoOffset + kWideRows * 4];  // see Streams
  float m2_sums[2][kWideCluster][kWideRows];
  float m2_terms[2][kWideWarps][32];  // [warp][lane]
  uint64_t barriers[4];
  alignas(16) uint8_t scratch[kWideWarps][kScratchBytes];  // of the prologue
};

#if SB_FAST_SLIGRU_HAS_CLUSTERS
// The part of Uc^T that a warp multiplies, with gamma folded in. Item i: half i % 2 of the units of
// block first_target ^ (i / 2); the lane's outputs are units 4g..4g+3 of that half (two 16-row
// tiles, rows g and g + 8 of each); k-tile k holds the 8 candidate and 8 gate rows of warp k.
template <class T>
struct Weights {
  uint32_t kept[Split::kInRegisters][4];
  uint4 staged[kSharedFragments];
  uint32_t fragment_address;

  // Half an item at a time goes through `partial` or, in turn, `scratch`: from global memory in
  // whole lines, while the half before it is read transposed.
  static constexpr int kHalfTiles = kHalfItem / 2,
                       kHalfRows = 8 * kHalfTiles;  // k-tiles; rows of a gate
  static constexpr int kRowBytes = 32 * sizeof(T);
  static_assert(2 * kHalfRows * kRowBytes == kScratchBytes);

  template <bool kLayerNorm>
  static __device__ __forceinline__ uint32_t scratch_address(const Shared<kLayerNorm>& shared,
                                                             const WideLane& at, int half) {
    static_assert(sizeof(shared.partial) == sizeof(shared.scratch));
    return shared_address(half % 2 ? &shared.scratch[0][0] : &shared.partial[0][0][0]) +
           at.warp * kScratchBytes;
  }
  static __device__ __forceinline__ void fetch(const PersistentBackward& p, const WideLane& at,
                                               uint32_t first_target, int half, uint32_t scratch) {
    const int hidden_size = static_cast<int>(p.layer.hidden);
    const int item = half / 2, half_row0 = half % 2 * kHalfRows;
    const int column0 = static_cast<int>(first_target ^ (item / 2)) * kWideUnits + item % 2 * 32;
    if (half < 2 * kItems) {
#pragma unroll 1
      for (int i = 0; i < kScratchBytes / kFragmentBytes; i++) {
        const int piece = i * 32 + at.lane, line = piece / 4, column = column0 + piece % 4 * 8;
        const int row = at.block_unit0 + half_row0 + line % kHalfRows;
        const bool valid = row < hidden_size && column < hidden_size;
        const int output = line / kHalfRows * hidden_size + row;
        copy_async_16_or_zeros(
            scratch + piece * 16,
            static_cast<const T*>(p.u) + (valid ? int64_t{output} * hidden_size + column : 0),
            valid);
      }
    }
    copy_async_commit();
  }
  // The fragments of k-tile k of the half in `scratch`: [tile]. gamma: of the half's first row.
  static __device__ __forceinline__ void read(const WideLane& at, uint32_t scratch,
                                              const float* gamma, int k, uint32_t (&a)[2][4]) {
#pragma unroll
    for (int gate = 0; gate < 2; gate++) {
      const int row = 8 * k + 2 * at.c;
      const uint32_t from = scratch + (gate * kHalfRows + row) * kRowBytes + at.g * 8;
      const float2 factor = load_float2(shared_address(&gamma[gate * kWideUnits + row]));
      const uint2 even = load_uint2(from), odd = load_uint2(from + kRowBytes);
#pragma unroll
      for (int tile = 0; tile < 2; tile++) {
        const float2 low = unpack_pair<T>(tile == 0 ? even.x : even.y);
        const float2 high = unpack_pair<T>(tile == 0 ? odd.x : odd.y);
        a[tile][2 * gate] = OperandTraits<T>::pack(low.x * factor.x, high.x * factor.y);
        a[tile][2 * gate + 1] = OperandTraits<T>::pack(low.y * factor.x, high.y * factor.y);
      }
    }
  }
  template <bool kLayerNorm>
  __device__ __forceinline__ Weights(const PersistentBackward& p, const WideLane& at,
                                     uint32_t first_target, Shared<kLayerNorm>& shared)
      : fragment_address(shared_address(&shared.fragments[0][at.warp][at.lane * 16])) {
    const auto* ln_weight = static_cast<const float*>(p.layer.ln_weight);
    const int hidden_size = static_cast<int>(p.layer.hidden);
    fetch(p, at, first_target, 0, scratch_address(shared, at, 0));
    // gamma of the block's rows, in `operand` for now: [gate][row].
    auto* gamma = reinterpret_cast<float*>(&shared.operand[0][0][0]);
    for (int i = threadIdx.x; i < 2 * kWideUnits; i += kWideThreads) {
      const int row = at.block_unit0 + i % kWideUnits;
      gamma[i] = kLayerNorm && ln_weight != nullptr && row < hidden_size
                     ? ln_weight[i / kWideUnits * hidden_size + row]
                     : 1.f;
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2 * kItems; half++) {
      __syncwarp();  // the half before this one is read
      fetch(p, at, first_target, half + 1, scratch_address(shared, at, half + 1));
      copy_async_wait<1>();
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kHalfTiles; k++) {
        uint32_t a[2][4];
        read(at, scratch_address(shared, at, half), gamma + half % 2 * kHalfRows, k, a);
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
          const int f = half * kHalfItem + 2 * k + tile;
          const uint4 x = make_uint4(a[tile][0], a[tile][1], a[tile][2], a[tile][3]);
          if (Split::is_shared(f)) {
            store_uint4(fragment_address + Split::shared_before(f) * sizeof(shared.fragments[0]),
                        x);
          } else {
            uint32_t (&to)[4] = kept[Split::register_index(f)];
            to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
          }
        }
      }
    }
    __syncthreads();  // the last use of gamma
  }

  // Reads fragments from..to-1 of those in shared memory.
  __device__ __forceinline__ void stage(int from, int to) {
#pragma unroll
    for (int i = 0; i < kSharedFragments; i++)
      if (from <= i && i < to)
        staged[i] = load_uint4(fragment_address + i * kWideWarps * kFragmentBytes);
  }
  __device__ __forceinline__ void stage_early() { stage(0, kEarlyFragments); }
  // The rest of those that half an item needs.
  __device__ __forceinline__ void stage_half(int half) {
    const int from = Split::shared_before(half * kHalfItem);
    stage(from > kEarlyFragments ? from : kEarlyFragments,
          Split::shared_before((half + 1) * kHalfItem));
  }

  // sums += half an item times dwx; [tile].
  __device__ __forceinline__ void multiply_half(float (&sums)[2][4], int half,
                                                const uint2 (&dwx)[kWideWarps]) const {
#pragma unroll
    for (int i = 0; i < kHalfItem; i++) {
      const int f = half * kHalfItem + i;
      const uint2 b = dwx[f % kItemFragments / 2];
      if (Split::is_shared(f)) {
        const uint4 x = staged[Split::shared_before(f)];
        const uint32_t a[4] = {x.x, x.y, x.z, x.w};
        multiply<T>(sums[i % 2], a, b.x, b.y);
      } else {
        multiply<T>(sums[i % 2], kept[Split::register_index(f)], b.x, b.y);
      }
    }
  }
};

// The coefficients, grad_h and rho of every step, through a ring in shared memory. Every thread
// copies at most two pieces of 16 bytes, 8 neighbouring threads a line of 128. Pieces in order:
// coefficients, grad_h; the last 8 threads copy rho (4 bytes). In the ring the sections of 8 units
// of a row are permuted by row against bank conflicts.
template <class T, bool kLayerNorm>
struct Streams {
  static constexpr int kStreams = kCoefficientStreams<kLayerNorm>;
  static constexpr int kGradOffset = Shared<kLayerNorm>::kGradOffset;
  static constexpr int kRhoOffset = Shared<kLayerNorm>::kRhoOffset;
  static constexpr uint32_t kRingBytes = sizeof(Shared<kLayerNorm>::ring) / kRingSteps;
  static constexpr int kCoefficientPieces = kStreams * kWideRows * kWideWarps;
  using Input = StepInput<float2, kLayerNorm>;

  int count;
  Stream stream[2];
  uint32_t copy_target[2];
  int entry[2], rho_entry;  // the step from which on there is a piece
  uint32_t coefficient_address, grad_address, rho_address;
  bool grad_float;

  __device__ __forceinline__ Streams(const PersistentBackward& p, const WideLane& at, int begin,
                                     const Shared<kLayerNorm>& shared)
      : count(static_cast<int>(p.count)), rho_entry(kNever) {
    const int hidden_size = static_cast<int>(p.layer.hidden);
    const Sequence grad_h = grad_h_sequence(p);
    const int grad_bytes = grad_h.bytes(), grad_pieces = grad_bytes / 2;  // pieces of 8 units
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int piece = static_cast<int>(threadIdx.x) + i * kWideThreads;
      entry[i] = kNever;
      copy_target[i] = shared_address(&shared.ring[0][0]);
      if (piece < kCoefficientPieces) {
        const int section = piece % kWideWarps, line = piece / kWideWarps;
        const int local_row = line % kWideRows;
        stream[i] = coefficient_stream<T, kStreams, kWideHidden>(
            p, locate_row(p.layer, at.row0 + local_row), begin, line / kWideRows,
            at.block_unit0 + section * 8);
        entry[i] = 0;
        copy_target[i] += line * kLineBytes + (section ^ local_row) * 16;
      } else if (piece < kCoefficientPieces + kWideRows * kWideWarps * grad_pieces) {
        const int j = piece - kCoefficientPieces, sub = j % grad_pieces;
        const int section = j / grad_pieces % kWideWarps, local_row = j / grad_pieces / kWideWarps;
        const Row row = locate_row(p.layer, at.row0 + local_row);
        stream[i] = grad_h_stream(p, grad_h, row, begin, at.block_unit0 + section * 8);
        stream[i].source += sub * 16;
        if (at.block_unit0 + section * 8 < hidden_size) entry[i] = entry_step(p, row);
        copy_target[i] +=
            kGradOffset +
            ((local_row * kWideWarps + (section ^ local_row)) * grad_pieces + sub) * 16;
      } else if (kLayerNorm && piece >= 2 * kWideThreads - kWideRows) {
        const Row row = locate_row(p.layer, at.row0 + piece % kWideRows);
        stream[i] = rho_stream(p, row, begin);
        rho_entry = entry_step(p, row);
        copy_target[i] += kRhoOffset + piece % kWideRows * 4;
      }
    }
    coefficient_address =
        shared_address(&shared.ring[0][at.g * kLineBytes + (at.warp ^ at.g) * 16 + 4 * at.c]);
    grad_address = shared_address(&shared.ring[0][kGradOffset]) +
                   ((at.g * kWideWarps + (at.warp ^ at.g)) * 8 + 2 * at.c) * grad_bytes;
    rho_address = shared_address(&shared.ring[0][kRhoOffset + at.g * 4]);
    grad_float = grad_h.is_float();
  }

  // To be called for every k in turn.
  __device__ __forceinline__ void fetch(int k) {
    const uint32_t offset = k % kRingSteps * kRingBytes;
    if (k < count) {
      if (k >= entry[0]) copy_async_16(copy_target[0] + offset, stream[0].source);
      if (k >= entry[1]) copy_async_16(copy_target[1] + offset, stream[1].source);
      if (kLayerNorm && k >= rho_entry) copy_async_4(copy_target[1] + offset, stream[1].source);
    }
    stream[0].source += stream[0].step;
    stream[1].source += stream[1].step;
    copy_async_commit();
  }
  // Step k, which all threads must have seen land.
  __device__ __forceinline__ Input load(int k) const {
    const uint32_t offset = k % kRingSteps * kRingBytes;
    Input x;
#pragma unroll
    for (int i = 0; i < kStreams; i++)
      x.coefficients[i] =
          unpack_pair<T>(load_uint(coefficient_address + offset + i * kWideRows * kLineBytes));
    x.grad_h = grad_float ? load_float2(grad_address + offset)
                          : unpack_pair<T>(load_uint(grad_address + offset));
    if (kLayerNorm) x.rho = load_float(rho_address + offset);
    return x;
  }
};

// dwx of the block, which its warps exchange: each k-tile's part of the product's operand. It is
// stored from there, too, in whole lines: warp w stores row w, lane i units 2i and 2i + 1.
template <class T>
struct BlockDwx {
  static constexpr uint32_t kBufferBytes = kWideWarps * kOperandStride;

  uint32_t store_address, load_address, output_address;
  bool stored;
  int output_last, output_unit;

  template <bool kLayerNorm>
  __device__ __forceinline__ BlockDwx(const PersistentBackward& p, const WideLane& at,
                                      const Shared<kLayerNorm>& shared)
      : store_address(shared_address(&shared.operand[0][at.warp][at.g * 32 + at.c * 8])),
        load_address(shared_address(&shared.operand[0][0][at.g * 32 + at.c * 8])),
        output_address(
            shared_address(&shared.operand[0][at.lane >> 2][at.warp * 32 + (at.lane & 3) * 8])) {
    const Row row = locate_row(p.layer, at.row0 + at.warp);
    output_unit = at.block_unit0 + 2 * at.lane;
    stored = row.valid && output_unit < static_cast<int>(p.layer.hidden);
    output_last = row_step_at(p, row, 0);
  }

  __device__ __forceinline__ void store(const Turn& turn, float2 a, float2 z) const {
    store_uint2(store_address + turn.buffer * kBufferBytes, OperandTraits<T>::pack(a.x, a.y),
                OperandTraits<T>::pack(z.x, z.y));
  }
  __device__ __forceinline__ void load(const Turn& turn, uint2 (&dwx)[kWideWarps]) const {
#pragma unroll
    for (int i = 0; i < kWideWarps; i++)
      dwx[i] = load_uint2(load_address + turn.buffer * kBufferBytes + i * kOperandStride);
  }
  __device__ __forceinline__ void write(const Turn& turn, void* dwx_rows, int k) const {
    if (!stored) return;
    const uint2 words = load_uint2(output_address + turn.buffer * kBufferBytes);
    uint16_t* output =
        static_cast<uint16_t*>(dwx_rows) + int64_t{output_last - k} * 2 * kWideHidden + output_unit;
    *reinterpret_cast<uint32_t*>(output) = words.x;
    *reinterpret_cast<uint32_t*>(output + kWideHidden) = words.y;
  }
};

// The messages of partial carries, packed in the operand type. Pieces of odd rows have their lanes
// exchanged by 8, against bank conflicts.
template <class T>
struct PartialCarries {
  Arrival arrival;
  uint32_t first_target;
  uint32_t send_address, receive_address;
  int odd_row;

  template <bool kLayerNorm>
  __device__ __forceinline__ PartialCarries(const WideLane& at, uint32_t first_target,
                                            const Shared<kLayerNorm>& shared,
                                            const Arrival& arrival)
      : arrival(arrival), first_target(first_target) {
    const int g = at.g, c = at.c;
    send_address = shared_address(&shared.partial[0][at.rank][at.lane * kPieceBytes]);
    odd_row = 32 * kPieceBytes + ((at.lane ^ 8) - at.lane) * kPieceBytes;
    const int lane = ((2 * (at.warp & 3) + (c >> 1)) * 4 + (g >> 1)) ^ ((g & 1) * 8);
    receive_address = shared_address(
        &shared.partial[0][0]
                       [((at.warp >> 2) * 64 + (g & 1) * 32 + lane) * kPieceBytes + (c & 1) * 4]);
  }

  // sums: of an item; [tile].
  __device__ __forceinline__ void send(const Turn& turn, int item, const float (&a)[2][4]) const {
    const uint32_t to = first_target ^ (item / 2);
    const uint32_t address =
        send_address + turn.buffer * kCarryTraffic + item % 2 * 64 * kPieceBytes;
    const uint32_t barrier = remote_address(arrival.barrier_of(turn.buffer), to);
    sb_fast_sligru::send(remote_address(address, to), barrier,
                         OperandTraits<T>::pack(a[0][0], a[0][2]),
                         OperandTraits<T>::pack(a[1][0], a[1][2]));
    sb_fast_sligru::send(remote_address(address + odd_row, to), barrier,
                         OperandTraits<T>::pack(a[0][1], a[0][3]),
                         OperandTraits<T>::pack(a[1][1], a[1][3]));
  }
  // Uc^T (gamma dwx) of the lane's row and units.
  __device__ __forceinline__ float2 receive(const Turn& turn) const {
    arrival.receive(turn.buffer, turn.parity);
    return add_partial_carries<kWideCluster>([&](int i) {
      return unpack_pair<T>(
          load_uint(receive_address + turn.buffer * kCarryTraffic + i * kSenderBytes));
    });
  }
};

// m2: terms of the lanes -> sums of the blocks -> sums over the cluster. Every warp serves its own
// two blocks: lane (g, c) sends m2 of row g to block 2 * warp + c, c < 2.
struct M2Sum {
  static constexpr uint32_t kTermsBytes = kWideWarps * 32 * sizeof(float);

  Arrival arrival;
  bool sends;
  uint32_t target, target_barrier;
  uint32_t term_store, term_load, sum_load;
  float inverse_size;

  template <bool kLayerNorm>
  __device__ __forceinline__ M2Sum(int hidden_size, const WideLane& at,
                                   const Shared<kLayerNorm>& shared, const Arrival& arrival)
      : arrival(arrival), sends(at.c < 2) {
    const uint32_t target_rank = 2 * at.warp + (at.c & 1);
    target = remote_address(shared_address(&shared.m2_sums[0][at.rank][at.g]), target_rank);
    target_barrier = remote_address(arrival.barrier, target_rank);
    term_store = shared_address(&shared.m2_terms[0][at.warp][at.lane]);
    term_load = shared_address(&shared.m2_terms[0][0][at.lane]);
    sum_load = shared_address(&shared.m2_sums[0][at.c][at.g]);
    inverse_size = 1.f / static_cast<float>(2 * hidden_size);
  }

  __device__ __forceinline__ void store_term(const Turn& turn, float term) const {
    store_float(term_store + turn.buffer * kTermsBytes, term);
  }
  __device__ __forceinline__ void send(const Turn& turn) const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kWideWarps; i++)
      sum += load_float(term_load + turn.buffer * kTermsBytes + i * 32 * sizeof(float));
    sum = add_lane_xor(add_lane_xor(sum, 1), 2);
    if (sends)
      sb_fast_sligru::send(target + turn.buffer * kM2Traffic, target_barrier + turn.buffer * 8,
                           __float_as_uint(sum));
  }
  // m2 of the lane's row.
  __device__ __forceinline__ float receive(const Turn& turn) const {
    arrival.receive(turn.buffer, turn.parity);
    return add_m2<kWideCluster>(sum_load + turn.buffer * kM2Traffic, kWideRows * sizeof(float),
                                inverse_size);
  }
};

#endif  // SB_FAST_SLIGRU_HAS_CLUSTERS

template <class T, bool kLayerNorm>
__global__ void __launch_bounds__(kWideThreads, 1)
    backward_wide_kernel(const __grid_constant__ PersistentBackward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kLayerNorm>*>(shared_bytes);

  const int hidden_size = static_cast<int>(p.layer.hidden), count = static_cast<int>(p.count);
  const WideLane at(hidden_size);
  const int begin = begin_step(p, at.row0);
  if (begin == count) return;
  const Arrival carry_arrival = {shared_address(&shared.barriers[0]), kCarryTraffic};
  const Arrival m2_arrival = {shared_address(&shared.barriers[2]), kM2Traffic};
  begin_arrivals<kWideThreads, kLayerNorm>(carry_arrival, m2_arrival, shared.ring);

  const uint32_t first_target = 2 * at.warp + (at.rank & 1);
  Weights<T> weights(p, at, first_target, shared);
  PartialCarries<T> partial_carries(at, first_target, shared, carry_arrival);
  M2Sum m2_sum(hidden_size, at, shared, m2_arrival);
  Streams<T, kLayerNorm> streams(p, at, begin, shared);
#pragma unroll
  for (int k = 0; k < kRingSteps - 1; k++) streams.fetch(begin + k);
  copy_async_wait<kRingSteps - 2>();
  __syncthreads();
  auto next = streams.load(begin);

  const Row row = locate_row(p.layer, at.row0 + at.g);
  float2* state = reinterpret_cast<float2*>(p.carry + int64_t{row.index} * hidden_size + at.unit);
  float2 carry = at.in_range ? *state : make_float2(0.f, 0.f);
  BlockDwx<T> block_dwx(p, at, shared);
  const bool stores_m2 = kLayerNorm && at.rank == 0 && at.warp == 0 && at.c == 0 && row.valid;
  const int m2_last = row_step_at(p, row, 0);
  pin(m2_sum.inverse_size), pin(partial_carries.receive_address), pin(block_dwx.store_address);
  pin(block_dwx.load_address), pin(m2_sum.term_store), pin(m2_sum.term_load), pin(m2_sum.sum_load);
  pin(streams.coefficient_address), pin(weights.fragment_address);
  cluster_barrier();
  weights.stage_early();

#pragma unroll 1
  for (int k = begin; k < count; k++) {
    const Turn turn(k);
    const auto now = next;
    const float2 d = now.grad_h + carry;
    block_dwx.store(turn, d * now.k_a(), d * now.k_z());
    if constexpr (kLayerNorm) m2_sum.store_term(turn, fmaf(d.x, now.q().x, d.y * now.q().y));
    weights.stage_half(0);
    copy_async_wait<kRingSteps - 3>();  // for load(k + 1), after the __syncthreads
    __syncthreads();

    uint2 all_dwx[kWideWarps];
    block_dwx.load(turn, all_dwx);
    float sums[2][2][4];  // [item % 2][tile]
#pragma unroll
    for (int half = 0; half < 2 * kItems; half++) {
      const int item = half / 2;
      if (half % 2 == 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) sums[item % 2][i / 4][i % 4] = 0.f;
      }
      if (half + 1 < 2 * kItems) weights.stage_half(half + 1);
      weights.multiply_half(sums[item % 2], half, all_dwx);
      if (half >= 2 && half % 2 == 0) partial_carries.send(turn, item - 1, sums[(item - 1) % 2]);
    }
    if constexpr (kLayerNorm) m2_sum.send(turn);
    partial_carries.send(turn, kItems - 1, sums[(kItems - 1) % 2]);

    block_dwx.write(turn, p.dwx_rows, k);
    streams.fetch(k + kRingSteps - 1);
    next = streams.load(k + 1);
    weights.stage_early();

    float2 own = times_z(d, now.complement());
    if constexpr (kLayerNorm) {
      const float m2 = m2_sum.receive(turn);
      own = add_scaled(own, -now.rho * m2, now.v());
      if (stores_m2) p.m2[m2_last - k] = m2;
    }
    carry = add_scaled(own, now.rho, partial_carries.receive(turn));
  }
  if (at.in_range && row.valid) *state = carry;
  cluster_barrier();
#endif
}

template <class T, bool kLayerNorm>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  static_assert(sizeof(Shared<kLayerNorm>) <= kWideSharedBytes);
  constexpr ClusterKernel<PersistentBackward> kKernel = {
      backward_wide_kernel<T, kLayerNorm>, kWideCluster, kWideThreads, sizeof(Shared<kLayerNorm>)};
  return kKernel.run(p.choice.groups(p.layer.rows()), p, stream);
}

template <class T>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  return p.layer.layer_norm ? launch<T, true>(p, stream) : launch<T, false>(p, stream);
}

}  // namespace

cudaError_t run_backward_wide(const PersistentBackward& p, cudaStream_t stream) {
  return p.layer.operand_type == DType::kBFloat16 ? launch<__nv_bfloat16>(p, stream)
                                                  : launch<__half>(p, stream);
}

}  // namespace sb_fast_sligru
