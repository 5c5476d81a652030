// The backward recurrence of backward_narrow.cu for 512 < H <= 1024: same equations, same
// exchange.
//
// A block owns 128 rows of Uc and dwx. Warp w serves blocks 2w and 2w + 1, in four items of 32
// units each; an item is sent while the next one is multiplied. The partial carries travel in the
// operand type: as float their 32 KB into every block would be most of a step (measured 1.89 us
// against 1.26 at 48 rows, H200, November 2026); summed, they are float as everywhere.
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
constexpr int kScratchBytes = kItemFragments / 2 * kFragmentBytes;  // half an item of U

template <bool kLayerNorm>
struct Shared {
  static constexpr int kGradOffset = kCoefficientStreams<kLayerNorm> * kWideRows * kLineBytes;
  static constexpr int kRhoOffset = kGradOffset + kWideRows * kWideUnits * 4;
  alignas(1024) uint8_t partial[2][kWideCluster][kSenderBytes];
  uint8_t fragments[kSharedFragments][kWideWarps][kFragmentBytes];
  uint8_t operand[2][kWideWarps][kOperandStride];  // dwx: [warp][row][c][a a z z]
  uint8_t ring[kRingSteps][kRhoOffset + kWideRows * 4];
  float m2_sums[2][kWideCluster][kWideRows];
  float m2_terms[2][kWideWarps][32];  // [warp][lane]
  uint64_t barriers[4];
  alignas(16) uint8_t scratch[kWideWarps][kScratchBytes];  // of the prologue
};

template <class T, bool kLayerNorm>
__global__ void __launch_bounds__(kWideThreads, 1)
    backward_wide_kernel(const __grid_constant__ PersistentBackward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  using Split = FragmentSplit<kSharedFragments>;
  constexpr int kStreams = kCoefficientStreams<kLayerNorm>;
  constexpr int kGradOffset = Shared<kLayerNorm>::kGradOffset;
  constexpr int kRhoOffset = Shared<kLayerNorm>::kRhoOffset;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kLayerNorm>*>(shared_bytes);
  constexpr uint32_t kRingBytes = sizeof(shared.ring[0]);

  const Recurrence& layer = p.layer;
  const int hidden_size = static_cast<int>(layer.hidden), count = static_cast<int>(p.count);
  const auto* ln_weight = static_cast<const float*>(layer.ln_weight);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const uint32_t rank = cluster_rank();
  const int row0 = static_cast<int>(blockIdx.x / kWideCluster) * kWideRows;
  const int block_unit0 = static_cast<int>(rank) * kWideUnits;
  const int unit =
      block_unit0 + warp * 8 + 2 * c;  // and unit + 1, of row g: what this lane computes
  const bool in_range = unit < hidden_size;

  const uint32_t carry_barrier = shared_address(&shared.barriers[0]);
  const uint32_t m2_barrier = shared_address(&shared.barriers[2]);
  if (threadIdx.x < 4) mbarrier::init(carry_barrier + 8 * threadIdx.x);
  mbarrier::fence_init();
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(shared.ring)) / 4; i += kWideThreads)
    reinterpret_cast<uint32_t*>(shared.ring)[i] = 0;  // stays so where grad_h has no such unit
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      mbarrier::expect(carry_barrier + 8 * i, kCarryTraffic);
      if (kLayerNorm) mbarrier::expect(m2_barrier + 8 * i, kM2Traffic);
    }
  }

  // Uc^T with gamma folded in. Item i: half i % 2 of the units of block first_target ^ (i / 2); the
  // lane's outputs are units 4g..4g+3 of that half (two 16-row tiles, rows g and g + 8 of each);
  // k-tile k holds the 8 candidate and 8 gate rows of warp k. Half an item at a time goes through
  // `partial` or, in turn, `scratch`: from global memory in whole lines, while the half before it
  // is read transposed.
  const uint32_t first_target = 2 * warp + (rank & 1);
  uint32_t weights[Split::kInRegisters][4];
  uint32_t fragment_address = shared_address(&shared.fragments[0][warp][lane * 16]);
  constexpr int kHalfItem = kItemFragments / 2;
  constexpr int kHalfTiles = kHalfItem / 2, kHalfRows = 8 * kHalfTiles;  // k-tiles; rows of a gate
  constexpr int kRowBytes = 32 * sizeof(T);
  static_assert(2 * kHalfRows * kRowBytes == kScratchBytes);
  static_assert(sizeof(shared.partial) == sizeof(shared.scratch));
  const auto scratch_address = [&](int half) {
    return shared_address(half % 2 ? &shared.scratch[0][0] : &shared.partial[0][0][0]) +
           warp * kScratchBytes;
  };
  const auto fetch_u = [&](int half) {
    const uint32_t scratch = scratch_address(half);
    const int item = half / 2, half_row0 = half % 2 * kHalfRows;
    const int column0 = static_cast<int>(first_target ^ (item / 2)) * kWideUnits + item % 2 * 32;
    if (half < 2 * kItems) {
#pragma unroll 1
      for (int i = 0; i < kScratchBytes / kFragmentBytes; i++) {
        const int piece = i * 32 + lane, line = piece / 4, column = column0 + piece % 4 * 8;
        const int row = block_unit0 + half_row0 + line % kHalfRows;
        const bool valid = row < hidden_size && column < hidden_size;
        const int output = line / kHalfRows * hidden_size + row;
        copy_async_16_or_zeros(
            scratch + piece * 16,
            static_cast<const T*>(p.u) + (valid ? int64_t{output} * hidden_size + column : 0),
            valid);
      }
    }
    copy_async_commit();
  };
  fetch_u(0);
  // gamma of the block's rows, in `operand` for now: [gate][row].
  auto* gamma = reinterpret_cast<float*>(&shared.operand[0][0][0]);
  for (int i = threadIdx.x; i < 2 * kWideUnits; i += kWideThreads) {
    const int row = block_unit0 + i % kWideUnits;
    gamma[i] = kLayerNorm && ln_weight != nullptr && row < hidden_size
                   ? ln_weight[i / kWideUnits * hidden_size + row]
                   : 1.f;
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2 * kItems; half++) {
    const uint32_t scratch = scratch_address(half);
    const int half_row0 = half % 2 * kHalfRows;
    __syncwarp();  // the half before this one is read
    fetch_u(half + 1);
    copy_async_wait<1>();
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kHalfTiles; k++) {
      uint32_t a[2][4];
#pragma unroll
      for (int gate = 0; gate < 2; gate++) {
        const int row = 8 * k + 2 * c;
        const uint32_t from = scratch + (gate * kHalfRows + row) * kRowBytes + g * 8;
        const float2 factor =
            load_float2(shared_address(&gamma[gate * kWideUnits + half_row0 + row]));
        const uint2 even = load_uint2(from), odd = load_uint2(from + kRowBytes);
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
          const float2 low = unpack_pair<T>(tile == 0 ? even.x : even.y);
          const float2 high = unpack_pair<T>(tile == 0 ? odd.x : odd.y);
          a[tile][2 * gate] = OperandTraits<T>::pack(low.x * factor.x, high.x * factor.y);
          a[tile][2 * gate + 1] = OperandTraits<T>::pack(low.y * factor.x, high.y * factor.y);
        }
      }
#pragma unroll
      for (int tile = 0; tile < 2; tile++) {
        const int f = half * kHalfItem + 2 * k + tile;
        const uint4 x = make_uint4(a[tile][0], a[tile][1], a[tile][2], a[tile][3]);
        if (Split::is_shared(f)) {
          store_uint4(fragment_address + Split::shared_before(f) * sizeof(shared.fragments[0]), x);
        } else {
          uint32_t (&to)[4] = weights[Split::register_index(f)];
          to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
        }
      }
    }
  }
  __syncthreads();  // the last use of gamma
  // Pieces of odd rows have their lanes exchanged by 8, against bank conflicts.
  uint32_t carry_send = shared_address(&shared.partial[0][rank][lane * kPieceBytes]);
  const int odd_row = 32 * kPieceBytes + ((lane ^ 8) - lane) * kPieceBytes;
  const int receive_lane = ((2 * (warp & 3) + (c >> 1)) * 4 + (g >> 1)) ^ ((g & 1) * 8);
  uint32_t carry_receive = shared_address(
      &shared.partial[0][0][((warp >> 2) * 64 + (g & 1) * 32 + receive_lane) * kPieceBytes +
                            (c & 1) * 4]);
  // Lane (g, c) sends m2 of row g to block 2 * warp + c, c < 2.
  const uint32_t m2_rank = 2 * warp + (c & 1);
  const uint32_t m2_target = remote_address(shared_address(&shared.m2_sums[0][rank][g]), m2_rank);
  const uint32_t m2_target_barrier = remote_address(m2_barrier, m2_rank);

  // Streams of one step: every thread copies at most two pieces of 16 bytes, 8 neighbouring threads
  // a line of 128. Pieces in order: coefficients, grad_h; the last 8 threads copy rho (4 bytes). In
  // the ring the sections of 8 units of a row are permuted by row against bank conflicts.
  const int64_t last = p.first + count - 1;
  const Sequence grad_h = {p.grad_h, layer.output_type, p.grad_h_batch_stride,
                           p.grad_h_time_stride};
  const int grad_bytes = grad_h.bytes(), grad_pieces = grad_bytes / 2;  // pieces of 8 units
  constexpr int kCoefficientPieces = kStreams * kWideRows * kWideWarps;
  const char* source[2] = {};
  int64_t source_step[2] = {};
  uint32_t copy_target[2];
  bool copies[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int piece = static_cast<int>(threadIdx.x) + i * kWideThreads;
    copies[i] = false;
    copy_target[i] = shared_address(&shared.ring[0][0]);
    if (piece < kCoefficientPieces) {
      const int section = piece % kWideWarps, line = piece / kWideWarps;
      const int local_row = line % kWideRows, stream = line / kWideRows;
      source_step[i] = -static_cast<int64_t>(sizeof(T)) * kStreams * kWideHidden;
      source[i] =
          static_cast<const char*>(p.coefficients) -
          (int64_t{locate_row(layer, row0 + local_row).index + 1} * count - 1) * source_step[i] +
          (stream * kWideHidden + block_unit0 + section * 8) * sizeof(T);
      copies[i] = true;
      copy_target[i] += line * kLineBytes + (section ^ local_row) * 16;
    } else if (piece < kCoefficientPieces + kWideRows * kWideWarps * grad_pieces) {
      const int j = piece - kCoefficientPieces, sub = j % grad_pieces;
      const int section = j / grad_pieces % kWideWarps, local_row = j / grad_pieces / kWideWarps;
      const Row row = locate_row(layer, row0 + local_row);
      source_step[i] = -grad_h.step_bytes(row);
      source[i] =
          grad_h.at(layer, row, last, row.direction * hidden_size + block_unit0 + section * 8) +
          sub * 16;
      copies[i] = block_unit0 + section * 8 < hidden_size;
      copy_target[i] +=
          kGradOffset + ((local_row * kWideWarps + (section ^ local_row)) * grad_pieces + sub) * 16;
    } else if (kLayerNorm && piece >= 2 * kWideThreads - kWideRows) {
      const Row row = locate_row(layer, row0 + piece % kWideRows);
      source_step[i] = row.direction ? 4 : -4;  // floats
      source[i] = reinterpret_cast<const char*>(p.rho + row.index * layer.time +
                                                layer.time_of(row.index, last));
      copy_target[i] += kRhoOffset + piece % kWideRows * 4;
    }
  }
  const bool copies_rho = kLayerNorm && threadIdx.x >= kWideThreads - kWideRows;
  const auto fetch = [&](int k) {
    const uint32_t offset = k % kRingSteps * kRingBytes;
    if (k < count) {
      if (copies[0]) copy_async_16(copy_target[0] + offset, source[0]);
      if (copies[1]) copy_async_16(copy_target[1] + offset, source[1]);
      if (copies_rho) copy_async_4(copy_target[1] + offset, source[1]);
    }
    source[0] += source_step[0];
    source[1] += source_step[1];
    copy_async_commit();
  };

  uint32_t stream_address =
      shared_address(&shared.ring[0][g * kLineBytes + (warp ^ g) * 16 + 4 * c]);
  uint32_t grad_address = shared_address(&shared.ring[0][kGradOffset]) +
                          ((g * kWideWarps + (warp ^ g)) * 8 + 2 * c) * grad_bytes;
  uint32_t rho_address = shared_address(&shared.ring[0][kRhoOffset + g * 4]);
  const bool grad_float = grad_h.is_float();
  float2 coefficients[kStreams], grad;
  float rho = 1.f;
  const auto load = [&](int k) {
    const uint32_t offset = k % kRingSteps * kRingBytes;
#pragma unroll
    for (int i = 0; i < kStreams; i++)
      coefficients[i] =
          unpack_pair<T>(load_uint(stream_address + offset + i * kWideRows * kLineBytes));
    grad = grad_float ? load_float2(grad_address + offset)
                      : unpack_pair<T>(load_uint(grad_address + offset));
    if (kLayerNorm) rho = load_float(rho_address + offset);
  };
#pragma unroll
  for (int k = 0; k < kRingSteps - 1; k++) fetch(k);
  copy_async_wait<kRingSteps - 2>();
  __syncthreads();
  load(0);

  const Row row = locate_row(layer, row0 + g);
  float2* state = reinterpret_cast<float2*>(p.carry + int64_t{row.index} * hidden_size + unit);
  float2 carry = in_range ? *state : make_float2(0.f, 0.f);
  // dwx is stored from `operand`, in whole lines: warp w stores row w, lane i units 2i and 2i + 1.
  const Row output_row = locate_row(layer, row0 + warp);
  const bool stored = output_row.valid && block_unit0 + 2 * lane < hidden_size;
  const int output_last = (output_row.index + 1) * count - 1;
  uint32_t output_load = shared_address(&shared.operand[0][lane >> 2][warp * 32 + (lane & 3) * 8]);
  const bool stores_m2 = kLayerNorm && rank == 0 && warp == 0 && c == 0 && row.valid;
  const int m2_last = (row.index + 1) * count - 1;
  float inverse_size = 1.f / static_cast<float>(2 * hidden_size);

  uint32_t operand_store = shared_address(&shared.operand[0][warp][g * 32 + c * 8]);
  uint32_t operand_load = shared_address(&shared.operand[0][0][g * 32 + c * 8]);
  uint32_t term_store = shared_address(&shared.m2_terms[0][warp][lane]);
  uint32_t term_load = shared_address(&shared.m2_terms[0][0][lane]);
  uint32_t m2_load = shared_address(&shared.m2_sums[0][c][g]);
  uint4 staged[kSharedFragments];
  const auto stage = [&](int from, int to) {
#pragma unroll
    for (int i = 0; i < kSharedFragments; i++)
      if (from <= i && i < to)
        staged[i] = load_uint4(fragment_address + i * sizeof(shared.fragments[0]));
  };
  pin(inverse_size), pin(carry_receive), pin(operand_store), pin(operand_load), pin(term_store);
  pin(term_load), pin(m2_load), pin(stream_address), pin(fragment_address);
  cluster_barrier();
  stage(0, kEarlyFragments);

#pragma unroll 1
  for (int k = 0; k < count; k++) {
    const uint32_t buffer = k & 1, parity = k >> 1 & 1;
    const float2 d = make_float2(grad.x + carry.x, grad.y + carry.y);
    const float2 complement = coefficients[2];
    const float now_rho = rho;
    float2 v = make_float2(0.f, 0.f);
    store_uint2(operand_store + buffer * sizeof(shared.operand[0]),
                OperandTraits<T>::pack(d.x * coefficients[0].x, d.y * coefficients[0].y),
                OperandTraits<T>::pack(d.x * coefficients[1].x, d.y * coefficients[1].y));
    if constexpr (kLayerNorm) {
      store_float(term_store + buffer * sizeof(shared.m2_terms[0]),
                  fmaf(d.x, coefficients[3].x, d.y * coefficients[3].y));
      v = coefficients[4];
    }
    stage(kEarlyFragments, Split::shared_before(kHalfItem));
    copy_async_wait<kRingSteps - 3>();
    __syncthreads();

    uint2 dwx[kWideWarps];
#pragma unroll
    for (int i = 0; i < kWideWarps; i++)
      dwx[i] = load_uint2(operand_load + buffer * sizeof(shared.operand[0]) + i * kOperandStride);
    float sums[2][2][4];  // [item % 2][tile]
    const auto send_item = [&](int item) {
      const float (&a)[2][4] = sums[item % 2];
      const uint32_t to = first_target ^ (item / 2);
      const uint32_t address = carry_send + buffer * kCarryTraffic + item % 2 * 64 * kPieceBytes;
      const uint32_t barrier = remote_address(carry_barrier + buffer * 8, to);
      send(remote_address(address, to), barrier, OperandTraits<T>::pack(a[0][0], a[0][2]),
           OperandTraits<T>::pack(a[1][0], a[1][2]));
      send(remote_address(address + odd_row, to), barrier, OperandTraits<T>::pack(a[0][1], a[0][3]),
           OperandTraits<T>::pack(a[1][1], a[1][3]));
    };
#pragma unroll
    for (int half = 0; half < 2 * kItems; half++) {
      const int item = half / 2;
      if (half % 2 == 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) sums[item % 2][i / 4][i % 4] = 0.f;
      }
      const int next = Split::shared_before((half + 1) * kHalfItem);
      if (half + 1 < 2 * kItems)
        stage(next > kEarlyFragments ? next : kEarlyFragments,
              Split::shared_before((half + 2) * kHalfItem));
#pragma unroll
      for (int i = 0; i < kHalfItem; i++) {
        const int f = half * kHalfItem + i;
        const uint2 b = dwx[f % kItemFragments / 2];
        float (&sum)[4] = sums[item % 2][i % 2];
        if (Split::is_shared(f)) {
          const uint4 x = staged[Split::shared_before(f)];
          const uint32_t a[4] = {x.x, x.y, x.z, x.w};
          multiply<T>(sum, a, b.x, b.y);
        } else {
          multiply<T>(sum, weights[Split::register_index(f)], b.x, b.y);
        }
      }
      if (half >= 2 && half % 2 == 0) send_item(item - 1);
    }
    if constexpr (kLayerNorm) {  // every warp serves its own two blocks
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < kWideWarps; i++)
        sum += load_float(term_load + buffer * sizeof(shared.m2_terms[0]) +
                          i * sizeof(shared.m2_terms[0][0]));
      sum = add_lane_xor(add_lane_xor(sum, 1), 2);
      if (c < 2)
        send(m2_target + buffer * kM2Traffic, m2_target_barrier + buffer * 8, __float_as_uint(sum));
    }
    send_item(kItems - 1);
    if (stored) {
      const uint2 words = load_uint2(output_load + buffer * sizeof(shared.operand[0]));
      uint16_t* output = static_cast<uint16_t*>(p.dwx_rows) +
                         int64_t{output_last - k} * 2 * kWideHidden + block_unit0 + 2 * lane;
      *reinterpret_cast<uint32_t*>(output) = words.x;
      *reinterpret_cast<uint32_t*>(output + kWideHidden) = words.y;
    }
    fetch(k + kRingSteps - 1);
    load(k + 1);

    stage(0, kEarlyFragments);
    float2 own = make_float2(fmaf(-complement.x, d.x, d.x), fmaf(-complement.y, d.y, d.y));
    if constexpr (kLayerNorm) {
      mbarrier::wait(m2_barrier + buffer * 8, parity);
      if (threadIdx.x == 0) mbarrier::expect(m2_barrier + buffer * 8, kM2Traffic);
      float m2 = 0.f;
#pragma unroll
      for (int i = 0; i < kWideCluster / 4; i++)
        m2 += load_float(m2_load + buffer * kM2Traffic + i * 4 * sizeof(shared.m2_sums[0][0]));
      m2 = add_lane_xor(add_lane_xor(m2, 1), 2) * inverse_size;
      own.x = fmaf(-now_rho * m2, v.x, own.x);
      own.y = fmaf(-now_rho * m2, v.y, own.y);
      if (stores_m2) p.m2[m2_last - k] = m2;
    }
    mbarrier::wait(carry_barrier + buffer * 8, parity);
    if (threadIdx.x == 0) mbarrier::expect(carry_barrier + buffer * 8, kCarryTraffic);
    float2 received[4] = {};
#pragma unroll
    for (int i = 0; i < kWideCluster; i++) {
      const float2 x =
          unpack_pair<T>(load_uint(carry_receive + buffer * kCarryTraffic + i * kSenderBytes));
      received[i % 4].x += x.x;
      received[i % 4].y += x.y;
    }
    carry.x =
        fmaf(now_rho, (received[0].x + received[1].x) + (received[2].x + received[3].x), own.x);
    carry.y =
        fmaf(now_rho, (received[0].y + received[1].y) + (received[2].y + received[3].y), own.y);
  }
  if (in_range && row.valid) *state = carry;
  cluster_barrier();
#endif
}

template <class T, bool kLayerNorm>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  static_assert(sizeof(Shared<kLayerNorm>) <= kWideSharedBytes);
  constexpr ClusterKernel<PersistentBackward> kKernel = {
      backward_wide_kernel<T, kLayerNorm>, kWideCluster, kWideThreads, sizeof(Shared<kLayerNorm>)};
  return kKernel.run(p.choice.clusters(p.layer.rows()), p, stream);
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
