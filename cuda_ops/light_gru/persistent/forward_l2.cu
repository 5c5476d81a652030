// The forward recurrence of forward_narrow.cu without clusters; geometry, exchange and product are
// those of l2.cuh. Block k of a group owns kUnits units from kUnits k on: both rows of Uc of each, all
// of K.
//
// One step:
//   receive h, chunk by chunk -> product -> partial sums to shared memory, __syncthreads
//   -> a warp a row: sum over warps -> r^2 over the lanes -> publish           (SLi-GRU only)
//   -> receive and sum over blocks -> rho, gates -> h, in float32 in its lane -> publish
// The tile of a product holds, in 16-bit types, candidate and gate of 8 units, rows g and g + 8; in
// float32 the high and low parts of the rows of 4 units, candidate and gate in turn.
#include "light_gru/persistent/l2.cuh"
#include "light_gru/persistent/launch.h"

namespace sb_fast_sligru {
namespace {

// Rows of Uc, as L2Product::load_weights() asks for them. Lane c multiplies units 4c..4c+3 of a
// chunk: the order of k is free as long as both operands agree.
template <class T>
struct WeightRows {
  const T* u;
  int hidden_size, block_unit0, g, c;

  // Four neighbouring weights of a row; zeros beyond H.
  template <class Words>
  __device__ __forceinline__ Words load_row(int unit, int gate, int chunk) const {
    const int column = chunk * 16 + 4 * c;
    if (unit >= hidden_size || column >= hidden_size) return {};
    return *reinterpret_cast<const Words*>(u + (gate * hidden_size + unit) * hidden_size + column);
  }
  __device__ __forceinline__ void operator()(int tile, int chunk, uint32_t (&a)[4]) const {
    const int unit = block_unit0 + tile * 8 + g;
    const uint2 candidate = load_row<uint2>(unit, 0, chunk);
    const uint2 gate = load_row<uint2>(unit, 1, chunk);
    a[0] = candidate.x, a[1] = gate.x, a[2] = candidate.y, a[3] = gate.y;
  }
  __device__ __forceinline__ void operator()(int tile, int chunk, float (&x)[4]) const {
    const float4 y = load_row<float4>(block_unit0 + tile * 4 + g / 2, g % 2, chunk);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  }
};

// The warp's part of r of the rows of a column tile.
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
      store_float(to + tile * kTileBytes, L2Product<Shape>::join(sums[tile]) * factor);
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = column_tile * Operand::kTileRows + 2 * at.c + i;
      if (row >= at.rows) return;
      const uint32_t to = partials + row * Shape::kRowBytes + at.warp * Shape::kWarpBytes +
                          at.g * Shape::kValueBytes;
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; tile++)
        store_float2(to + tile * kTileBytes, sums[tile][i], sums[tile][2 + i]);
    }
  }
}

// r of a unit and row: the sum over the warps.
template <class Shape>
__device__ __forceinline__ GatePair add_partials(uint32_t partials, int row, int block_unit) {
  const uint32_t from = partials + row * Shape::kRowBytes + block_unit * Shape::kValueBytes;
  float2 x[kL2Warps];
#pragma unroll
  for (int w = 0; w < kL2Warps; w++) x[w] = load_float2(from + w * Shape::kWarpBytes);
  return {((x[0].x + x[1].x) + (x[2].x + x[3].x)) + ((x[4].x + x[5].x) + (x[6].x + x[7].x)),
          ((x[0].y + x[1].y) + (x[2].y + x[3].y)) + ((x[4].y + x[5].y) + (x[6].y + x[7].y))};
}

// Publishes h of a row, one unit a lane. Of four lanes the first sends all four units (float: the
// first the high parts, the second the low parts).
template <class Shape>
struct HiddenPublisher {
  using T = typename Shape::T;
  using Operand = typename Shape::Operand;
  static constexpr int kRowMessages = L2Product<Shape>::kRowMessages;

  Message* messages;  // of the lane, for its first unit and row
  int buffer_stride;
  bool odd, sends;

  __device__ __forceinline__ HiddenPublisher(char* exchange, const L2Memory& memory,
                                             const L2Position& at)
      : buffer_stride(memory.buffer_messages()), odd(at.lane % 2 == 1) {
    const int unit = at.block_unit0 + at.lane;
    sends = at.lane < Shape::kUnits && at.lane % 4 < Operand::kParts;
    messages = reinterpret_cast<Message*>(exchange) + at.warp * kRowMessages +
               unit / 16 * Operand::kChunkMessages + at.lane % 4 * 4 + unit % 16 / 4;
  }

  // Of the lane's row and unit of these numbers; by whole warps.
  __device__ __forceinline__ void send(int row, int unit, float h, uint32_t step) const {
    const float other = __shfl_xor_sync(0xffffffffu, h, 1);
    const float first = odd ? other : h, second = odd ? h : other;
    uint32_t words[2];
    if constexpr (Operand::kIsFloat) {
      const SplitPair pair = split(first, second);
      words[0] = odd ? pair.low : pair.high;
    } else {
      words[0] = OperandTraits<T>::pack(first, second);
    }
    words[1] = __shfl_xor_sync(0xffffffffu, words[0], 2);
    if (sends)
      Message(words[0], words[1], 1.f, step)
          .publish(messages + (step & 1) * buffer_stride + row * (kL2Warps * kRowMessages) +
                   unit * (32 / 16 * Operand::kChunkMessages));
  }
};

// Where a row reads wx and writes h and rho, step by step. wx is kept as bits, since converting it
// would wait for the load.
template <class Shape>
struct L2Row {
  using T = typename Shape::T;
  static constexpr int kUnitCells = Shape::kUnitCells;
  static constexpr bool kIsFloat = Shape::Operand::kIsFloat;

  const char* wx;  // of the lane's first unit
  char* h;
  int rho_index;
  int onward;  // in time: 1 or -1

  __device__ __forceinline__ void begin(const PersistentForward& p, const Row& row, int unit) {
    const Recurrence& layer = p.layer;
    wx = wx_sequence(layer).at(layer, row, 0, unit);
    h = const_cast<char*>(
        h_sequence(layer, p.h)
            .at(layer, row, 0, row.direction * static_cast<int>(layer.hidden) + unit));
    rho_index = static_cast<int>(row.index * layer.time + row.time_of(0));
    onward = row.direction == 1 ? -1 : 1;
  }

  // `left`: steps of its sequence from the next one on.
  __device__ __forceinline__ void load_next(const Recurrence& layer, bool wx_float, int left,
                                            const bool (&in_range)[kUnitCells],
                                            uint2 (&x)[kUnitCells]) {
    const int bytes = wx_float ? 4 : 2, gate_bytes = static_cast<int>(layer.hidden) * bytes;
    const int64_t step = onward * (layer.wx_time_stride * bytes);
#pragma unroll
    for (int u = 0; u < kUnitCells; u++) {
      x[u] = make_uint2(0, 0);
      if (!in_range[u] || left <= 0) continue;
      const char* from = wx + 32 * u * bytes;
      x[u] = make_uint2(load_bits(from, wx_float), load_bits(from + gate_bytes, wx_float));
      if (left > kL2Ahead) {
        prefetch(from + kL2Ahead * step);
        prefetch(from + kL2Ahead * step + gate_bytes);
      }
    }
    wx += step;
  }

  __device__ __forceinline__ void store_next(const PersistentForward& p, bool goes_on,
                                             bool stores_rho, float rho,
                                             const bool (&in_range)[kUnitCells],
                                             const UnitState (&state)[kUnitCells]) {
    const bool is_float = kIsFloat || p.layer.output_type == DType::kFloat32;
    const int bytes = is_float ? 4 : 2;
    if (goes_on && stores_rho) p.rho[rho_index] = rho;
    rho_index += onward;
#pragma unroll
    for (int u = 0; u < kUnitCells; u++) {
      if (!in_range[u] || !goes_on) continue;
      char* to = h + 32 * u * bytes;
      if (is_float)
        *reinterpret_cast<float*>(to) = state[u].h;
      else if constexpr (!kIsFloat)
        *reinterpret_cast<uint16_t*>(to) = to_bits<T>(state[u].h);
    }
    h += onward * (p.layer.directions * p.layer.hidden * bytes);
  }
};

template <class Shape>
__device__ __forceinline__ void forward(const L2Wave<PersistentForward>& wave) {
  using T = typename Shape::T;
  constexpr int kUnits = Shape::kUnits, kRowCells = Shape::kRowCells;
  constexpr int kUnitCells = Shape::kUnitCells;
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  const PersistentForward& p = wave.p;
  const Recurrence& layer = p.layer;
  const L2Position at(wave, kUnits);
  const L2Memory memory = {Shape::kMostRows, L2Product<Shape>::kRowMessages, at.blocks};
  char* const exchange = static_cast<char*>(p.exchange) + blockIdx.x / at.blocks * memory.bytes();
  const uint32_t fragments = shared_address(shared_bytes);
  const uint32_t partials = fragments + Shape::kSharedBytes;

  L2Product<Shape> product(exchange, memory, at, fragments);
  product.load_weights(
      WeightRows<T>{static_cast<const T*>(p.u), at.hidden_size, at.block_unit0, at.g, at.c});
  const HiddenPublisher<Shape> publisher(exchange, memory, at);
  const GroupSums squares(exchange, memory, at);

  // Cells [row][unit] of the lane.
  const bool layer_norm = layer.layer_norm, wx_float = layer.wx_type == DType::kFloat32;
  // t ends at T whatever the lengths, for want of registers: a group whose sequences are shorter
  // begins later. Where a row's ends is kept behind its partial sums.
  const int steps = static_cast<int>(layer.time), begin = steps - longest_from(layer, at.row0);
  const auto end_address = [&](int i) {
    return partials + at.row_of(i) * Shape::kRowBytes + kL2Warps * Shape::kWarpBytes;
  };
  bool in_range[kUnitCells];
  UnitParameters parameters[kUnitCells];
  UnitState state[kRowCells][kUnitCells];
  L2Row<Shape> rows[kRowCells];
  uint2 wx[kRowCells][kUnitCells];
#pragma unroll
  for (int u = 0; u < kUnitCells; u++) {
    const int unit = at.block_unit0 + 32 * u + at.lane;
    in_range[u] = at.lane < kUnits && unit < at.hidden_size;
    if (layer_norm && in_range[u]) parameters[u].load(layer, unit);
  }
#pragma unroll
  for (int i = 0; i < kRowCells; i++) {
    if (!at.has_row(i)) break;
    const Row row = locate_row(layer, at.row0 + at.row_of(i));
    rows[i].begin(p, row, in_range[0] ? at.block_unit0 + at.lane : 0);
#pragma unroll
    for (int u = 0; u < kUnitCells; u++) {
      state[i][u] = {};
      if (in_range[u]) state[i][u].load(layer, row, at.block_unit0 + 32 * u + at.lane);
      publisher.send(i, u, state[i][u].h, static_cast<uint32_t>(begin) + 1);
    }
    if (at.lane == 0) store_uint(end_address(i), static_cast<uint32_t>(begin + row.length));
    rows[i].load_next(layer, wx_float, row.length, in_range, wx[i]);
  }
  const bool stores_rho = layer_norm && at.rank == 0 && at.lane == 0;
  const RootMeanSquare mean(layer);
  const Activation activation = layer.activation;
  __syncthreads();  // the fragments in shared memory

#pragma unroll 1
  for (int t = begin; t < steps; t++) {
    const uint32_t step = static_cast<uint32_t>(t) + 1;
    product.template run<false>(step, [&](int tile, const float (&sums)[Shape::kTiles][4]) {
      store_partial<Shape>(sums, product.factor, partials, at, tile);
    });
    __syncthreads();

    GatePair r[kRowCells][kUnitCells];
    float rho[kRowCells];
#pragma unroll
    for (int i = 0; i < kRowCells; i++) {
      if (!at.has_row(i)) break;
      float square = 0.f;
#pragma unroll
      for (int u = 0; u < kUnitCells; u++) {
        r[i][u] = add_partials<Shape>(partials, at.row_of(i), (32 * u + at.lane) % kUnits);
        if (in_range[u]) square = fmaf(r[i][u].a, r[i][u].a, fmaf(r[i][u].z, r[i][u].z, square));
      }
      if (layer_norm) squares.send(i, square, at.lane, step);
    }
#pragma unroll
    for (int i = 0; i < kRowCells; i++) {
      if (!at.has_row(i)) break;
      GatePair wx_t[kUnitCells];
#pragma unroll
      for (int u = 0; u < kUnitCells; u++) {
        wx_t[u] = {from_bits<T>(wx[i][u].x, wx_float), from_bits<T>(wx[i][u].y, wx_float)};
        if (layer_norm) scale_and_shift(parameters[u], wx_t[u], r[i][u]);
      }
      rho[i] = 1.f;
      if (layer_norm) rho[i] = mean.rho(squares.receive(i, at.lane, step, {}));
#pragma unroll
      for (int u = 0; u < kUnitCells; u++) {
        update(state[i][u], activation, wx_t[u], r[i][u], rho[i]);
        if (!in_range[u]) state[i][u].h = 0.f;
        if (t + 1 < steps) publisher.send(i, u, state[i][u].h, step + 1);
      }
    }
    __syncthreads();  // so that nobody looks for h before there can be any
#pragma unroll
    for (int i = 0; i < kRowCells; i++) {
      if (!at.has_row(i)) break;
      const int end =
          layer.lengths == nullptr ? steps : static_cast<int>(load_uint(end_address(i)));
      const int left = end - t;
      rows[i].store_next(p, left > 0, stores_rho, rho[i], in_range, state[i]);
      if (t + 1 < steps) rows[i].load_next(layer, wx_float, left - 1, in_range, wx[i]);
    }
  }
}

template <class Shape>
__global__ void __launch_bounds__(kL2Threads, 1)
    forward_l2_kernel(const __grid_constant__ L2Wave<PersistentForward> wave) {
  if constexpr (Shape::Operand::kExists) forward<Shape>(wave);
}

template <class T, int kUnits, int kCapacity>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  using Shape = L2Shape<T, Direction::kForward, kUnits, kCapacity>;
  return run_waves(forward_l2_kernel<Shape>, p, Direction::kForward,
                   Shape::kSharedBytes + p.choice.rows * Shape::kRowBytes, stream);
}

template <class T>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  constexpr bool kIsFloat = L2Operand<T>::kIsFloat;
  const int capacity = p.choice.padded_hidden();
  if (p.choice.units == 16) return launch<T, 16, kIsFloat ? 1024 : 2048>(p, stream);
  if constexpr (!kIsFloat) {
    if (p.choice.units == 64)
      return capacity == 512 ? launch<T, 64, 512>(p, stream) : launch<T, 64, 1024>(p, stream);
    if (capacity == 2048) return launch<T, 32, 2048>(p, stream);
  }
  if (capacity == 256) return launch<T, 32, 256>(p, stream);
  if (capacity == 512) return launch<T, 32, 512>(p, stream);
  if (capacity == 1024) return launch<T, 32, 1024>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t run_forward_l2(const PersistentForward& p, cudaStream_t stream) {
  return with_operand_type(p.layer, [&](auto t) { return launch<decltype(t)>(p, stream); });
}

}  // namespace sb_fast_sligru
