// A frame in the registers of a block, for both passes: who has which values (norm_pool.h, Layout),
// vectors of 16 bytes to and from memory, sums over the block, and the launch.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/convert.cuh"
#include "common/warp.cuh"
#include "norm_pool/norm_pool.h"

namespace sb_fast_sligru::norm_pool::cuda {

// ---- vectors of kVector values next to each other: 16 bytes of T, 32 of float where T has 2, or one
// value
template <int kVector>
__device__ __forceinline__ void load(const float* from, float (&to)[kVector]) {
  if constexpr (kVector == 1) {
    to[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
  }
}

template <class T, int kVector>
__device__ __forceinline__ void load(const T* from, float (&to)[kVector]) {
  if constexpr (kVector == 1) {
    to[0] = widen(*from);
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = unpack_pair<T>(words[i]);
      to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
  }
}

template <int kVector>
__device__ __forceinline__ void store(const float (&from)[kVector], float* to) {
  if constexpr (kVector == 1) {
    *to = from[0];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      *reinterpret_cast<float4*>(to + i) =
          make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    }
  }
}

template <class T, int kVector>
__device__ __forceinline__ void store(const float (&from)[kVector], T* to) {
  if constexpr (kVector == 1) {
    *to = narrow<T>(from[0]);
  } else {
    *reinterpret_cast<uint4*>(to) = make_uint4(
        OperandTraits<T>::pack(from[0], from[1]), OperandTraits<T>::pack(from[2], from[3]),
        OperandTraits<T>::pack(from[4], from[5]), OperandTraits<T>::pack(from[6], from[7]));
  }
}

// ---- what a thread has of a frame: kItems x kPool vectors
template <int kVector, int kPool>
struct Share {
  static constexpr int kItems = kValues / (kVector * kPool);
  int row, rows, channel, channels, frequencies, windows;

  // The last warp may have threads without a share.
  __device__ __forceinline__ Share(const NormPool& layer, int columns, int rows_of_block) {
    const int thread = static_cast<int>(threadIdx.x);
    row = thread / columns;
    rows = rows_of_block;
    channels = static_cast<int>(layer.channels);
    channel = thread % columns * kVector;
    frequencies = row < rows ? static_cast<int>(layer.frequencies) : 0;
    windows = row < rows ? static_cast<int>(layer.pooled_frequencies()) : 0;
  }
  // Index of an item along the frequencies after pooling.
  __device__ __forceinline__ int window(int item) const { return row + item * rows; }
  // Whether it has a window: at the end, frequencies may fill none.
  __device__ __forceinline__ bool has_window(int item) const { return window(item) < windows; }
  __device__ __forceinline__ int frequency(int item, int j) const {
    return window(item) * kPool + j;
  }
  __device__ __forceinline__ bool has(int item, int j) const {
    return frequency(item, j) < frequencies;
  }
  // Of a vector, in a frame.
  __device__ __forceinline__ int offset(int item, int j) const {
    return frequency(item, j) * channels + channel;
  }
};

__device__ __forceinline__ float leaky(float z, float slope) { return z > 0.f ? z : slope * z; }

// Whether `value` takes the place of the largest so far: NaN does, and stays.
__device__ __forceinline__ bool exceeds(float value, float largest) {
  return value > largest || value != value;
}

// ---- sums over the block; every thread receives them, the order of additions is fixed
struct BlockSums {
  float partial[kMostThreads / kWarp];
};

// Two calls in turn must not share `sums`; with two of them taken in turn, the barrier of one call
// is what the other's next writes wait for.
__device__ __forceinline__ float block_sum(float x, BlockSums& sums) {
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = add_lane_xor(x, offset);
  if (thread % kWarp == 0) sums.partial[thread / kWarp] = x;
  __syncthreads();
  float sum = thread % kWarp < warps ? sums.partial[thread % kWarp] : 0.f;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum = add_lane_xor(sum, offset);
  return sum;
}

// ---- host: from the types to the kernel
// Calls f(x, out, vector, pool) with an x and an out of the layer's types, and constants.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class X, class Out, int kWide, class F>
void dispatch_sizes(const NormPool& layer, const Layout& layout, const F& f) {
  const bool pairs = layer.pool_frequency == 2;
  if (layout.vector == 1) {
    pairs ? f(X{}, Out{}, Constant<1>{}, Constant<2>{})
          : f(X{}, Out{}, Constant<1>{}, Constant<1>{});
  } else {
    pairs ? f(X{}, Out{}, Constant<kWide>{}, Constant<2>{})
          : f(X{}, Out{}, Constant<kWide>{}, Constant<1>{});
  }
}

template <class F>
void dispatch(const NormPool& layer, const Layout& layout, const F& f) {
  const bool narrow = layer.out_type == layer.x_type;
  switch (layer.x_type) {
    case DType::kFloat64:
      throw std::runtime_error("sb_fast_sligru: norm_pool has no CUDA kernels for float64");
    case DType::kFloat32:
      return dispatch_sizes<float, float, 4>(layer, layout, f);
    case DType::kBFloat16:
      return narrow ? dispatch_sizes<__nv_bfloat16, __nv_bfloat16, 8>(layer, layout, f)
                    : dispatch_sizes<__nv_bfloat16, float, 8>(layer, layout, f);
    case DType::kFloat16:
      return narrow ? dispatch_sizes<__half, __half, 8>(layer, layout, f)
                    : dispatch_sizes<__half, float, 8>(layer, layout, f);
  }
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("sb_fast_sligru: a kernel of norm_pool did not launch: ") +
                             cudaGetErrorString(error));
}

}  // namespace sb_fast_sligru::norm_pool::cuda
