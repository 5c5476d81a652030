// The kernels for GPUs without thread-block clusters, and for H > 1024: what forward_l2.cu and
// backward_l2.cu share.
//
// A group of blocks, one a multiprocessor, keeps U on chip and serves up to 8 or 16 batch rows. In
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
// One step has two __syncthreads: one between the partial sums and their reader, one between the
// messages sent and the look for the next, which also allows the partial sums one buffer.
//
// Product. [outputs, K] x [K, rows], with K in chunks of 16: warp w multiplies the chunks w, w + 8,
// ... for all outputs of the block, so that a message is read by one warp alone, into the very
// registers from which the product takes it. The partial sums of the warps meet in shared memory.
// Lane i of warp w then computes two cells: unit i of the block in rows w and w + 8 of the group
// or, where a block has 64 units, units i and i + 32 in row w.
#pragma once

#include <type_traits>

#include "common/cooperative_launch.cuh"
#include "common/gpu.h"
#include "common/split_float.cuh"
#include "light_gru/persistent/forward_stages.cuh"

namespace sb_fast_sligru {

constexpr int kL2Threads = 32 * kL2Warps;
constexpr int kL2Cells = 2;  // of a lane

// A pass whose operands are T (float: pairs of float16, see narrow_float.cuh: a product's right
// operand then holds the high and low parts of four rows instead of eight rows).
template <class T>
struct L2Operand {
  static constexpr bool kIsFloat = std::is_same_v<T, float>;
  using Part = std::conditional_t<kIsFloat, __half, T>;  // what is multiplied
  static constexpr int kParts = kIsFloat ? 2 : 1;        // of a number
  static constexpr int kTileRows = 8 / kParts;           // batch rows of a product
  static constexpr int kChunkMessages = 4 * kParts;      // of a row
  // Products of bfloat16 exist from compute capability 8.0 on; for older targets the kernels that
  // need them are empty, and nothing launches those.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  static constexpr bool kExists = true;
#else
  static constexpr bool kExists = !std::is_same_v<T, __nv_bfloat16>;
#endif
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
  static __device__ __forceinline__ Message read(const Message* from) {
    Message x;
    asm volatile("ld.relaxed.gpu.global.b128 %0, [%1];" : "=q"(x.bits) : "l"(from) : "memory");
    return x;
  }
};

// One number of a block and row. Each has a sector of the L2 cache to itself: blocks that write to
// the same one wait for each other.
struct alignas(32) SumMessage {
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

// ---- streams
// What a step reads and writes of tensors, it reads and writes behind its own messages, while those of
// the others are under way. Loads return in order, so that the look for messages would wait for
// the memory: so many steps before, the L2 cache is asked for it.
constexpr int kL2Ahead = 4;

__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}

// A float or a 16-bit number, as its bits.
__device__ __forceinline__ uint32_t load_bits(const void* from, bool is_float) {
  return is_float ? *static_cast<const uint32_t*>(from) : *static_cast<const uint16_t*>(from);
}

template <class T>
__device__ __forceinline__ float from_bits(uint32_t bits, bool is_float) {
  if constexpr (L2Operand<T>::kIsFloat)
    return __uint_as_float(bits);
  else
    return is_float ? __uint_as_float(bits)
                    : OperandTraits<T>::to_float(static_cast<uint16_t>(bits));
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
  int rows;          // most that a group serves: known when a kernel is compiled, as the next
  int row_messages;  // of all chunks that the kernel reads, which may be more than anybody sends
  int blocks;

  SLIGRU_HD int buffer_messages() const { return rows * row_messages; }
  SLIGRU_HD int64_t sums_offset() const { return int64_t{2} * buffer_messages() * sizeof(Message); }
  SLIGRU_HD int64_t bytes() const {
    return ceil_div(sums_offset() + int64_t{2} * rows * blocks * sizeof(SumMessage), 128) * 128;
  }
};

// Of a chunk's 16 values, each is sent as one part or two, and a message holds 4.
SLIGRU_HD constexpr int l2_chunks(Direction direction, int capacity) {
  return capacity / (direction == Direction::kForward ? 16 : 8);
}

inline L2Memory l2_memory(Direction direction, bool is_float, const KernelChoice& choice) {
  return {l2_most_rows(choice.units),
          l2_chunks(direction, choice.padded_hidden()) * (is_float ? 8 : 4), choice.group};
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
  // The warp's row i, of the group.
  __device__ __forceinline__ int row_of(int i) const { return warp + i * kL2Warps; }
  __device__ __forceinline__ bool has_row(int i) const { return row_of(i) < rows; }
};

// The sum of a row's numbers over the group: each block publishes its own, by one lane, and all
// lanes of the row's warp get the sum, added in the same order in every block. `row`: of the warp.
struct GroupSums {
  SumMessage* sums;  // of the first of the warp's rows, buffer 0
  int row_stride, buffer_stride, rank, blocks;

  __device__ __forceinline__ GroupSums(char* exchange, const L2Memory& memory, const L2Position& at)
      : sums(reinterpret_cast<SumMessage*>(exchange + memory.sums_offset()) + at.warp * at.blocks),
        row_stride(kL2Warps * at.blocks),
        buffer_stride(memory.rows * at.blocks),
        rank(at.rank),
        blocks(at.blocks) {}

  // x: a lane's part.
  __device__ __forceinline__ void send(int row, float x, int lane, uint32_t step) const {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) x = add_lane_xor(x, offset);
    if (lane == 0) publish(of(row, step) + rank, {x, step});
  }
  // What is there of the lane's first block: for receive(), so that its first look costs no time.
  __device__ __forceinline__ SumMessage look(int row, int lane, uint32_t step) const {
    return lane < blocks ? read(of(row, step) + lane) : SumMessage{};
  }
  __device__ __forceinline__ float receive(int row, int lane, uint32_t step, SumMessage x) const {
    const SumMessage* from = of(row, step);
    float sum = 0.f;
    for (int i = lane; i < blocks; i += 32) {
      while (x.step != step) x = read(from + i);
      sum += x.sum;
      x.step = 0;
    }
    __syncwarp();
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) sum = add_lane_xor(sum, offset);
    return sum;
  }

 private:
  __device__ __forceinline__ SumMessage* of(int row, uint32_t step) const {
    return sums + (step & 1) * buffer_stride + row * row_stride;
  }
};

// ---- the product
// Of kTiles tiles of 16 rows of the left operand, by kChunks chunks that one warp multiplies. Where
// its fragments (512 bytes each) are more than the registers hold, every second or fourth lies in
// shared memory. kCapacity: the largest H.
template <class T_, Direction kDirection, int kUnits_, int kCapacity_>
struct L2Shape {
  using T = T_;
  using Operand = L2Operand<T>;
  static constexpr int kUnits = kUnits_, kCapacity = kCapacity_;
  static constexpr bool kForward = kDirection == Direction::kForward;
  static constexpr int kTileUnits = (kForward ? 8 : 16) / Operand::kParts;
  static constexpr int kTiles = kUnits / kTileUnits;
  static constexpr int kChunks = l2_chunks(kDirection, kCapacity) / kL2Warps;
  static constexpr int kBlockChunks = kUnits / (kForward ? 16 : 8);  // that a block sends

  static constexpr int kFragments = kTiles * kChunks;
  // One fragment of so many lies in shared memory; of the last, none.
  static constexpr int kSharedOf = kFragments > 32                        ? 2
                                   : kFragments > 16 && Operand::kIsFloat ? 4
                                                                          : kFragments + 1;
  static constexpr int kInShared = kFragments / kSharedOf;
  static constexpr int kInRegisters = kFragments - kInShared;
  static constexpr int kSharedBytes = kL2Warps * kInShared * kFragmentBytes;
  // Chunks whose messages are read together: as many as there are registers for.
  static constexpr int kMost = kFragments <= 16                                         ? 8
                               : kTiles < 8 && (kFragments <= 32 || !Operand::kIsFloat) ? 4
                                                                                        : 2;
  static constexpr int kBatch = kChunks < kMost ? kChunks : kMost;

  // The cells of a lane: of kRowCells rows by kUnitCells units.
  static constexpr int kUnitCells = kUnits > 32 ? kUnits / 32 : 1;
  static constexpr int kRowCells = kL2Cells / kUnitCells;
  static constexpr int kMostRows = l2_most_rows(kUnits);
  static constexpr int kColumnTiles = kMostRows / Operand::kTileRows;
  // Bytes of the partial sums, [row][warp][unit]: of a row, candidate and gate of a unit forward,
  // one value backward. Padded, so that the rows of a store use different banks.
  static constexpr int kValueBytes = kForward ? 8 : 4;
  static constexpr int kWarpBytes = kUnits * kValueBytes;
  static constexpr int kRowBytes = kL2Warps * kWarpBytes + (Operand::kIsFloat ? 32 : 16);
  static_assert(kRowBytes <= l2_row_bytes(kUnits));
};

template <class Shape>
struct L2Product {
  using Operand = typename Shape::Operand;
  using Part = typename Operand::Part;
  static constexpr int kTiles = Shape::kTiles, kChunks = Shape::kChunks;
  static constexpr int kColumnTiles = Shape::kColumnTiles;
  static constexpr int kChains =
      Shape::kFragments <= 16 && kTiles < 4 ? 2 : 1;  // of dependent products, for each tile
  static constexpr int kBatch = Shape::kBatch, kBatches = kChunks / kBatch;
  static constexpr int kChunkStride = kL2Warps * Operand::kChunkMessages;  // from one to the next
  static constexpr int kRowMessages = kChunks * kChunkStride;

  uint32_t weights[Shape::kInRegisters][4];
  float factor;  // float: undoes the scale of the warp's weights
  uint32_t fragment_address;
  const Message* messages;  // of the lane, in the warp's first chunk of the lane's first row
  int buffer_stride, rows;
  int first_chunk, chunks;  // chunks: of this warp that anybody sends
  int column;

  __device__ __forceinline__ L2Product(char* exchange, const L2Memory& memory, const L2Position& at,
                                       uint32_t fragments)
      : fragment_address(fragments + threadIdx.x * 16),
        buffer_stride(memory.buffer_messages()),
        rows(at.rows),
        first_chunk(at.warp),
        chunks((at.blocks * Shape::kBlockChunks - at.warp + kL2Warps - 1) / kL2Warps),
        column(at.g / Operand::kParts) {
    messages = reinterpret_cast<const Message*>(exchange) + row_of(0) * kRowMessages +
               first_chunk * Operand::kChunkMessages + at.g % Operand::kParts * 4 + at.c;
  }

  static __device__ __forceinline__ constexpr bool is_shared(int fragment) {
    return (fragment + 1) % Shape::kSharedOf == 0;
  }
  // Among those of its kind.
  static __device__ __forceinline__ constexpr int place(int fragment) {
    const int shared = fragment / Shape::kSharedOf;
    return is_shared(fragment) ? shared : fragment - shared;
  }

  // Fragment (tile, i): the lane's weights of its i-th chunk. load(tile, chunk, x) gives a lane's part
  // of the left operand, as multiply() takes it; with float the four floats of row g of which that
  // then is made.
  template <class Load>
  __device__ __forceinline__ void load_weights(const Load& load) {
    float scale = 1.f;
    if constexpr (Operand::kIsFloat) {
      float largest = 0.f;
#pragma unroll 1
      for (int i = 0; i < kTiles * kChunks; i++) {
        float x[4];
        load(i % kTiles, i / kTiles * kL2Warps + first_chunk, x);
#pragma unroll
        for (int j = 0; j < 4; j++) largest = fmaxf(largest, fabsf(x[j]));
      }
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) largest = max_lane_xor(largest, offset);
      scale = scale_for(largest);
      factor = inverse_of(scale);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
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

  // The warp's part of the sums, column tile by column tile, as its messages arrive; store(tile,
  // sums) takes them. kScaled: each chunk has its own factor. A batch of messages is read for the
  // first time before the one in front of it is multiplied.
  template <bool kScaled, class Store>
  __device__ __forceinline__ void run(uint32_t step, const Store& store) const {
    Message x[2][kBatch];
    read(x[0], 0, 0, step);
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; tile++) {
      if (tile * Operand::kTileRows >= rows) break;
      float sums[kChains][kTiles][4] = {};
#pragma unroll
      for (int i = 0; i < kBatches; i++) {
        const int turn = (tile * kBatches + i) % 2;
        while (!have_arrived(x[turn], i, step)) read(x[turn], tile, i, step);
        __syncwarp();
        if (i + 1 < kBatches)
          read(x[1 - turn], tile, i + 1, step);
        else if (tile + 1 < kColumnTiles && (tile + 1) * Operand::kTileRows < rows)
          read(x[1 - turn], tile + 1, 0, step);
        multiply<kScaled>(sums, x[turn], i);
      }
      if constexpr (kChains == 2)
#pragma unroll
        for (int i = 0; i < kTiles * 4; i++) sums[0][i / 4][i % 4] += sums[1][i / 4][i % 4];
      store(tile, sums[0]);
    }
  }

 private:
  // Columns without a row read what the last row does, and are not used.
  __device__ __forceinline__ int row_of(int tile) const {
    return min(tile * Operand::kTileRows + column, rows - 1);
  }
  __device__ __forceinline__ void read(Message (&x)[kBatch], int tile, int batch,
                                       uint32_t step) const {
    const Message* from = messages + (step & 1) * buffer_stride;
    if (tile > 0) from += (row_of(tile) - row_of(0)) * kRowMessages;
#pragma unroll
    for (int i = 0; i < kBatch; i++)
      x[i] = Message::read(from + (batch * kBatch + i) * kChunkStride);
  }
  __device__ __forceinline__ bool have_arrived(const Message (&x)[kBatch], int batch,
                                               uint32_t step) const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < kBatch; i++) all &= x[i].step() == step || batch * kBatch + i >= chunks;
    return __all_sync(0xffffffffu, all);
  }

  template <bool kScaled>
  __device__ __forceinline__ void multiply(float (&sums)[kChains][kTiles][4],
                                           const Message (&x)[kBatch], int batch) const {
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int chunk = batch * kBatch + i;
      if (chunk >= chunks) break;
      // Of row c of the column tile.
      [[maybe_unused]] float inverse_scale = 1.f;
      if constexpr (kScaled)
        inverse_scale = __shfl_sync(0xffffffffu, x[i].inverse_scale(), 8 * (threadIdx.x % 4));
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
        const int f = chunk * kTiles + tile;
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
          sums[i % kChains][tile][0] = fmaf(inverse_scale, join(part), sums[i % kChains][tile][0]);
        } else {
          sb_fast_sligru::multiply<Part>(sums[i % kChains][tile], a, x[i].low(), x[i].high());
        }
      }
    }
  }

 public:
  // Of the partial products of a lane with float operands: high high and (high low + low high).
  static __device__ __forceinline__ float join(const float (&x)[4]) {
    return fmaf(x[1] + x[2], 1.f / kLowScale, x[0]);
  }
};

// Groups that run at once.
inline int64_t l2_groups(const KernelChoice& choice, int64_t rows) {
  return std::min<int64_t>(choice.groups(rows), current_gpu().multiprocessors / choice.group);
}

// Launches `kernel`, wave after wave.
template <class Pass>
cudaError_t run_waves(void (*kernel)(L2Wave<Pass>), const Pass& p, Direction direction,
                      int dynamic_bytes, cudaStream_t stream) {
  const L2Memory memory = l2_memory(direction, p.layer.operand_type == DType::kFloat32, p.choice);
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
