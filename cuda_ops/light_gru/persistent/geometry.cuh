// What all persistent kernels share: the geometry of a cluster, and rows and sequences in memory.
#pragma once

#include "common/cluster_launch.cuh"
#include "common/elementary.cuh"
#include "common/exchange.cuh"
#include "common/product.cuh"
#include "common/shared_memory.cuh"
#include "common/warp.cuh"
#include "light_gru/persistent/persistent.h"

namespace sb_fast_sligru {

// A block owns 32 units, 8 a warp; a cluster serves 4 rows. Column n of the 8 of an m16n8k16 product
// is row n / 2, so that every lane of the accumulator owns one valid value (backward holds every row
// twice, forward leaves the odd columns unused). Why 4 rows: the exchange, bound by bytes and
// messages into a block, is most of a step. In 16-bit types there are blocks of two such parts, 64
// units, too: see choice.h.
constexpr int kRows = 4;
constexpr int kWarps = 4;
constexpr int kBlockUnits = 8 * kWarps;
template <int kUnits>
constexpr int kThreads = 32 * (kUnits / 8);  // of a block of so many units
constexpr int kRingSteps = 4;                // time steps of input in flight

// Ka, Kz, 1 - z and, with the norm, q and V: what the backward recurrence reads a unit and step.
template <bool kLayerNorm>
constexpr int kCoefficientStreams = kLayerNorm ? 5 : 3;

struct Row {
  int index;      // row of the state, h0, drop_mask, rho
  int batch;      // batch entry
  int direction;  // 0 forward, 1 backward in time
  int length;     // steps of its sequence
  bool valid;     // false: repeats the last row, its results are not stored

  // True time of step n.
  __device__ __forceinline__ int64_t time_of(int64_t n) const {
    return direction ? length - 1 - n : n;
  }
  // Steps whose results are stored.
  __device__ __forceinline__ int stored_steps() const { return valid ? length : 0; }
};

// Completed from its index.
__device__ __forceinline__ Row complete(Row row, const Recurrence& layer) {
  const int batch = static_cast<int>(layer.batch);
  row.direction = row.index >= batch;
  row.batch = row.index - row.direction * batch;
  row.length = layer.lengths == nullptr ? static_cast<int>(layer.time) : layer.lengths[row.batch];
  return row;
}

__device__ __forceinline__ Row row_of_layer(const Recurrence& layer, int index) {
  Row row;
  row.index = index;
  row.valid = true;
  return complete(row, layer);
}

// The row that the time loops serve as number `slot`: see Recurrence::order.
__device__ __forceinline__ Row locate_row(const Recurrence& layer, int slot) {
  Row row;
  const int rows = static_cast<int>(layer.rows());
  row.valid = slot < rows;
  row.index = row.valid ? slot : rows - 1;
  if (layer.order != nullptr) row.index = layer.order[row.index];
  return complete(row, layer);
}

// Steps of the longest sequence of those from `slot` on.
__device__ __forceinline__ int longest_from(const Recurrence& layer, int slot) {
  return locate_row(layer, slot).length;
}

// [B, T, n] with unit stride along n.
struct Sequence {
  const void* data;
  DType type;  // float or the operand type
  int64_t batch_stride, time_stride;

  __device__ __forceinline__ bool is_float() const { return type == DType::kFloat32; }
  __device__ __forceinline__ int bytes() const { return is_float() ? 4 : 2; }
  // Address of [row, true time of step n, unit].
  __device__ __forceinline__ const char* at(const Recurrence& layer, const Row& row, int64_t n,
                                            int unit) const {
    const int64_t element = layer.element_of(row.batch, row.time_of(n), batch_stride, time_stride);
    return static_cast<const char*>(data) + (element + unit) * bytes();
  }
  // Bytes from the element of step n to that of step n + 1.
  __device__ __forceinline__ int64_t step_bytes(const Row& row) const {
    return (row.direction ? -time_stride : time_stride) * bytes();
  }
};

__device__ __forceinline__ Sequence wx_sequence(const Recurrence& layer) {
  return {layer.wx, layer.wx_type, layer.wx_batch_stride, layer.wx_time_stride};
}

__device__ __forceinline__ Sequence contiguous_sequence(const Recurrence& layer, const void* data,
                                                        DType type, int64_t size) {
  return {data, type, layer.time * size, size};
}

__device__ __forceinline__ Sequence h_sequence(const Recurrence& layer, const void* h) {
  return contiguous_sequence(layer, h, layer.output_type, layer.directions * layer.hidden);
}

// Calls `pass` with a value of the operand type.
template <class Pass>
cudaError_t with_operand_type(const Recurrence& layer, Pass pass) {
  switch (layer.operand_type) {
    case DType::kFloat32:
      return pass(float{});
    case DType::kBFloat16:
      return pass(__nv_bfloat16{});
    case DType::kFloat16:
      return pass(__half{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace sb_fast_sligru
