// The kernels for GPUs without thread-block clusters, and for H > 1024: what forward_l2.cu and
// backward_l2.cu share.
//
// A group of blocks, one a multiprocessor, keeps U on chip and serves up to kL2Rows batch rows. In
// every time step each block publishes what it computed for its units, and every block reads what
// all have published: an all-gather through the L2 cache. Groups never wait for each other; the
// blocks of a group do, so a launch is cooperative, all its blocks run at once, and rows for which
// there is no group left wait for the next launch.
//
// Exchange. A message is 16 bytes that are written and read as a whole, and carries the number of
// its step: who reads that number has the data, so no order between different addresses is needed
// and nobody resets anything. Half of a message is data; that is cheaper than a flag beside bare
// data, a second trip to the L2 cache (0.95 instead of 1.9 us for 4 KB among 16 blocks of an H100).
// There are two buffers in turn. A block writes those of step t + 2 after it has all of step t + 1,
// and each block published those when all its warps had read those of step t, since its __syncthreads
// stands in between.
//
// Product. [outputs, K] x [K, rows], with K in chunks of 16: warp w multiplies the chunks w, w + 8,
// ... for all outputs of the block, so that a message is read by one warp alone, into the very
// registers from which the product takes it. The partial sums of the warps meet in shared memory.
// Lane i of warp w then computes cells: unit i of the block in rows w and w + 8 of the group.
#pragma once

#include <type_traits>

#include "common/cooperative_launch.cuh"
#include "common/gpu.h"
#include "common/split_float.cuh"
#include "light_gru/persistent/forward_stages.cuh"

namespace sb_fast_sligru {

constexpr int kL2Threads = 32 * kL2Warps;
constexpr int kL2Cells = kL2Rows / kL2Warps;  // rows of a warp

// A pass whose operands are T (float: pairs of float16, see narrow_float.cuh: a product's right
// operand then holds the high and low parts of four rows instead of eight rows).
template <class T>
struct L2Operand {
  static constexpr bool kIsFloat = std::is_same_v<T, float>;
  using Part = std::conditional_t<kIsFloat, __half, T>;  // what is multiplied
  static constexpr int kParts = kIsFloat ? 2 : 1;        // of a number
  static constexpr int kTileRows = 8 / kParts;           // batch rows of a product
  static constexpr int kChunkMessages = 4 * kParts;      // of a row
};

// ---- messages
// Four operands of a product's lane, two in each word, what undoes their scale, and the step, from
// 1 on.
struct Message {
  unsigned __int128 bits;

  __device__ __forceinline__ Message(uint32_t low, uint32_t high, float inverse_scale,
                                     uint32_t step) {
    const uint64_t data = low | static_cast<uint64_t>(high) << 32;
    const uint64_t tag = __float_as_uint(inverse_scale) | static_cast<uint64_t>(step) << 32;
    bits = data | static_cast<unsigned __int128>(tag) << 64;
  }
  Message() = default;

  __device__ __forceinline__ uint32_t low() const { return static_cast<uint32_t>(bits); }
  __device__ __forceinline__ uint32_t high() const { return static_cast<uint32_t>(bits >> 32); }
  __device__ __forceinline__ float inverse_scale() const {
    return __uint_as_float(static_cast<uint32_t>(bits >> 64));
  }
  __device__ __forceinline__ uint32_t step() const { return static_cast<uint32_t>(bits >> 96); }

  __device__ __forceinline__ void publish(Message* to) const {
    asm volatile("st.relaxed.gpu.global.b128 [%0], %1;" ::"l"(to), "q"(bits) : "memory");
  }
  __device__ __forceinline__ void read_if(const Message* from, bool condition) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.s32 p, %2, 0;\n"
        "@p ld.relaxed.gpu.global.b128 %0, [%1];\n"
        "}"
        : "+q"(bits)
        : "l"(from), "r"(static_cast<int>(condition))
        : "memory");
  }
};

// One number of a block and row.
struct alignas(8) SumMessage {
  float sum;
  uint32_t step;
};

__device__ __forceinline__ void publish(SumMessage* to, const SumMessage& x) {
  asm volatile(
      "{\n"
      ".reg .b64 message;\n"
      "mov.b64 message, {%1, %2};\n"
      "st.relaxed.gpu.global.b64 [%0], message;\n"
      "}" ::"l"(to),
      "f"(x.sum), "r"(x.step)
      : "memory");
}

__device__ __forceinline__ SumMessage read(const SumMessage* from) {
  SumMessage x;
  asm volatile(
      "{\n"
      ".reg .b64 message;\n"
      "ld.relaxed.gpu.global.b64 message, [%2];\n"
      "mov.b64 {%0, %1}, message;\n"
      "}"
      : "=f"(x.sum), "=r"(x.step)
      : "l"(from)
      : "memory");
  return x;
}

// ---- a launch
// A wave of groups: pass p of the rows from first_row on, `rows` a group.
template <class Pass>
struct L2Wave {
  Pass p;
  int first_row;
  int rows;
};

// The exchange memory of a group: messages of two buffers, [buffer][row][chunk][message], then the
// sums, [buffer][row][block].
struct L2Memory {
  int rows, chunks, blocks;
  int chunk_messages;

  SLIGRU_HD int64_t buffer_messages() const { return int64_t{rows} * chunks * chunk_messages; }
  SLIGRU_HD int64_t sums_offset() const { return 2 * buffer_messages() * 16; }
  SLIGRU_HD int64_t bytes() const {
    return ceil_div(sums_offset() + int64_t{2} * rows * blocks * 8, 128) * 128;
  }
};

SLIGRU_HD L2Memory l2_memory(Direction direction, bool is_float, int padded_hidden, int blocks,
                             int rows) {
  return {rows, padded_hidden / (direction == Direction::kForward ? 16 : 8), blocks,
          is_float ? 8 : 4};
}

// Who a thread is.
struct L2Position {
  int warp, lane, g, c;  // lane = 4g + c, as in product.cuh
  int blocks, rank;      // of the group, of the block in it
  int row0, rows;        // of the group
  int block_unit0;       // first unit of the block
  int hidden_size;

  template <class Pass>
  __device__ __forceinline__ L2Position(const L2Wave<Pass>& wave, int units)
      : warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), c(lane % 4) {
    blocks = wave.p.choice.group;
    const int group = static_cast<int>(blockIdx.x) / blocks;
    rank = static_cast<int>(blockIdx.x) - group * blocks;
    row0 = wave.first_row + group * wave.rows;
    rows = min(wave.rows, static_cast<int>(wave.p.layer.rows()) - row0);
    block_unit0 = rank * units;
    hidden_size = static_cast<int>(wave.p.layer.hidden);
  }
  // Row of the group of this warp's cell i.
  __device__ __forceinline__ int row_of_cell(int i) const { return warp + i * kL2Warps; }
};

// The sum of a row's numbers over the group: each block publishes its own, by one lane, and all
// lanes of the row's warp get the sum, added in the same order in every block.
struct GroupSums {
  SumMessage* sums;  // of the first of the warp's rows, buffer 0
  int cell_stride, buffer_stride, rank, blocks;

  __device__ __forceinline__ GroupSums(char* exchange, const L2Memory& memory,
                                       const L2Position& at)
      : sums(reinterpret_cast<SumMessage*>(exchange + memory.sums_offset()) +
             at.warp * at.blocks),
        cell_stride(kL2Warps * at.blocks),
        buffer_stride(memory.rows * at.blocks),
        rank(at.rank),
        blocks(at.blocks) {}

  // x: a lane's part.
  __device__ __forceinline__ void send(int cell, float x, int lane, uint32_t step) const {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) x = add_lane_xor(x, offset);
    if (lane == 0)
      publish(sums + (step & 1) * buffer_stride + cell * cell_stride + rank, {x, step});
  }
  __device__ __forceinline__ float receive(int cell, int lane, uint32_t step) const {
    const SumMessage* from = sums + (step & 1) * buffer_stride + cell * cell_stride;
    float sum = 0.f;
    for (int i = lane; i < blocks; i += 32) {
      SumMessage x;
      do x = read(from + i);
      while (x.step != step);
      sum += x.sum;
    }
    __syncwarp();
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) sum = add_lane_xor(sum, offset);
    return sum;
  }
};

// ---- the product
// Of kTiles tiles of 16 rows of the left operand, by kChunks chunks that one warp multiplies. Where
// its fragments (512 bytes each) are more than the registers hold, every second lies in shared
// memory.
template <class T_, int kTiles_, int kChunks_>
struct L2Shape {
  using T = T_;
  static constexpr int kTiles = kTiles_, kChunks = kChunks_;
  static constexpr int kFragments = kTiles * kChunks;
  static constexpr bool kShares = kFragments > 32;
  static_assert(kFragments <= (kShares ? 64 : 32));
  static constexpr int kInRegisters = kShares ? kFragments / 2 : kFragments;
  static constexpr int kSharedBytes = kShares ? kL2Warps * kFragments / 2 * kFragmentBytes : 0;
  static constexpr int kBatch = kChunks < 4 ? kChunks : 4;  // chunks that are read together
};

template <class Shape>
struct L2Product {
  using Operand = L2Operand<typename Shape::T>;
  using Part = typename Operand::Part;
  static constexpr int kTiles = Shape::kTiles, kChunks = Shape::kChunks;
  // Gradients are scaled by their sender, chunk by chunk, so that float16 holds them.
  uint32_t weights[Shape::kInRegisters][4];
  float factor[kTiles];  // float: of the lane's row of U
  uint32_t fragment_address;
  const Message* messages;  // of the lane, in chunk 0 of row 0's column tile
  int tile_stride, buffer_stride, chunks, rows, first_chunk, column;

  __device__ __forceinline__ L2Product(char* exchange, const L2Memory& memory,
                                       const L2Position& at, uint32_t fragments)
      : fragment_address(fragments + threadIdx.x * 16),
        tile_stride(Operand::kTileRows * memory.chunks * Operand::kChunkMessages),
        buffer_stride(static_cast<int>(memory.buffer_messages())),
        chunks(memory.chunks),
        rows(at.rows),
        first_chunk(at.warp) {
    const int part = at.g % Operand::kParts;
    column = at.g / Operand::kParts;
    messages = reinterpret_cast<const Message*>(exchange) +
               (column * memory.chunks + first_chunk) * Operand::kChunkMessages + part * 4 + at.c;
  }

  static __device__ __forceinline__ constexpr bool is_shared(int fragment) {
    return Shape::kShares && fragment % 2 == 1;
  }
  static __device__ __forceinline__ constexpr int place(int fragment) {
    return Shape::kShares ? fragment / 2 : fragment;
  }

  // Fragment (tile, i): the lane's weights of its i-th chunk. load(tile, chunk, x) gives a lane's part
  // of the left operand, as multiply() takes it; with float the four floats of row g of which that
  // then is made.
  template <class Load>
  __device__ __forceinline__ void load_weights(const Load& load) {
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
      float scale = 1.f;
      if constexpr (Operand::kIsFloat) {
        float largest = 0.f;
#pragma unroll 1
        for (int i = 0; i < kChunks; i++) {
          float x[4];
          load(tile, i * kL2Warps + first_chunk, x);
#pragma unroll
          for (int j = 0; j < 4; j++) largest = fmaxf(largest, fabsf(x[j]));
        }
        scale = scale_for(max_lane_xor(max_lane_xor(largest, 1), 2));  // of the row
        factor[tile] = inverse_of(scale);
      }
#pragma unroll
      for (int i = 0; i < kChunks; i++) {
        uint32_t a[4];
        if constexpr (Operand::kIsFloat) {
          float x[4];
          load(tile, i * kL2Warps + first_chunk, x);
          const SplitPair first = split(x[0] * scale, x[1] * scale);
          const SplitPair second = split(x[2] * scale, x[3] * scale);
          a[0] = first.high, a[1] = first.low, a[2] = second.high, a[3] = second.low;
        } else {
          load(tile, i * kL2Warps + first_chunk, a);
        }
        // Or packing waits for later, with twice the registers.
#pragma unroll
        for (int j = 0; j < 4; j++) pin(a[j]);
        const int f = i * kTiles + tile;
        if (is_shared(f)) {
          store_uint4(fragment_address + place(f) * kL2Threads * 16,
                      make_uint4(a[0], a[1], a[2], a[3]));
        } else {
#pragma unroll
          for (int j = 0; j < 4; j++) weights[place(f)][j] = a[j];
        }
      }
    }
  }

  __device__ __forceinline__ int column_tiles() const {
    return (rows + Operand::kTileRows - 1) / Operand::kTileRows;
  }

  // The warp's part of the sums of column tile `tile`, which it receives. kScaled: chunk by chunk
  // by its own factor.
  template <bool kScaled>
  __device__ __forceinline__ void multiply_received(float (&sums)[kTiles][4], int column_tile,
                                                    uint32_t step) const {
    const Message* from =
        messages + (step & 1) * buffer_stride + column_tile * tile_stride;
    // Of the warp's, this many steps of kL2Warps.
    const int exist = column_tile * Operand::kTileRows + column < rows ? chunks - first_chunk : 0;
#pragma unroll
    for (int batch = 0; batch < kChunks; batch += Shape::kBatch) {
      Message x[Shape::kBatch];
#pragma unroll
      for (int i = 0; i < Shape::kBatch; i++)
        x[i] = Message(0, 0, 0.f, (batch + i) * kL2Warps < exist ? 0 : step);
      bool waits;
      do {
        waits = false;
#pragma unroll
        for (int i = 0; i < Shape::kBatch; i++)
          x[i].read_if(from + (batch + i) * kL2Warps * Operand::kChunkMessages,
                       x[i].step() != step);
#pragma unroll
        for (int i = 0; i < Shape::kBatch; i++) waits |= x[i].step() != step;
      } while (waits);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < Shape::kBatch; i++) {
        [[maybe_unused]] const float inverse_scale =
            __shfl_sync(0xffffffffu, x[i].inverse_scale(), 8 * (threadIdx.x % 4));
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
          const int f = (batch + i) * kTiles + tile;
          uint32_t a[4];
          if (is_shared(f)) {
            const uint4 y = load_uint4(fragment_address + place(f) * kL2Threads * 16);
            a[0] = y.x, a[1] = y.y, a[2] = y.z, a[3] = y.w;
          } else {
#pragma unroll
            for (int j = 0; j < 4; j++) a[j] = weights[place(f)][j];
          }
          if constexpr (kScaled) {
            float part[4];
            multiply_new(part, a, x[i].low(), x[i].high());
            sums[tile][0] = fmaf(inverse_scale, join(part), sums[tile][0]);
          } else {
            multiply<Part>(sums[tile], a, x[i].low(), x[i].high());
          }
        }
      }
    }
  }

  // Of the partial products of a lane with float operands: high high and (high low + low high).
  static __device__ __forceinline__ float join(const float (&x)[4]) {
    return fmaf(x[1] + x[2], 1.f / kLowScale, x[0]);
  }
};

// Partial sums, [buffer][warp][row][value], by two buffers in turn: a step's are read before the
// next __syncthreads, those of the step after next written behind it.
template <class T>
struct L2Partials {
  uint32_t address;
  int row_bytes, warp_bytes, buffer_bytes;

  // kValueBytes: of a unit. Padded, so that the rows of a store use different banks.
  SLIGRU_HD L2Partials(uint32_t address, int units, int value_bytes, int rows)
      : address(address),
        row_bytes(units * value_bytes + (L2Operand<T>::kIsFloat ? 32 : 16)),
        warp_bytes(rows * row_bytes),
        buffer_bytes(kL2Warps * warp_bytes) {}

  SLIGRU_HD int bytes() const { return 2 * buffer_bytes; }
  __device__ __forceinline__ uint32_t at(uint32_t step, int warp, int row) const {
    return address + (step & 1) * buffer_bytes + warp * warp_bytes + row * row_bytes;
  }
};

// Groups that run at once.
inline int64_t l2_groups(const KernelChoice& choice, int64_t rows) {
  return std::min<int64_t>(choice.groups(rows), current_gpu().multiprocessors / choice.group);
}

// Launches `kernel`, wave after wave.
template <class Pass>
cudaError_t run_waves(void (*kernel)(L2Wave<Pass>), const Pass& p, const L2Memory& memory,
                      int dynamic_bytes, cudaStream_t stream) {
  const int64_t rows = p.layer.rows(), at_once = l2_groups(p.choice, rows);
  if (at_once == 0) return cudaErrorInvalidConfiguration;
  for (int64_t first = 0; first < rows; first += at_once * p.choice.rows) {
    const int64_t groups = std::min(at_once, ceil_div(rows - first, p.choice.rows));
    // No message is of step 0.
    cudaError_t error = cudaMemsetAsync(p.exchange, 0, groups * memory.bytes(), stream);
    if (error != cudaSuccess) return error;
    error = launch_cooperatively(kernel, static_cast<int>(groups) * p.choice.group, kL2Threads,
                                 dynamic_bytes,
                                 L2Wave<Pass>{p, static_cast<int>(first), p.choice.rows}, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace sb_fast_sligru
