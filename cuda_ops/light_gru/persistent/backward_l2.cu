// The backward recurrence of backward_narrow.cu without clusters; geometry, exchange and product
// are those of l2.cuh. Block k of a group owns units units*k, ...: the outputs Uc^T (gamma dwx) of
// these, K being all dwx, so that what is exchanged is dwx, in the operand type. In chunk q of K
// lie the 8 candidate and the 8 gate values of units 8q..8q+7.
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

constexpr int kValueBytes = 4;  // of the partial sums of a unit

template <class T, int kUnits, int kChunks>
using Shape = L2Shape<T, kUnits / (L2Operand<T>::kIsFloat ? 8 : 16), kChunks>;

template <class T, int kUnits>
SLIGRU_HD L2Memory memory_of(int blocks, int rows) {
  return l2_memory(Direction::kBackward, L2Operand<T>::kIsFloat, blocks * kUnits, blocks, rows);
}

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
__device__ __forceinline__ void store_partial(const L2Product<Shape>& product,
                                              const float (&sums)[Shape::kTiles][4],
                                              const L2Partials<typename Shape::T>& partials,
                                              const L2Position& at, int column_tile,
                                              uint32_t step) {
  using Operand = L2Operand<typename Shape::T>;
  if constexpr (Operand::kIsFloat) {
    const int row = column_tile * Operand::kTileRows + at.c;
    if (row >= at.rows) return;
    const uint32_t to = partials.at(step, at.warp, row) + at.g * kValueBytes;
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; tile++)
      store_float(to + tile * 8 * kValueBytes, sums[tile][0] * product.factor[tile]);
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = column_tile * Operand::kTileRows + 2 * at.c + i;
      if (row >= at.rows) return;
      const uint32_t to = partials.at(step, at.warp, row) + at.g * kValueBytes;
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; tile++) {
        store_float(to + tile * 16 * kValueBytes, sums[tile][i]);
        store_float(to + (tile * 16 + 8) * kValueBytes, sums[tile][2 + i]);
      }
    }
  }
}

// Publishes dwx of a row, one unit a lane. Of two lanes the first sends both units (float: the
// first the high parts, the second the low parts).
template <class T>
struct DwxPublisher {
  using Operand = L2Operand<T>;
  Message* messages;  // of the lane, for the warp's first row
  int cell_stride, buffer_stride;
  bool odd, sends;

  __device__ __forceinline__ DwxPublisher(char* exchange, const L2Memory& memory,
                                          const L2Position& at, int units)
      : cell_stride(kL2Warps * memory.chunks * Operand::kChunkMessages),
        buffer_stride(static_cast<int>(memory.buffer_messages())),
        odd(at.lane % 2 == 1) {
    const int unit = at.block_unit0 + at.lane;
    sends = at.lane < units && at.lane % 2 < Operand::kParts;
    messages = reinterpret_cast<Message*>(exchange) +
               (at.warp * memory.chunks + unit / 8) * Operand::kChunkMessages +
               at.lane % 2 * 4 + unit % 8 / 2;
  }

  // By whole warps.
  __device__ __forceinline__ void send(int cell, float a, float z, uint32_t step) const {
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
          .publish(messages + (step & 1) * buffer_stride + cell * cell_stride);
  }
};

// What a unit and row read of step k, counted from the chunk's last. Addresses are computed anew,
// since there are no registers left to keep them.
template <class T>
__device__ __forceinline__ StepInput<float, true> load_step(const PersistentBackward& p, int row_,
                                                            int k, int unit, int padded) {
  const Recurrence& layer = p.layer;
  const int count = static_cast<int>(p.count), streams = layer.layer_norm ? 5 : 3;
  const Row row = locate_row(layer, row_);
  const int64_t n = p.first + count - 1 - k;
  const T* from = static_cast<const T*>(p.coefficients) +
                  (int64_t{row.index + 1} * count - 1 - k) * (streams * padded) + unit;
  StepInput<float, true> x = {};
#pragma unroll
  for (int i = 0; i < kCoefficientStreams<true>; i++)
    if (i < streams) x.coefficients[i] = widen(from[i * padded]);
  const Sequence grad_h = grad_h_sequence(p);
  const char* address =
      grad_h.at(layer, row, n, row.direction * static_cast<int>(layer.hidden) + unit);
  x.grad_h = grad_h.is_float() ? *reinterpret_cast<const float*>(address)
                               : widen(*reinterpret_cast<const T*>(address));
  if (layer.layer_norm) x.rho = p.rho[row.index * layer.time + layer.time_of(row.index, n)];
  return x;
}

template <class T, int kUnits, int kChunks>
__global__ void __launch_bounds__(kL2Threads, 1)
    backward_l2_kernel(const __grid_constant__ L2Wave<PersistentBackward> wave) {
  using Shape = Shape<T, kUnits, kChunks>;
  using Operand = L2Operand<T>;
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  const PersistentBackward& p = wave.p;
  const L2Position at(wave, kUnits);
  const L2Memory memory = memory_of<T, kUnits>(at.blocks, wave.rows);
  char* const exchange =
      static_cast<char*>(p.exchange) + blockIdx.x / at.blocks * memory.bytes();
  const uint32_t fragments = shared_address(shared_bytes);

  const bool layer_norm = p.layer.layer_norm;
  const auto* ln_weight = layer_norm ? static_cast<const float*>(p.layer.ln_weight) : nullptr;
  L2Product<Shape> product(exchange, memory, at, fragments);
  product.load_weights(WeightColumns<T>{static_cast<const T*>(p.u), ln_weight, at.hidden_size,
                                        at.block_unit0, at.g, at.c});
  const L2Partials<T> partials(fragments + Shape::kSharedBytes, kUnits, kValueBytes, wave.rows);
  const DwxPublisher<T> publisher(exchange, memory, at, kUnits);
  const GroupSums m2_sums(exchange, memory, at);

  const int unit = at.block_unit0 + at.lane;
  const bool in_range = at.lane < kUnits && unit < at.hidden_size;
  const int count = static_cast<int>(p.count), padded = at.blocks * kUnits;
  const float inverse_size = 1.f / static_cast<float>(2 * at.hidden_size);
  float carry[kL2Cells] = {};
  StepInput<float, true> next[kL2Cells] = {};
#pragma unroll
  for (int i = 0; i < kL2Cells; i++) {
    const int row = at.row0 + at.row_of_cell(i);
    if (at.row_of_cell(i) < at.rows && in_range) {
      carry[i] = p.carry[int64_t{row} * at.hidden_size + unit];
      next[i] = load_step<T>(p, row, 0, unit, padded);
    }
  }
  __syncthreads();  // the fragments in shared memory

#pragma unroll 1
  for (int k = 0; k < count; k++) {
    const uint32_t step = static_cast<uint32_t>(k) + 1;
    float own[kL2Cells], rho_v[kL2Cells], rho[kL2Cells];
#pragma unroll
    for (int i = 0; i < kL2Cells; i++) {
      if (at.row_of_cell(i) >= at.rows) break;
      const int row = at.row0 + at.row_of_cell(i);
      const auto now = next[i];
      const float d = now.grad_h + carry[i];
      const float a = d * now.k_a(), z = d * now.k_z();
      publisher.send(i, a, z, step);
      if (layer_norm) m2_sums.send(i, d * now.q(), at.lane, step);
      if (in_range) {
        T* dwx = static_cast<T*>(p.dwx_rows) +
                 (int64_t{row + 1} * count - 1 - k) * (2 * padded) + unit;
        dwx[0] = narrow<T>(a), dwx[padded] = narrow<T>(z);
      }
      own[i] = times_z(d, now.complement());
      rho[i] = layer_norm ? now.rho : 1.f;
      rho_v[i] = rho[i] * now.v();
      if (k + 1 < count && in_range) next[i] = load_step<T>(p, row, k + 1, unit, padded);
    }

    for (int tile = 0; tile < product.column_tiles(); tile++) {
      float sums[Shape::kTiles][4] = {};
      product.template multiply_received<Operand::kIsFloat>(sums, tile, step);
      store_partial(product, sums, partials, at, tile, step);
    }
    __syncthreads();

#pragma unroll
    for (int i = 0; i < kL2Cells; i++) {
      const int row = at.row_of_cell(i);
      if (row >= at.rows) break;
      float parts[kL2Warps];
#pragma unroll
      for (int w = 0; w < kL2Warps; w++)
        parts[w] = load_float(partials.at(step, w, row) + at.lane % kUnits * kValueBytes);
      const float product_sum = ((parts[0] + parts[1]) + (parts[2] + parts[3])) +
                                ((parts[4] + parts[5]) + (parts[6] + parts[7]));
      if (layer_norm) {
        const float m2 = m2_sums.receive(i, at.lane, step) * inverse_size;
        own[i] = fmaf(-m2, rho_v[i], own[i]);
        if (at.rank == 0 && at.lane == 0) p.m2[int64_t{at.row0 + row + 1} * count - 1 - k] = m2;
      }
      carry[i] = in_range ? fmaf(rho[i], product_sum, own[i]) : 0.f;
    }
  }
#pragma unroll
  for (int i = 0; i < kL2Cells; i++) {
    const int row = at.row_of_cell(i);
    if (row < at.rows && in_range)
      p.carry[int64_t{at.row0 + row} * at.hidden_size + unit] = carry[i];
  }
}

template <class T, int kUnits, int kChunks>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  using Shape = Shape<T, kUnits, kChunks>;
  const L2Memory memory = memory_of<T, kUnits>(p.choice.group, p.choice.rows);
  const int partial_bytes = L2Partials<T>(0, kUnits, kValueBytes, p.choice.rows).bytes();
  return run_waves(backward_l2_kernel<T, kUnits, kChunks>, p, memory,
                   Shape::kSharedBytes + partial_bytes, stream);
}

template <class T>
cudaError_t launch(const PersistentBackward& p, cudaStream_t stream) {
  const int hidden = p.choice.padded_hidden();
  if (p.choice.units == 16) {
    constexpr int kLargest = L2Operand<T>::kIsFloat ? 1024 : 2048;
    return launch<T, 16, kLargest / 8 / kL2Warps>(p, stream);
  }
  if (hidden <= 256) return launch<T, 32, 4>(p, stream);
  if (hidden <= 512) return launch<T, 32, 8>(p, stream);
  if (hidden <= 1024) return launch<T, 32, 16>(p, stream);
  if constexpr (!L2Operand<T>::kIsFloat) return launch<T, 32, 32>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t run_backward_l2(const PersistentBackward& p, cudaStream_t stream) {
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
