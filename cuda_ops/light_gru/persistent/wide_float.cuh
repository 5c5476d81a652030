// What the float32 kernels for 512 < H <= 1024 share. Geometry and exchange are those of
// wide.cuh, numbers are split as in split_float.cuh: a product is the sum of high
// high and (high low + low high) / 2048.
//
// Split, the 128 rows of Uc of a block take 512 KB, more than its registers and shared memory hold.
// Uc is packed beforehand, in the order in which the warps multiply it; what does not fit they read
// from there anew in every time step, that is from the L2 cache. These loads do not depend on the
// state, so that they run ahead of it.
#pragma once

#include "light_gru/persistent/narrow_float.cuh"
#include "light_gru/persistent/wide.cuh"

namespace sb_fast_sligru {

constexpr int kPairFragments = 2 * kWideFragments;  // of a warp: high, low, high, ...
constexpr int kBatchFragments = 4;                  // multiplied at a time
constexpr int kBatches = kPairFragments / kBatchFragments;
constexpr size_t kWarpBytes = size_t{kPairFragments} * kFragmentBytes;  // packed
constexpr size_t kScalesOffset = kWideCluster * kWideWarps * kWarpBytes;

// Where the fragments of a warp lie: kStreamed are read from L2 in every step, kShared lie in
// shared memory, the rest in registers; each spread evenly over the product. A streamed fragment is
// requested kAhead batches before it is multiplied, and has a place in a ring of kRing.
template <int kStreamed_, int kShared_, int kRing_, int kAhead_>
struct Placement {
  static constexpr int kStreamed = kStreamed_, kShared = kShared_, kRing = kRing_;
  static constexpr int kAhead = kAhead_;
  static constexpr int kKept = kPairFragments - kStreamed, kInRegisters = kKept - kShared;
  static_assert(kStreamed % kRing == 0);  // so that a fragment's place is the same in every step

  // How many of the first `index` fragments are streamed, or lie in shared memory, or registers.
  static __host__ __device__ constexpr int streamed(int index) {
    return index * kStreamed / kPairFragments;
  }
  static __host__ __device__ constexpr int shared(int index) {
    return (index - streamed(index)) * kShared / kKept;
  }
  static __host__ __device__ constexpr int registers(int index) {
    return index - streamed(index) - shared(index);
  }
  static __host__ __device__ constexpr bool is_streamed(int index) {
    return streamed(index + 1) != streamed(index);
  }
  static __host__ __device__ constexpr bool is_shared(int index) {
    return shared(index + 1) != shared(index);
  }
  static constexpr bool ring_suffices() {
    for (int batch = 0; batch < kBatches; batch++) {
      const int from = batch * kBatchFragments, to = from + kAhead * kBatchFragments;
      const int wrapped = to > kPairFragments ? to - kPairFragments : 0;
      if (streamed(to - wrapped) - streamed(from) + streamed(wrapped) > kRing) return false;
    }
    return true;
  }
  static_assert(ring_suffices());
};

// One block packs the fragments of one warp of one block of the cluster: [block][warp][fragment]
// [lane] 16 bytes, then the inverse scales, [block][warp]. load(f, lane, x) gives the 8 weights of
// a lane in pair f, two by two in the order of multiply()'s operand.
template <class Load>
__device__ __forceinline__ void pack_fragments(char* packed, const Load& load) {
  constexpr int kPairs = kWideFragments * 32 / kWideThreads;  // of a thread
  __shared__ float maxima[kWideWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float x[kPairs][8], largest = 0.f;
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    load(i * kWideWarps + warp, lane, x[i]);
#pragma unroll
    for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(x[i][j]));
  }
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) largest = max_lane_xor(largest, offset);
  if (lane == 0) maxima[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWideWarps; i++) largest = fmaxf(largest, maxima[i]);
  const float scale = scale_for(largest);
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    SplitPair pairs[4];
#pragma unroll
    for (int j = 0; j < 4; j++) pairs[j] = split(x[i][2 * j] * scale, x[i][2 * j + 1] * scale);
    auto* to = reinterpret_cast<uint4*>(packed + blockIdx.x * kWarpBytes) +
               (i * kWideWarps + warp) * 2 * 32 + lane;
    to[0] = make_uint4(pairs[0].high, pairs[1].high, pairs[2].high, pairs[3].high);
    to[32] = make_uint4(pairs[0].low, pairs[1].low, pairs[2].low, pairs[3].low);
  }
  if (threadIdx.x == 0)
    reinterpret_cast<float*>(packed + kScalesOffset)[blockIdx.x] = inverse_of(scale);
}

// The fragments of one warp during the time loop. The batches are a pipeline: batch b is multiplied
// while the fragments of batch b + 1 are read from shared memory (stage) and those of batch
// b + kAhead from L2 (request).
template <class Place>
struct Fragments {
  uint32_t kept[Place::kInRegisters][4];
  uint4 staged[2][kBatchFragments];       // of a batch, of the next
  uint32_t shared_address, ring_address;  // of this lane's 16 bytes; a fragment's stride is
                                          // kWideWarps * kFragmentBytes
  const char* packed;                     // of this lane's 16 bytes of fragment 0

  static constexpr int kStride = kWideWarps * kFragmentBytes;

  __device__ __forceinline__ void load_kept() {
#pragma unroll
    for (int i = 0; i < kPairFragments; i++) {
      if (Place::is_streamed(i)) continue;
      const uint4 x = *reinterpret_cast<const uint4*>(packed + i * kFragmentBytes);
      if (Place::is_shared(i)) {
        store_uint4(shared_address + Place::shared(i) * kStride, x);
      } else {
        uint32_t (&to)[4] = kept[Place::registers(i)];
        to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
      }
    }
  }

  // Every lane copies what it will itself read, so that waiting for its own copies is enough.
  __device__ __forceinline__ void request(int batch) const {
#pragma unroll
    for (int j = 0; j < kBatchFragments; j++) {
      const int i = batch % kBatches * kBatchFragments + j;
      if (Place::is_streamed(i))
        copy_async_16(ring_address + Place::streamed(i) % Place::kRing * kStride,
                      packed + i * kFragmentBytes);
    }
    copy_async_commit();
  }
  __device__ __forceinline__ void request_first() const {
#pragma unroll
    for (int batch = 0; batch < Place::kAhead; batch++) request(batch);
  }

  // Before batch - 1 is multiplied, and after batch - 2 + kAhead was requested.
  __device__ __forceinline__ void stage(int batch) {
    copy_async_wait<Place::kAhead - 2>();
#pragma unroll
    for (int j = 0; j < kBatchFragments; j++) {
      const int i = batch % kBatches * kBatchFragments + j;
      if (Place::is_streamed(i))
        staged[batch % 2][j] =
            load_uint4(ring_address + Place::streamed(i) % Place::kRing * kStride);
      else if (Place::is_shared(i))
        staged[batch % 2][j] = load_uint4(shared_address + Place::shared(i) * kStride);
    }
  }

  // sum += fragment j of a batch times b
  __device__ __forceinline__ void multiply(float (&sum)[4], int batch, int j, uint32_t b0,
                                           uint32_t b1) const {
    const int i = batch * kBatchFragments + j;
    if (Place::is_streamed(i) || Place::is_shared(i)) {
      const uint4& x = staged[batch % 2][j];
      const uint32_t a[4] = {x.x, x.y, x.z, x.w};
      sb_fast_sligru::multiply<__half>(sum, a, b0, b1);
    } else {
      sb_fast_sligru::multiply<__half>(sum, kept[Place::registers(i)], b0, b1);
    }
  }
  // A whole batch: pair 0 for sum 0, pair 1 for sum 1. What one low part takes part in goes to
  // `low`.
  __device__ __forceinline__ void multiply_batch(float (&sum0)[4], float (&sum1)[4],
                                                 float (&low0)[4], float (&low1)[4], int batch,
                                                 uint2 b_high, uint2 b_low) const {
    multiply(sum0, batch, 0, b_high.x, b_high.y);
    multiply(sum1, batch, 2, b_high.x, b_high.y);
    multiply(low0, batch, 0, b_low.x, b_low.y);
    multiply(low1, batch, 2, b_low.x, b_low.y);
    multiply(low0, batch, 1, b_high.x, b_high.y);
    multiply(low1, batch, 3, b_high.x, b_high.y);
  }
};

}  // namespace sb_fast_sligru
