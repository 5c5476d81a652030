// The backward recurrence of backward_narrow.cu without clusters; geometry, exchange and product
// are those of l2.cuh. Block k of a group owns kUnits units from kUnits k on: the outputs
// Uc^T (gamma dwx) of these, K being all dwx, so that what is exchanged is dwx, in the operand type.
// In chunk q of K lie the 8 candidate and the 8 gate values of units 8q..8q+7.
//
// One step:
//   d = grad_h + carry -> dwx -> publish; m2: sum over the lanes -> publish
//   -> receive dwx, chunk by chunk -> product -> partial sums to shared memory, __syncthreads
//   -> a warp a row: sum over warps; receive m2 and sum over blocks -> carry
// There is one hop a step, since m2 travels beside dwx. The tile of a product holds, in 16-bit
// types, 16 units, in float32 the high and low parts of 8; there the sender scales every chunk, so
// that float16 holds gradients of any size, and the receiver undoes it chunk by chunk.
#include "light_gru/persistent/backward_stages.cuh"
#include "light_gru/persistent/l2.cuh"
#include "light_gru/persistent/launch.h"

namespace sb_fast_sligru {
namespace {

// Columns of Uc with gamma folded in, as L2Product::load_weights() asks for them. Lane c multiplies
// units 2c and 2c + 1 of a chunk.
template <class T>
struct WeightColumns {
  const T* u;
  const float* ln_weight;  // or null for ones
  int hidden_size, block_unit0, g, c;

  __device__ __forceinline__ float load(int row, int column) const {
    const T* from = u + row * hidden_size + column;
    const float gamma = ln_weight != nullptr ? ln_weight[row] : 1.f;
    return widen(*from) * gamma;
  }
  // Candidate rows of two units, then their gate rows.
  __device__ __forceinline__ void load_column(int column, int chunk, float (&x)[4]) const {
    const int row = chunk * 8 + 2 * c;
    x[0] = x[1] = x[2] = x[3] = 0.f;
    if (column >= hidden_size || row >= hidden_size) return;
    x[0] = load(row, column), x[1] = load(row + 1, column);
    x[2] = load(hidden_size + row, column), x[3] = load(hidden_size + row + 1, column);
  }
  __device__ __forceinline__ void operator()(int tile, int chunk, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float x[4];
      load_column(block_unit0 + tile * 16 + g + 8 * i, chunk, x);
      a[i] = OperandTraits<T>::pack(x[0], x[1]);
      a[2 + i] = OperandTraits<T>::pack(x[2], x[3]);
    }
  }
  __device__ __forceinline__ void operator()(int tile, int chunk, float (&x)[4]) const {
    load_column(block_unit0 + tile * 8 + g, chunk, x);
  }
};

// The warp's part of the carries of the rows of a column tile.
template <class Shape>
__device__ __forceinline__ void store_partial(const float (&sums)[Shape::kTiles][4], float factor,
                                              uint32_t partials, const L2Position& at,
                                              int column_tile) {
  using Operand = typename Shape::Operand;
  constexpr int kTileBytes = Shape::kTileUnits * Shape::kValueBytes;
  if constexpr (Operand::kIsFloat) {
    const int row = column_tile * Operand::kTileRows + at.c;
    if (row >= at.rows) return;
    const uint32_t to = partials + row * Shape::kRowBytes + at.warp * Shape::kWarpBytes + at.g * 4;
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; tile++)
      store_float(to + tile * kTileBytes, sums[tile][0] * factor);
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = column_tile * Operand::kTileRows + 2 * at.c + i;
      if (row >= at.rows) return;
      const uint32_t to =
          partials + row * Shape::kRowBytes + at.warp * Shape::kWarpBytes + at.g * 4;
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; tile++) {
        store_float(to + tile * kTileBytes, sums[tile][i]);
        store_float(to + tile * kTileBytes + kTileBytes / 2, sums[tile][2 + i]);
      }
    }
  }
}

// Uc^T (gamma dwx) of a unit and row: the sum over the warps.
template <class Shape>
__device__ __forceinline__ float add_partials(uint32_t partials, int row, int block_unit) {
  const uint32_t from = partials + row * Shape::kRowBytes + block_unit * Shape::kValueBytes;
  float x[kL2Warps];
#pragma unroll
  for (int w = 0; w < kL2Warps; w++) x[w] = load_float(from + w * Shape::kWarpBytes);
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Publishes dwx of a row, one unit a lane. Of two lanes the first sends both units (float: the
// first the high parts, the second the low parts).
template <class Shape>
struct DwxPublisher {
  using T = typename Shape::T;
  using Operand = typename Shape::Operand;
  static constexpr int kRowMessages = L2Product<Shape>::kRowMessages;

  Message* messages;  // of the lane, for its first unit and row
  int buffer_stride;
  bool odd, sends;

  __device__ __forceinline__ DwxPublisher(char* exchange, const L2Memory& memory,
                                          const L2Position& at)
      : buffer_stride(memory.buffer_messages()), odd(at.lane % 2 == 1) {
    const int unit = at.block_unit0 + at.lane;
    sends = at.lane < Shape::kUnits && at.lane % 2 < Operand::kParts;
    messages = reinterpret_cast<Message*>(exchange) + at.warp * kRowMessages +
               unit / 8 * Operand::kChunkMessages + at.lane % 2 * 4 + unit % 8 / 2;
  }

  // Of the lane's row and unit of these numbers; by whole warps.
  __device__ __forceinline__ void send(int row, int unit, float a, float z, uint32_t step) const {
    float scale = 1.f;
    if constexpr (Operand::kIsFloat) {
      float largest = fmaxf(fabsf(a), fabsf(z));
#pragma unroll
      for (int offset = 1; offset < 8; offset *= 2) largest = max_lane_xor(largest, offset);
      scale = scale_for(largest);
      a *= scale, z *= scale;
    }
    const float other_a = __shfl_xor_sync(0xffffffffu, a, 1);
    const float other_z = __shfl_xor_sync(0xffffffffu, z, 1);
    uint32_t low, high;
    float inverse_scale = 1.f;
    if constexpr (Operand::kIsFloat) {
      const SplitPair pair_a = odd ? split(other_a, a) : split(a, other_a);
      const SplitPair pair_z = odd ? split(other_z, z) : split(z, other_z);
      low = odd ? pair_a.low : pair_a.high, high = odd ? pair_z.low : pair_z.high;
      inverse_scale = inverse_of(scale);
    } else {
      low = OperandTraits<T>::pack(a, other_a), high = OperandTraits<T>::pack(z, other_z);
    }
    if (sends)
      Message(low, high, inverse_scale, step)
          .publish(messages + (step & 1) * buffer_stride + row * (kL2Warps * kRowMessages) +
                   unit * (32 / 8 * Operand::kChunkMessages));
  }
};

// What a unit and row read of a step: bits, since converting them would wait for the loads.
struct StepBits {
  uint32_t coefficients[kCoefficientStreams<true>], grad_h;
};

// Where a row reads and writes, from the chunk's last step to its first.
template <class Shape>
struct L2Streams {
  using T = typename Shape::T;
  static constexpr int kBytes = sizeof(T), kUnitCells = Shape::kUnitCells;
  static constexpr int kStreamBytes = Shape::kCapacity * kBytes;

  int row_step;        // of [R, p.count], of the next step to load
  int entry;           // the step from which on there are grad_h and rho
  const char* grad_h;  // of the lane's first unit
  int rho_index;
  int onward;  // in time: 1 or -1

  __device__ __forceinline__ void begin(const PersistentBackward& p, const Row& row, int k,
                                        int unit) {
    row_step = row_step_at(p, row, k);
    entry = entry_step(p, row);
    grad_h = grad_h_stream(p, grad_h_sequence(p), row, k, unit).source;
    onward = row.direction == 1 ? 1 : -1;
    rho_index = static_cast<int>(row.index * p.layer.time + row.time_of(p.first + p.count - 1 - k));
  }

  // Loads step k and moves on, but for row_step. unit: the lane's first. By whole warps.
  __device__ __forceinline__ void load_next(const PersistentBackward& p, int lane, int unit, int k,
                                            bool grad_float, const bool (&in_range)[kUnitCells],
                                            StepBits (&x)[kUnitCells]) {
    const int streams = p.layer.layer_norm ? kCoefficientStreams<true> : kCoefficientStreams<false>;
    const int step_bytes = streams * kStreamBytes, grad_bytes = grad_float ? 4 : 2;
    const int64_t grad_step = onward * (p.grad_h_time_stride * grad_bytes);
    const char* coefficients =
        static_cast<const char*>(p.coefficients) + int64_t{row_step} * step_bytes + unit * kBytes;
#pragma unroll
    for (int u = 0; u < kUnitCells; u++) {
      x[u] = {};
      if (in_range[u]) {
#pragma unroll
        for (int i = 0; i < kCoefficientStreams<true>; i++)
          if (i < streams)
            x[u].coefficients[i] = load_bits(coefficients + i * kStreamBytes + 32 * u * kBytes,
                                             L2Operand<T>::kIsFloat);
        if (k >= entry) x[u].grad_h = load_bits(grad_h + 32 * u * grad_bytes, grad_float);
      }
    }
    // A sector of 32 bytes a lane, four lanes a stream.
    if (k + kL2Ahead < p.count) {
      const int stream = lane / 4, sector = lane % 4 * 32;
      const char* ahead = coefficients - kL2Ahead * step_bytes + stream * kStreamBytes;
      int bytes = kBytes;
      if (stream >= streams) ahead = grad_h + kL2Ahead * grad_step, bytes = grad_bytes;
      ahead += sector - lane * bytes;
      const bool exists = stream < streams || k + kL2Ahead >= entry;
      if (stream <= streams && exists && sector < 32 * bytes) {
#pragma unroll
        for (int u = 0; u < kUnitCells; u++)
          if (in_range[u]) prefetch(ahead + 32 * u * bytes);
      }
    }
    grad_h += grad_step;
  }
  // Of step k, whose streams were loaded before.
  __device__ __forceinline__ float load_rho(const PersistentBackward& p, int k) {
    float rho = 1.f;
    if (p.layer.layer_norm) rho = k >= entry ? p.rho[rho_index] : 0.f;
    rho_index += onward;
    return rho;
  }
};

template <class T>
__device__ __forceinline__ StepInput<float, true> unpack_step(const PersistentBackward& p,
                                                              const StepBits& bits) {
  StepInput<float, true> x;
#pragma unroll
  for (int i = 0; i < kCoefficientStreams<true>; i++)
    x.coefficients[i] = from_bits<T>(bits.coefficients[i], L2Operand<T>::kIsFloat);
  x.grad_h = from_bits<T>(bits.grad_h, p.layer.output_type == DType::kFloat32);
  return x;
}

template <class Shape>
__device__ __forceinline__ void backward(const L2Wave<PersistentBackward>& wave) {
  using T = typename Shape::T;
  constexpr int kUnits = Shape::kUnits, kRowCells = Shape::kRowCells;
  constexpr int kUnitCells = Shape::kUnitCells;
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  const PersistentBackward& p = wave.p;
  const L2Position at(wave, kUnits);
  const int begin = begin_step(p, at.row0), count = static_cast<int>(p.count);
  if (begin == count) return;
  const L2Memory memory = {Shape::kMostRows, L2Product<Shape>::kRowMessages, at.blocks};
  char* const exchange = static_cast<char*>(p.exchange) + blockIdx.x / at.blocks * memory.bytes();
  const uint32_t fragments = shared_address(shared_bytes);
  const uint32_t partials = fragments + Shape::kSharedBytes;

  const bool layer_norm = p.layer.layer_norm;
  const auto* ln_weight = layer_norm ? static_cast<const float*>(p.layer.ln_weight) : nullptr;
  L2Product<Shape> product(exchange, memory, at, fragments);
  product.load_weights(WeightColumns<T>{static_cast<const T*>(p.u), ln_weight, at.hidden_size,
                                        at.block_unit0, at.g, at.c});
  const DwxPublisher<Shape> publisher(exchange, memory, at);
  const GroupSums m2_sums(exchange, memory, at);

  // Cells [row][unit] of the lane.
  constexpr int kPadded = Shape::kCapacity;
  const int unit = at.block_unit0 + at.lane;
  const bool grad_float = p.layer.output_type == DType::kFloat32;
  const float inverse_size = 1.f / static_cast<float>(2 * at.hidden_size);
  bool in_range[kUnitCells];
  float carry[kRowCells][kUnitCells] = {};
  L2Streams<Shape> streams[kRowCells];
  StepBits next[kRowCells][kUnitCells];
#pragma unroll
  for (int u = 0; u < kUnitCells; u++)
    in_range[u] = at.lane < kUnits && unit + 32 * u < at.hidden_size;
  const auto carry_of = [&](int i, int u) {
    return p.carry + int64_t{locate_row(p.layer, at.row0 + at.row_of(i)).index} * at.hidden_size +
           unit + 32 * u;
  };
#pragma unroll
  for (int i = 0; i < kRowCells; i++) {
    if (!at.has_row(i)) break;
    streams[i].begin(p, locate_row(p.layer, at.row0 + at.row_of(i)), begin, in_range[0] ? unit : 0);
    streams[i].load_next(p, at.lane, unit, begin, grad_float, in_range, next[i]);
    streams[i].row_step--;
#pragma unroll
    for (int u = 0; u < kUnitCells; u++)
      if (in_range[u]) carry[i][u] = *carry_of(i, u);
  }
  __syncthreads();  // the fragments in shared memory

#pragma unroll 1
  for (int k = begin; k < count; k++) {
    const uint32_t step = static_cast<uint32_t>(k) + 1;
    float own[kRowCells][kUnitCells], v[kRowCells][kUnitCells], rho[kRowCells];
    float2 dwx[kRowCells][kUnitCells];  // candidate, gate
#pragma unroll
    for (int i = 0; i < kRowCells; i++) {
      if (!at.has_row(i)) break;
      float m2 = 0.f;
#pragma unroll
      for (int u = 0; u < kUnitCells; u++) {
        const auto now = unpack_step<T>(p, next[i][u]);
        const float d = now.grad_h + carry[i][u];
        dwx[i][u] = {d * now.k_a(), d * now.k_z()};
        publisher.send(i, u, dwx[i][u].x, dwx[i][u].y, step);
        own[i][u] = times_z(d, now.complement());
        v[i][u] = now.v();
        m2 = fmaf(d, now.q(), m2);
      }
      if (layer_norm) m2_sums.send(i, m2, at.lane, step);
    }
    __syncthreads();  // so that nobody looks for dwx before there can be any
#pragma unroll
    for (int i = 0; i < kRowCells; i++) {
      if (!at.has_row(i)) break;
      rho[i] = streams[i].load_rho(p, k);
      T* const to =
          static_cast<T*>(p.dwx_rows) + int64_t{streams[i].row_step + 1} * (2 * kPadded) + unit;
#pragma unroll
      for (int u = 0; u < kUnitCells; u++)
        if (in_range[u])
          to[32 * u] = narrow<T>(dwx[i][u].x), to[32 * u + kPadded] = narrow<T>(dwx[i][u].y);
      if (k + 1 < count)
        streams[i].load_next(p, at.lane, unit, k + 1, grad_float, in_range, next[i]);
    }

    product.template run<Shape::Operand::kIsFloat>(
        step, [&](int tile, const float (&sums)[Shape::kTiles][4]) {
          store_partial<Shape>(sums, product.factor, partials, at, tile);
        });
    SumMessage m2_now[kRowCells];
#pragma unroll
    for (int i = 0; i < kRowCells; i++)
      if (layer_norm && at.has_row(i)) m2_now[i] = m2_sums.look(i, at.lane, step);
    __syncthreads();

#pragma unroll
    for (int i = 0; i < kRowCells; i++) {
      if (!at.has_row(i)) break;
      float products[kUnitCells];
#pragma unroll
      for (int u = 0; u < kUnitCells; u++)
        products[u] = add_partials<Shape>(partials, at.row_of(i), (32 * u + at.lane) % kUnits);
      float m2 = 0.f;
      if (layer_norm) {
        m2 = m2_sums.receive(i, at.lane, step, m2_now[i]) * inverse_size;
        if (at.rank == 0 && at.lane == 0) p.m2[streams[i].row_step + 1] = m2;
      }
      streams[i].row_step--;
#pragma unroll
      for (int u = 0; u < kUnitCells; u++)
        carry[i][u] =
            in_range[u] ? fmaf(rho[i], products[u], fmaf(-m2 * rho[i], v[i][u], own[i][u])) : 0.f;
    }
  }
#pragma unroll
  for (int i = 0; i < kRowCells; i++)
#pragma unroll
    for (int u = 0; u < kUnitCells; u++)
      if (at.has_row(i) && in_range[u]) *carry_of(i, u) = carry[i][u];
}

template <class Shape>
__global__ void __launch_bounds__(kL2Threads, 1)
    backward_l2_kernel(const __grid_constant__ L2Wave<PersistentBackward> wave) {
  if constexpr (Shape::Operand::kExists) backward<Shape>(wave);
}

template <class T, int kUnits, int kCapacity>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  using Shape = L2Shape<T, Direction::kBackward, kUnits, kCapacity>;
  return run_waves(backward_l2_kernel<Shape>, p, Direction::kBackward,
                   Shape::kSharedBytes + p.choice.rows * Shape::kRowBytes, stream);
}

template <class T>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  constexpr bool kIsFloat = L2Operand<T>::kIsFloat;
  const int capacity = p.choice.padded_hidden();
  if (p.choice.units == 16) return launch<T, 16, kIsFloat ? 1024 : 2048>(p, stream);
  if constexpr (!kIsFloat) {
    if (p.choice.units == 64) return launch<T, 64, 1024>(p, stream);
    if (capacity == 2048) return launch<T, 32, 2048>(p, stream);
  }
  if (capacity == 256) return launch<T, 32, 256>(p, stream);
  if (capacity == 512) return launch<T, 32, 512>(p, stream);
  if (capacity == 1024) return launch<T, 32, 1024>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t run_backward_l2(const PersistentBackward& p, cudaStream_t stream) {
  return with_operand_type(p.layer, [&](auto t) { return launch<decltype(t)>(p, stream); });
}

}  // namespace sb_fast_sligru
