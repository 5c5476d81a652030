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
#include "light_gru/persistent/launch.h"
#include "light_gru/persistent/narrow_float.cuh"

namespace sb_fast_sligru {
namespace {

template <int kCluster, bool kLayerNorm>
__global__ void __launch_bounds__(kFloatThreads, 1)
    forward_float_kernel(const __grid_constant__ PersistentForward p) {
#if SB_FAST_SLIGRU_HAS_CLUSTERS
  constexpr int kTeamWarps = 4, kTeamOctets = 2;
  constexpr int kSlots = kCluster / kTeamWarps;  // that one warp multiplies
  constexpr int kBuffers = kLayerNorm ? 1 : 2;
  constexpr int kHalf = kBlockUnits / 2;
  constexpr int kRowBytes = 4 * kBlockUnits;  // high and low parts
  constexpr int kSlotBytes = kRows * kRowBytes;
  constexpr int kHiddenBytes = kCluster * kSlotBytes;
  // (a, z) of 32 units, and 32 bytes for the four rows of a store to use different banks.
  constexpr int kPartialRowBytes = 8 * kBlockUnits + 32;
  constexpr int kPartialBytes = kRows * kPartialRowBytes;  // of one part of K
  constexpr int kSumWarps = 2, kSumTargets = kCluster / kSumWarps;

  // [slot][row][high parts or low parts][word]: word q is units q and q + 16.
  __shared__ alignas(128) uint8_t hidden[kBuffers][kHiddenBytes];
  __shared__ alignas(16) float statistics[2][kCluster][kRows];
  __shared__ alignas(16) uint8_t partial[2][kTeamWarps][kPartialBytes];  // of r
  __shared__ alignas(16) float ring[kRingSteps][kRows][2][kBlockUnits];  // wx: [.][.][a, z][unit]
  // mbarriers; h has one a slot.
  __shared__ alignas(8) uint64_t hidden_arrived[kBuffers][kCluster], statistics_arrived;

  const Recurrence& layer = p.layer;
  const int hidden_size = static_cast<int>(layer.hidden), steps = static_cast<int>(layer.time);
  const auto* h0 = static_cast<const float*>(layer.h0);
  const auto* drop_mask = static_cast<const float*>(layer.drop_mask);
  const auto* ln_weight = static_cast<const float*>(layer.ln_weight);
  const auto* ln_bias = static_cast<const float*>(layer.ln_bias);
  // The shuffle lets the compiler know that all lanes of a warp take the same branch.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int team = warp / kTeamWarps, part = warp % kTeamWarps;  // in the product
  const int own_row = warp / 2, half = warp % 2;                 // after it
  const uint32_t rank = cluster_rank();
  const int rows = cluster_rows(layer, kCluster);
  const int row0 = static_cast<int>(blockIdx.x / kCluster) * rows;
  const int block_unit0 = static_cast<int>(rank) * kBlockUnits, unit = block_unit0 + lane;
  const bool in_range = unit < hidden_size;

  const uint32_t hidden_traffic = kRowBytes * rows;
  const uint32_t statistics_traffic = kCluster * sizeof(float) * rows;
  if (threadIdx.x < kBuffers * kCluster)
    mbarrier::init(shared_address(&hidden_arrived[0][threadIdx.x]));
  if (threadIdx.x == 0) mbarrier::init(shared_address(&statistics_arrived));
  mbarrier::fence_init();
  __syncthreads();
  if (threadIdx.x < kCluster) {
    mbarrier::arrive(shared_address(&hidden_arrived[0][threadIdx.x]));  // h0 needs no message
    if constexpr (!kLayerNorm)
      mbarrier::expect(shared_address(&hidden_arrived[1][threadIdx.x]), hidden_traffic);
  }
  if (kLayerNorm && threadIdx.x == 0)
    mbarrier::expect(shared_address(&statistics_arrived), statistics_traffic);

  // Slot o of `hidden` belongs to block rank ^ o: senders and receivers use the same slot, and
  // every block starts with its own.
  for (int i = threadIdx.x; i < kCluster * kRows * 4; i += kFloatThreads) {
    const int quarter = i % 4, row = i / 4 % kRows, slot = i / 4 / kRows;  // four words
    const int column = static_cast<int>(rank ^ slot) * kBlockUnits + quarter * 4;
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f), y = x;
    if (h0 != nullptr) {
      const float* from = h0 + int64_t{locate_row(layer, row0 + row).index} * hidden_size + column;
      if (column < hidden_size) x = *reinterpret_cast<const float4*>(from);
      if (column + kHalf < hidden_size) y = *reinterpret_cast<const float4*>(from + kHalf);
    }
    const SplitPair words[4] = {split(x.x, y.x), split(x.y, y.y), split(x.z, y.z), split(x.w, y.w)};
    auto* to =
        reinterpret_cast<uint4*>(&hidden[0][slot * kSlotBytes + row * kRowBytes + quarter * 16]);
    to[0] = make_uint4(words[0].high, words[1].high, words[2].high, words[3].high);
    to[4] = make_uint4(words[0].low, words[1].low, words[2].low, words[3].low);
  }
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(ring)) / 4; i += kFloatThreads)
    reinterpret_cast<uint32_t*>(ring)[i] = 0;  // stays so where units are padding

  // Lane c multiplies units 4c..4c+3 and 4c+16..4c+19 of every slot, half of them in each of two
  // products: the order of k is free as long as both operands agree. First the floats, then, in
  // their place, their parts.
  uint32_t weights[kSlots][2][kTeamOctets][2][4];
  float factor[kTeamOctets][2];  // of the products
#pragma unroll
  for (int e = 0; e < kTeamOctets; e++) {
    const int tile_unit = block_unit0 + (team * kTeamOctets + e) * 8 + g;
#pragma unroll
    for (int gate = 0; gate < 2; gate++) {
      float largest = 0.f;
#pragma unroll
      for (int i = 0; i < kSlots; i++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const int column =
              static_cast<int>(rank ^ (kTeamWarps * i + part)) * kBlockUnits + 4 * c + kHalf * k;
          float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
          if (tile_unit < hidden_size && column < hidden_size)
            x = *reinterpret_cast<const float4*>(
                static_cast<const float*>(p.u) +
                (int64_t{gate} * hidden_size + tile_unit) * hidden_size + column);
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
      for (int i = 0; i < kSlots; i++)
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

  const Row row = locate_row(layer, row0 + own_row);
  const bool owns_row = own_row < rows;
  const bool stored = row.valid && in_range && half == 0;
  float h = 0.f, mask = 1.f, gamma_a = 1.f, gamma_z = 1.f, beta_a = 0.f, beta_z = 0.f;
  if (in_range) {
    if (h0 != nullptr) h = h0[int64_t{row.index} * hidden_size + unit];
    if (drop_mask != nullptr) mask = drop_mask[int64_t{row.index} * hidden_size + unit];
    if (kLayerNorm && ln_weight != nullptr)
      gamma_a = ln_weight[unit], gamma_z = ln_weight[hidden_size + unit];
    if (kLayerNorm && ln_bias != nullptr)
      beta_a = ln_bias[unit], beta_z = ln_bias[hidden_size + unit];
  }

  // Warp 2r sends row r's h to the even slots, warp 2r + 1 to the odd ones, lane i word i.
  uint32_t target[kCluster / 2], target_barrier[kCluster / 2];
#pragma unroll
  for (int i = 0; i < kCluster / 2; i++) {
    const uint32_t slot = 2 * i + half, receiver = rank ^ slot;
    target[i] = remote_address(
        shared_address(&hidden[0][slot * kSlotBytes + own_row * kRowBytes + lane * 4]), receiver);
    target_barrier[i] = remote_address(shared_address(&hidden_arrived[0][slot]), receiver);
    pin(target[i]), pin(target_barrier[i]);
  }
  // Each of the last warps sends the statistics to a part of the blocks, lane 4g + c those of row c
  // to block g of them.
  const int sum_warp = warp - (kFloatWarps - kSumWarps);
  const bool sums_squares = kLayerNorm && sum_warp >= 0;
  const bool sends_sum = c < rows && g < kSumTargets;
  const uint32_t sum_receiver = (sum_warp * kSumTargets + g) % kCluster;
  uint32_t statistics_barrier = shared_address(&statistics_arrived);
  uint32_t sum_target = remote_address(shared_address(&statistics[0][rank][c]), sum_receiver);
  uint32_t sum_barrier = remote_address(statistics_barrier, sum_receiver);

  // wx of a row: the first lanes of warp 2r each copy one 16-byte piece a step. The warps meet
  // between the wait for a copy and its use.
  const Sequence wx = wx_sequence(layer);
  const int piece_unit = lane % 8 * 4, piece_gate = lane / 8 % 2;
  const bool copies = half == 0 && lane < 16 && block_unit0 + piece_unit < hidden_size;
  const char* source = wx.at(layer, row, 0, piece_gate * hidden_size + block_unit0 + piece_unit);
  int64_t source_step = wx.step_bytes(row);
  uint32_t copy_target = shared_address(&ring[0][own_row][piece_gate][piece_unit]);
  uint32_t wx_address = shared_address(&ring[0][own_row][0][lane]);
  const auto fetch = [&](int n) {
    if (n < steps && copies) copy_async_16(copy_target + n % kRingSteps * sizeof(ring[0]), source);
    source += source_step;
    copy_async_commit();
  };
  __syncthreads();  // the ring is zero before copies land in it
  if (owns_row) {
#pragma unroll
    for (int n = 0; n < kRingSteps - 1; n++) fetch(n);
    copy_async_wait<kRingSteps - 2>();
  }

  const Sequence outputs = h_sequence(layer, p.h);
  char* output = const_cast<char*>(outputs.at(layer, row, 0, row.direction * hidden_size + unit));
  int64_t output_step = outputs.step_bytes(row);
  const bool stores_rho = kLayerNorm && row.valid && rank == 0 && half == 0 && lane == 0;
  float* rho_output =
      stores_rho ? p.rho + int64_t{row.index} * steps + layer.time_of(row.index, 0) : nullptr;
  const int rho_step = row.direction ? -1 : 1;
  uint32_t hidden_barrier = shared_address(&hidden_arrived[0][part]);
  uint32_t hidden_address = shared_address(&hidden[0][part * kSlotBytes + lane * 16]);
  uint32_t partial_store =
      shared_address(&partial[0][part][c * kPartialRowBytes + (team * kTeamOctets * 8 + g) * 8]);
  uint32_t partial_load = shared_address(&partial[0][0][own_row * kPartialRowBytes + lane * 8]);
  uint32_t square_load = shared_address(&partial[0][0][c * kPartialRowBytes + g * 16]);
  uint32_t statistics_load = shared_address(&statistics[0][lane % 2][own_row]);
  uint32_t both_halves = lane < kHalf ? 0x5410 : 0x3276;  // for __byte_perm
  float inverse_size = 1.f / static_cast<float>(2 * hidden_size);
  float eps = static_cast<float>(layer.eps);
  const Activation activation = layer.activation;
  pin(hidden_barrier), pin(hidden_address), pin(partial_store), pin(partial_load);
  pin(statistics_barrier), pin(square_load), pin(statistics_load), pin(sum_target),
      pin(sum_barrier);
  pin(copy_target), pin(wx_address), pin(both_halves);
  pin(source_step), pin(output_step), pin(inverse_size), pin(eps);
  cluster_barrier();

#pragma unroll 1
  for (int t = 0; t < steps; t++) {
    const uint32_t buffer = t % kBuffers, turn = t % 2;
    float sums[kTeamOctets][2][4] = {};
#pragma unroll
    for (int n = 0; n < kSlots; n++) {
      const uint32_t barrier = hidden_barrier + 8 * (buffer * kCluster + n * kTeamWarps);
      mbarrier::wait(barrier, t / kBuffers & 1);
      if (team == 0 && lane == 0) mbarrier::expect(barrier, hidden_traffic);
      const float4 operand =
          load_float4(hidden_address + buffer * kHiddenBytes + n * kTeamWarps * kSlotBytes);
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
#pragma unroll
    for (int e = 0; e < kTeamOctets; e++) {
      float r[2];
#pragma unroll
      for (int gate = 0; gate < 2; gate++) {
        const float (&sum)[4] = sums[e][gate];
        r[gate] = fmaf(sum[1] + sum[2], 1.f / kLowScale, sum[0]) * factor[e][gate];
      }
      store_float2(partial_store + turn * sizeof(partial[0]) + e * 64, r[0], r[1]);
    }
    __syncthreads();  // the meeting
    const uint32_t statistics_buffer = turn * sizeof(statistics[0]);
    if (sums_squares) {  // lane 4g + c: units 2g, 2g + 1 and 16 further, of row c
      float square = 0.f;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        float4 parts[kTeamWarps];
#pragma unroll
        for (int i = 0; i < kTeamWarps; i++)
          parts[i] = load_float4(square_load + turn * sizeof(partial[0]) + i * kPartialBytes +
                                 k * 8 * kHalf);
        const float4 r = sum_of(parts);
        square += fmaf(r.x, r.x, r.y * r.y) + fmaf(r.z, r.z, r.w * r.w);
      }
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) square = add_lane_xor(square, offset);
      if (sends_sum) send(sum_target + statistics_buffer, sum_barrier, __float_as_uint(square));
    }
    if (!owns_row) continue;

    float r_a, r_z;
    {
      float2 parts[kTeamWarps];
#pragma unroll
      for (int i = 0; i < kTeamWarps; i++)
        parts[i] = load_float2(partial_load + turn * sizeof(partial[0]) + i * kPartialBytes);
      r_a = (parts[0].x + parts[1].x) + (parts[2].x + parts[3].x);
      r_z = (parts[0].y + parts[1].y) + (parts[2].y + parts[3].y);
    }
    const uint32_t wx_now = wx_address + t % kRingSteps * sizeof(ring[0]);
    float wx_a = load_float(wx_now), wx_z = load_float(wx_now + sizeof(ring[0][0][0]));
    float rho = 1.f;
    if constexpr (kLayerNorm) {
      wx_a += beta_a, wx_z += beta_z;
      r_a *= gamma_a, r_z *= gamma_z;
      mbarrier::wait(statistics_barrier, t & 1);
      if (threadIdx.x == 0) mbarrier::expect(statistics_barrier, statistics_traffic);
      float even = 0.f, odd = 0.f;  // two lanes share the sum over the blocks
#pragma unroll
      for (int i = 0; i < kCluster / 2; i++)
        (i % 2 ? odd : even) +=
            load_float(statistics_load + statistics_buffer + i * 2 * sizeof(statistics[0][0]));
      rho = reciprocal_sqrt(fmaf(add_lane_xor(even + odd, 1), inverse_size, eps));
    }
    const float z = fast_sigmoid(fmaf(r_z, rho, wx_z));
    const float candidate = fast_activate(activation, fmaf(r_a, rho, wx_a)) * mask;
    h = next_hidden(h, z, candidate);

    // A lane's pair of high and low part becomes, with that of the lane 16 further, a word of two
    // high parts in the one and a word of two low parts in the other.
    const float high = __half2float(__float2half_rn(h));
    const uint32_t pair = OperandTraits<__half>::pack(h, (h - high) * kLowScale);
    const uint32_t word = __byte_perm(pair, __shfl_xor_sync(0xffffffffu, pair, kHalf), both_halves);
    const uint32_t next = (t + 1) % kBuffers;
#pragma unroll
    for (int i = 0; i < kCluster / 2; i++)
      send(target[i] + next * kHiddenBytes, target_barrier[i] + next * 8 * kCluster, word);
    // In the shadow of hop 2: the copy for a later step.
    fetch(t + kRingSteps - 1);
    copy_async_wait<kRingSteps - 2>();
    if (stored) *reinterpret_cast<float*>(output) = h;
    output += output_step;
    if (stores_rho) {
      *rho_output = rho;
      rho_output += rho_step;
    }
  }
  for (int n = 0; n < kCluster; n++)
    mbarrier::wait(shared_address(&hidden_arrived[steps % kBuffers][n]), steps / kBuffers & 1);
  cluster_barrier();
#endif
}

template <int kCluster>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  const auto kernel = p.layer.layer_norm ? forward_float_kernel<kCluster, true>
                                         : forward_float_kernel<kCluster, false>;
  const ClusterKernel<PersistentForward> in_clusters = {kernel, kCluster, kFloatThreads};
  return in_clusters.run(p.choice.clusters(p.layer.rows()), p, stream);
}

}  // namespace

cudaError_t run_forward_narrow_float(const PersistentForward& p, cudaStream_t stream) {
  switch (p.choice.cluster) {
    case 4:
      return launch<4>(p, stream);
    case 8:
      return launch<8>(p, stream);
    default:
      return launch<16>(p, stream);
  }
}

}  // namespace sb_fast_sligru
