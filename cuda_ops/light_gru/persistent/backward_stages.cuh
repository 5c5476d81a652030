// What the time loops of the backward kernels share, in the order of a step (the equations and the
// list of steps are at the head of backward_narrow.cu). A lane computes one unit of a row (float)
// or two neighbouring ones (float2).
#pragma once

#include "light_gru/persistent/geometry.cuh"
#include "light_gru/persistent/wide.cuh"

namespace sb_fast_sligru {

__device__ __forceinline__ float2 operator+(float2 x, float2 y) {
  return make_float2(x.x + y.x, x.y + y.y);
}
__device__ __forceinline__ float2 operator*(float2 x, float2 y) {
  return make_float2(x.x * y.x, x.y * y.y);
}

// ---- lanes
// Who this thread is in the kernels for 512 < H <= 1024, and what its lane computes: units `unit`
// and unit + 1 of row g of the cluster (or of every tile of its rows).
struct WideLane {
  int warp, lane, g, c;
  uint32_t rank;    // of the block in the cluster
  int row0;         // first row of the cluster
  int block_unit0;  // first unit of the block
  int unit;
  bool in_range;

  __device__ __forceinline__ explicit WideLane(int hidden_size, int cluster_rows = kWideRows)
      : warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), c(lane % 4) {
    rank = cluster_rank();
    row0 = static_cast<int>(blockIdx.x / kWideCluster) * cluster_rows;
    block_unit0 = static_cast<int>(rank) * kWideUnits;
    unit = block_unit0 + warp * 8 + 2 * c;
    in_range = unit < hidden_size;
  }
};

// ---- steps
// k counts them from the chunk's last one. A row enters where its sequence ends. Until then its
// coefficients, grad_h and rho count as zeros, unread, and its carry stays zero.
__device__ __forceinline__ int entry_step(const PersistentBackward& p, const Row& row) {
  return max(static_cast<int>(p.first + p.count) - row.length, 0);
}
constexpr int kNever = 0x7fffffff;  // an entry_step() of what does not exist

// The k at which a cluster begins whose rows are those from `slot` on: some steps, at most, before the
// first of them enters, since buffers and parities of messages come round every fourth. p.count if none
// enters in this chunk.
__device__ __forceinline__ int begin_step(const PersistentBackward& p, int slot) {
  const int entry = entry_step(p, locate_row(p.layer, slot)), count = static_cast<int>(p.count);
  return entry < count ? entry / 4 * 4 : count;
}

// Where step k of a row lies in an array [R, p.count], which has far less than 2^31 of them: a chunk
// takes a GiB at most (sweep.h).
__device__ __forceinline__ int row_step_at(const PersistentBackward& p, const Row& row, int k) {
  return (row.index + 1) * static_cast<int>(p.count) - 1 - k;
}

// ---- streams: the inputs of every step, from step `k` on
// One of them, of one row: where it is read next, and the bytes from a step to the one before.
struct Stream {
  const char* source = nullptr;
  int64_t step = 0;
};

// Coefficient `stream` of a unit. kHidden: padded.
template <class T, int kStreams, int kHidden>
__device__ __forceinline__ Stream coefficient_stream(const PersistentBackward& p, const Row& row,
                                                     int k, int stream, int unit) {
  const int64_t step = -static_cast<int64_t>(sizeof(T)) * kStreams * kHidden;
  return {static_cast<const char*>(p.coefficients) - int64_t{row_step_at(p, row, k)} * step +
              (stream * kHidden + unit) * sizeof(T),
          step};
}

__device__ __forceinline__ Sequence grad_h_sequence(const PersistentBackward& p) {
  return {p.grad_h, p.layer.output_type, p.grad_h_batch_stride, p.grad_h_time_stride};
}

// grad_h of a unit of the row's direction.
__device__ __forceinline__ Stream grad_h_stream(const PersistentBackward& p, const Sequence& grad_h,
                                                const Row& row, int k, int unit) {
  const int hidden_size = static_cast<int>(p.layer.hidden);
  return {grad_h.at(p.layer, row, p.first + p.count - 1 - k, row.direction * hidden_size + unit),
          -grad_h.step_bytes(row)};
}

__device__ __forceinline__ Stream rho_stream(const PersistentBackward& p, const Row& row, int k) {
  return {reinterpret_cast<const char*>(p.rho + row.index * p.layer.time +
                                        row.time_of(p.first + p.count - 1 - k)),
          row.direction ? 4 : -4};
}

// A piece of a stream that a thread copies in every step, into a ring of kRingSteps places in
// shared memory: 16 bytes or, of rho, whose steps alone are no multiples of that, 4.
template <bool kLayerNorm>
struct PieceCopy {
  Stream stream;
  int entry = kNever;  // the step from which on there is a piece
  uint32_t target;     // in the ring's first place

  // To be called for every k in turn.
  __device__ __forceinline__ void fetch(int k, int count, uint32_t ring_bytes) {
    const uint32_t to = target + k % kRingSteps * ring_bytes;
    if (k >= entry && k < count) {
      if (kLayerNorm && stream.step % 16 != 0)
        copy_async_4(to, stream.source);
      else
        copy_async_16(to, stream.source);
    }
    stream.source += stream.step;
    copy_async_commit();
  }
};

// What a lane reads of a step.
template <class Value, bool kLayerNorm>
struct StepInput {
  Value coefficients[kCoefficientStreams<kLayerNorm>];
  Value grad_h = {};
  float rho = 1.f;

  __device__ __forceinline__ Value k_a() const { return coefficients[0]; }
  __device__ __forceinline__ Value k_z() const { return coefficients[1]; }
  __device__ __forceinline__ Value complement() const { return coefficients[2]; }  // 1 - z
  __device__ __forceinline__ Value q() const { return coefficients[kLayerNorm ? 3 : 0]; }
  __device__ __forceinline__ Value v() const { return coefficients[kLayerNorm ? 4 : 0]; }
};

// ---- dwx
// dwx of a lane's unit and row, stored from step k on. kHidden: padded.
template <class T, int kHidden>
struct DwxOutput {
  T* target;  // of the next step
  bool stored;

  __device__ __forceinline__ DwxOutput(const PersistentBackward& p, const Row& row, int k, int unit,
                                       bool in_range)
      : stored(row.valid && in_range) {
    target = static_cast<T*>(p.dwx_rows) + int64_t{row_step_at(p, row, k)} * 2 * kHidden + unit;
  }
  __device__ __forceinline__ void store(T a, T z) {
    if (stored) {
      target[0] = a;
      target[kHidden] = z;
    }
    target -= 2 * kHidden;
  }
};

// ---- messages
// Two buffers in turn: which of them step k uses, and the parity of that use.
struct Turn {
  uint32_t buffer, parity;

  __device__ __forceinline__ explicit Turn(int k) : buffer(k & 1), parity(k >> 1 & 1) {}
};

// The messages of one kind that a block gets from all blocks in a step, `traffic` bytes, and the
// mbarrier under which they arrive: one for each of the buffers, 8 bytes apart.
struct Arrival {
  uint32_t barrier, traffic;

  __device__ __forceinline__ uint32_t barrier_of(uint32_t buffer) const {
    return barrier + buffer * 8;
  }
  __device__ __forceinline__ void expect(uint32_t buffer) const {
    mbarrier::expect(barrier_of(buffer), traffic);
  }
  // Waits, then re-arms.
  __device__ __forceinline__ void receive(uint32_t buffer, uint32_t parity) const {
    mbarrier::wait(barrier_of(buffer), parity);
    if (threadIdx.x == 0) expect(buffer);
  }
};

// Sets up the mbarriers of the partial carries, two, and those of m2, the two after them, and fills
// the ring of inputs with zeros, which stay where grad_h has no such unit. A cluster_barrier() has
// to follow.
template <int kBlockThreads, bool kLayerNorm, class Ring>
__device__ __forceinline__ void begin_arrivals(const Arrival& carries, const Arrival& m2,
                                               Ring& ring) {
  if (threadIdx.x < 4) mbarrier::init(carries.barrier_of(threadIdx.x));
  mbarrier::fence_init();
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(Ring)) / 4; i += kBlockThreads)
    reinterpret_cast<uint32_t*>(&ring)[i] = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      carries.expect(i);
      if (kLayerNorm) m2.expect(i);
    }
  }
}

// ---- m2 and carry
// m2 of a row from the sums of all blocks over their units, which are block_bytes apart. Four
// neighbouring lanes share the row; `address`: of block c, in lane c of them.
template <int kCluster>
__device__ __forceinline__ float add_m2(uint32_t address, uint32_t block_bytes,
                                        float inverse_size) {
  float m2 = 0.f;
#pragma unroll
  for (int i = 0; i < kCluster / 4; i++) m2 += load_float(address + i * 4 * block_bytes);
  return add_lane_xor(add_lane_xor(m2, 1), 2) * inverse_size;
}

// The sum of the partial carries that all blocks sent; load(i): that of block i.
template <int kCluster, class Load>
__device__ __forceinline__ auto add_partial_carries(const Load& load) {
  decltype(load(0)) sums[4] = {};
#pragma unroll
  for (int i = 0; i < kCluster; i++) sums[i % 4] = sums[i % 4] + load(i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// d z, from complement = 1 - z.
__device__ __forceinline__ float times_z(float d, float complement) {
  return fmaf(-complement, d, d);
}
__device__ __forceinline__ float2 times_z(float2 d, float2 complement) {
  return make_float2(times_z(d.x, complement.x), times_z(d.y, complement.y));
}

// sum + factor x
__device__ __forceinline__ float add_scaled(float sum, float factor, float x) {
  return fmaf(factor, x, sum);
}
__device__ __forceinline__ float2 add_scaled(float2 sum, float factor, float2 x) {
  return make_float2(fmaf(factor, x.x, sum.x), fmaf(factor, x.y, sum.y));
}

}  // namespace sb_fast_sligru
