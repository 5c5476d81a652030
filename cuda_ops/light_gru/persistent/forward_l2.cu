// The forward recurrence of forward_narrow.cu without clusters; geometry, exchange and product are
// those of l2.cuh. Block k of a group owns units units*k, ...: both rows of Uc of each, all of K.
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

constexpr int kValueBytes = 8;  // of the partial sums of a unit: candidate and gate

template <class T, int kUnits, int kChunks>
using Shape = L2Shape<T, kUnits / (L2Operand<T>::kIsFloat ? 4 : 8), kChunks>;

template <class T, int kUnits>
SLIGRU_HD L2Memory memory_of(int blocks, int rows) {
  return l2_memory(Direction::kForward, L2Operand<T>::kIsFloat, blocks * kUnits, blocks, rows);
}

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
__device__ __forceinline__ void store_partial(const L2Product<Shape>& product,
                                              const float (&sums)[Shape::kTiles][4],
                                              const L2Partials<typename Shape::T>& partials,
                                              const L2Position& at, int column_tile,
                                              uint32_t step) {
  using Operand = L2Operand<typename Shape::T>;
  if constexpr (Operand::kIsFloat) {
    const int row = column_tile * Operand::kTileRows + at.c;
    if (row >= at.rows) return;
    const uint32_t to = partials.at(step, at.warp, row) + at.g * 4;
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; tile++)
      store_float(to + tile * 4 * kValueBytes,
                  L2Product<Shape>::join(sums[tile]) * product.factor[tile]);
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = column_tile * Operand::kTileRows + 2 * at.c + i;
      if (row >= at.rows) return;
      const uint32_t to = partials.at(step, at.warp, row) + at.g * kValueBytes;
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; tile++)
        store_float2(to + tile * 8 * kValueBytes, sums[tile][i], sums[tile][2 + i]);
    }
  }
}

// Publishes h of a row, one unit a lane. Of four lanes the first sends all four units (float: the
// first the high parts, the second the low parts).
template <class T>
struct HiddenPublisher {
  using Operand = L2Operand<T>;
  Message* messages;  // of the lane, for the warp's first row
  int cell_stride, buffer_stride;
  bool odd, sends;

  __device__ __forceinline__ HiddenPublisher(char* exchange, const L2Memory& memory,
                                             const L2Position& at, int units)
      : cell_stride(kL2Warps * memory.chunks * Operand::kChunkMessages),
        buffer_stride(static_cast<int>(memory.buffer_messages())),
        odd(at.lane % 2 == 1) {
    const int unit = at.block_unit0 + at.lane;
    sends = at.lane < units && at.lane % 4 < Operand::kParts;
    messages = reinterpret_cast<Message*>(exchange) +
               (at.warp * memory.chunks + unit / 16) * Operand::kChunkMessages +
               at.lane % 4 * 4 + unit % 16 / 4;
  }

  // By whole warps.
  __device__ __forceinline__ void send(int cell, float h, uint32_t step) const {
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
          .publish(messages + (step & 1) * buffer_stride + cell * cell_stride);
  }
};

// wx of a unit and row, step by step; each step is loaded while the one before is computed.
template <class T>
struct L2Input {
  const char* source;
  int64_t source_step;
  int gate_bytes;
  bool is_float, exists;

  __device__ __forceinline__ void begin(const Recurrence& layer, const Row& row, int unit,
                                        bool exists_) {
    const Sequence wx = wx_sequence(layer);
    exists = exists_;
    source = wx.at(layer, row, 0, unit);
    source_step = wx.step_bytes(row);
    is_float = wx.is_float();
    gate_bytes = static_cast<int>(layer.hidden) * wx.bytes();
  }
  __device__ __forceinline__ GatePair load_next() {
    GatePair x = {0.f, 0.f};
    if (exists) {
      if (is_float) {
        x.a = *reinterpret_cast<const float*>(source);
        x.z = *reinterpret_cast<const float*>(source + gate_bytes);
      } else if constexpr (!L2Operand<T>::kIsFloat) {
        x.a = OperandTraits<T>::to_float(*reinterpret_cast<const uint16_t*>(source));
        x.z = OperandTraits<T>::to_float(*reinterpret_cast<const uint16_t*>(source + gate_bytes));
      }
    }
    source += source_step;
    return x;
  }
};

template <class T, int kUnits, int kChunks>
__global__ void __launch_bounds__(kL2Threads, 1)
    forward_l2_kernel(const __grid_constant__ L2Wave<PersistentForward> wave) {
  using Shape = Shape<T, kUnits, kChunks>;
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  const PersistentForward& p = wave.p;
  const Recurrence& layer = p.layer;
  const L2Position at(wave, kUnits);
  const L2Memory memory = memory_of<T, kUnits>(at.blocks, wave.rows);
  char* const exchange =
      static_cast<char*>(p.exchange) + blockIdx.x / at.blocks * memory.bytes();
  const uint32_t fragments = shared_address(shared_bytes);

  L2Product<Shape> product(exchange, memory, at, fragments);
  product.load_weights(WeightRows<T>{static_cast<const T*>(p.u), at.hidden_size, at.block_unit0,
                                     at.g, at.c});
  const L2Partials<T> partials(fragments + Shape::kSharedBytes, kUnits, kValueBytes, wave.rows);
  const HiddenPublisher<T> publisher(exchange, memory, at, kUnits);
  const GroupSums squares(exchange, memory, at);

  const int unit = at.block_unit0 + at.lane;
  const bool in_range = at.lane < kUnits && unit < at.hidden_size;
  const int lane_unit = in_range ? unit : 0;
  const bool layer_norm = layer.layer_norm;
  UnitParameters parameters;
  if (layer_norm && in_range) parameters.load(layer, unit);
  UnitState state[kL2Cells];
  L2Input<T> input[kL2Cells];
  GatePair wx[kL2Cells];
  HiddenOutput output[kL2Cells];
  RhoOutput rho_output[kL2Cells];
#pragma unroll
  for (int i = 0; i < kL2Cells; i++) {
    const bool has_row = at.row_of_cell(i) < at.rows;
    const Row row = locate_row(layer, at.row0 + (has_row ? at.row_of_cell(i) : 0));
    if (has_row && in_range) state[i].load(layer, row, unit);
    input[i].begin(layer, row, lane_unit, has_row && in_range);
    output[i] = HiddenOutput(p, row, lane_unit, has_row && in_range);
    rho_output[i] = RhoOutput(p, row, layer_norm && has_row && at.rank == 0 && at.lane == 0);
    if (has_row) publisher.send(i, state[i].h, 1);
    wx[i] = input[i].load_next();
  }
  const RootMeanSquare mean(layer);
  const Activation activation = layer.activation;
  const int steps = static_cast<int>(layer.time);
  __syncthreads();  // the fragments in shared memory

#pragma unroll 1
  for (int t = 0; t < steps; t++) {
    const uint32_t step = static_cast<uint32_t>(t) + 1;
    for (int tile = 0; tile < product.column_tiles(); tile++) {
      float sums[Shape::kTiles][4] = {};
      product.template multiply_received<false>(sums, tile, step);
      store_partial(product, sums, partials, at, tile, step);
    }
    __syncthreads();

    GatePair r[kL2Cells];
#pragma unroll
    for (int i = 0; i < kL2Cells; i++) {
      const int row = at.row_of_cell(i);
      if (row >= at.rows) break;
      float2 parts[kL2Warps];
#pragma unroll
      for (int w = 0; w < kL2Warps; w++)
        parts[w] = load_float2(partials.at(step, w, row) + at.lane % kUnits * kValueBytes);
      r[i] = {((parts[0].x + parts[1].x) + (parts[2].x + parts[3].x)) +
                  ((parts[4].x + parts[5].x) + (parts[6].x + parts[7].x)),
              ((parts[0].y + parts[1].y) + (parts[2].y + parts[3].y)) +
                  ((parts[4].y + parts[5].y) + (parts[6].y + parts[7].y))};
      if (layer_norm)
        squares.send(i, in_range ? fmaf(r[i].a, r[i].a, r[i].z * r[i].z) : 0.f, at.lane, step);
    }
#pragma unroll
    for (int i = 0; i < kL2Cells; i++) {
      if (at.row_of_cell(i) >= at.rows) break;
      float rho = 1.f;
      if (layer_norm) {
        scale_and_shift(parameters, wx[i], r[i]);
        rho = mean.rho(squares.receive(i, at.lane, step));
      }
      update(state[i], activation, wx[i], r[i], rho);
      if (!in_range) state[i].h = 0.f;
      if (t + 1 < steps) publisher.send(i, state[i].h, step + 1);
      if constexpr (L2Operand<T>::kIsFloat)
        output[i].store_float(state[i].h);
      else
        output[i].template store<T>(state[i].h);
      rho_output[i].store(rho);
      if (t + 1 < steps) wx[i] = input[i].load_next();
    }
  }
}

template <class T, int kUnits, int kChunks>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  using Shape = Shape<T, kUnits, kChunks>;
  const L2Memory memory = memory_of<T, kUnits>(p.choice.group, p.choice.rows);
  const int partial_bytes = L2Partials<T>(0, kUnits, kValueBytes, p.choice.rows).bytes();
  return run_waves(forward_l2_kernel<T, kUnits, kChunks>, p, memory,
                   Shape::kSharedBytes + partial_bytes, stream);
}

template <class T>
cudaError_t launch(const PersistentForward& p, cudaStream_t stream) {
  const int hidden = p.choice.padded_hidden();
  if (p.choice.units == 16) {
    constexpr int kLargest = L2Operand<T>::kIsFloat ? 1024 : 2048;
    return launch<T, 16, kLargest / 16 / kL2Warps>(p, stream);
  }
  if (hidden <= 256) return launch<T, 32, 2>(p, stream);
  if (hidden <= 512) return launch<T, 32, 4>(p, stream);
  if (hidden <= 1024) return launch<T, 32, 8>(p, stream);
  if constexpr (!L2Operand<T>::kIsFloat) return launch<T, 32, 16>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t run_forward_l2(const PersistentForward& p, cudaStream_t stream) {
  switch (p.layer.operand_type) {
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return launch<__half>(p, stream);
    default:
      return launch<float>(p, stream);
  }
}

}  // namespace sb_fast_sligru
